"""One continuation as it grows: tokens to text, stop strings, and why it ended."""

from __future__ import annotations

import codecs
from collections.abc import Collection, Sequence
from typing import Literal

from gptlab.text.tokenizers import Tokenizer

Finish = Literal["end_of_text", "stop", "length", "context"]


class Continuation:
    """The text of one growing continuation.

    Text is given out in whole characters (a token may end inside one) and only once it can no longer be the
    beginning of a stop string.

    Attributes:
        tokens: the new token ids, without the one that ended the text.
        text: what has been given out so far.
        finish: why it ended, or None while it goes on: a token that ends texts, a stop string, the number of
            tokens asked for, or a full context.

    Args:
        tokenizer: what turns tokens into text.
        stop: strings before which the text ends.
        ends: ids that end the text; None takes the tokenizer's own.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), ends: Collection[int] | None = None) -> None:
        self.tokens: list[int] = []
        self.text = ""
        self.finish: Finish | None = None
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._ends = frozenset(tokenizer.ends if ends is None else ends)
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""

    def add(self, token: int) -> str:
        """Take up one token; return the text that may now be shown, which may be none."""
        if token in self._ends:
            return self.close("end_of_text")
        self.tokens.append(token)
        self._held += self._decoder.decode(self._tokenizer.decode_bytes([token]))
        starts = [i for i in (self._held.find(word) for word in self._stop) if i >= 0]
        if starts:
            self.finish = "stop"
            return self._give(min(starts))
        return self._give(len(self._held) - self._undecided())

    def close(self, finish: Finish) -> str:
        """End the text; return what was held back, unless it had ended already."""
        if self.finish is not None:
            return ""
        self.finish = finish
        self._held += self._decoder.decode(b"", final=True)
        return self._give(len(self._held))

    def _undecided(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        longest = max((len(word) - 1 for word in self._stop), default=0)
        for n in range(min(longest, len(self._held)), 0, -1):
            if any(word.startswith(self._held[-n:]) for word in self._stop):
                return n
        return 0

    def _give(self, n: int) -> str:
        piece, self._held = self._held[:n], self._held[n:]
        self.text += piece
        return piece
