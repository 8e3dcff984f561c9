"""The one exception that gptlab raises on purpose."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class GptlabError(ValueError):
    """Something the user can put right: one sentence that names the thing and the way out.

    The command line prints the sentence and exits with code 2; a library caller may catch it.
    """


def nearest(word: str, known: Iterable[str]) -> str:
    """Return ``" (did you mean 'x'?)"`` for the closest of ``known``, or an empty string."""
    match = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" (did you mean {match[0]!r}?)" if match else ""
