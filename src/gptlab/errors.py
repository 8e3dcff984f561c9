"""The one exception that gptlab raises on purpose."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterable, Iterator

LONGEST = 800
"""Characters of a sentence."""


class GptlabError(ValueError):
    """Something the user can put right: one sentence that names the thing and the way out.

    The command line prints the sentence and exits with code 2; a library caller may catch it. A sentence that quotes
    what somebody put into a file may be of any length, so its middle is cut out beyond `LONGEST`.
    """

    def __init__(self, sentence: str) -> None:
        half = LONGEST // 2
        super().__init__(sentence if len(sentence) <= LONGEST else f"{sentence[:half]} [...] {sentence[-half:]}")


@contextlib.contextmanager
def needing(extra: str, what: str) -> Iterator[None]:
    """Turn an import that fails inside the ``with`` block into the sentence that says what to install.

    Args:
        extra: of gptlab, which brings the packages.
        what: is missing, with its verb: "the page's packages are".

    Raises:
        GptlabError: a package is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise GptlabError(f"{what} not installed (no module {error.name!r}): pip install 'gptlab[{extra}]'") from None


def nearest(word: str, known: Iterable[str]) -> str:
    """Return ``" (did you mean 'x'?)"`` for the closest of ``known``, or an empty string."""
    match = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" (did you mean {match[0]!r}?)" if match else ""
