"""The harness's own command line, to which gptlab's models are known.

The harness finds models by a registry inside the process and has no plug-ins, so that its own command cannot know ours.
"""

from __future__ import annotations

import sys

from gptlab.errors import GptlabError, needing


def main() -> None:
    """Run `lm-eval` with the model type ``gptlab``; a `GptlabError` becomes one sentence and exit code 2."""
    try:
        with needing("eval", "the evaluation harness is"):
            from lm_eval.__main__ import cli_evaluate

            from gptlab.harness import adapter
        adapter.register()
        cli_evaluate()
    except GptlabError as error:
        print(f"gptlab: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
