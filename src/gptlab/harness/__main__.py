"""The harness's own command line, to which gptlab's models are known.

The harness finds models by a registry inside the process and has no plug-ins, so that its own command cannot know ours.
"""

from __future__ import annotations

import sys

from gptlab.errors import GptlabError


def main() -> None:
    """Run `lm-eval` with the model type ``gptlab``; a `GptlabError` becomes one sentence and exit code 2."""
    try:
        try:
            from lm_eval.__main__ import cli_evaluate

            from gptlab.harness import adapter
        except ModuleNotFoundError as error:
            raise GptlabError(
                f"the evaluation harness is not installed (no module {error.name!r}): pip install 'gptlab[eval]'"
            ) from None
        adapter.register()
        cli_evaluate()
    except GptlabError as error:
        print(f"gptlab: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
