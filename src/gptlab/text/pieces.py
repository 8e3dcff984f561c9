"""Documents in pieces of bounded length, cut where no tokenizer notices."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from gptlab.text.tokenizers import END_OF_TEXT

PIECE = 2**20
"""Most characters that a piece of a document has."""

# Where a text may be cut so that the ids of its parts, one after the other, are the ids of the whole. GPT-2's
# pattern has no alternative with white space after anything else, none with a letter before anything but a letter, and
# none with a digit before anything but a digit: a match ends at each of these places, whatever stands around it. What
# comes after is matched as it would be alone, since the pattern never looks back. What comes before is too: only
# `\s+(?!\S)` looks beyond its match, and no white space stands before the cut. The classes are ASCII's, and Python's
# `\S`, which excludes more than Unicode's White_Space, so that all engines agree on them.
_CUT = re.compile(r"\S(?=[ \t\n])|[A-Za-z](?=[0-9!-/:-@\[-`{-~])|[0-9](?=[A-Za-z!-/:-@\[-`{-~])")


class Piece(NamedTuple):
    """A document or a part of it, and whether the document ends with it."""

    text: str
    ends: bool


def in_pieces(text: str, size: int = PIECE) -> Iterator[Piece]:
    """Yield one whole document in pieces of at most ``size`` characters.

    Where that many characters in a row give no place for a harmless cut, as in a word of a million letters, the cut
    is made all the same, and the ids around it may differ from those of the whole.
    """
    start = 0
    while len(text) - start > size:
        end = _cut(text, start, size)
        yield Piece(text[start:end], False)
        start = end
    yield Piece(text[start:], True)


def document_pieces(chunks: Iterable[str], size: int = PIECE) -> Iterator[Piece]:
    """Yield the documents of a text that comes in chunks; a line ``<|endoftext|>`` ends one, so does the text's end.

    Documents of nothing but white space are left out.
    """
    text = ""  # what there is of the current document and was not yielded yet
    begun = False  # pieces of it were
    for block, line_begins, last in _blocks(chunks, size):
        parts = _split(block, line_begins)
        for i, part in enumerate(parts):
            text += part
            ends = i < len(parts) - 1 or last
            if begun or (text and not text.isspace()):
                *pieces, rest = in_pieces(text, size)
                yield from pieces
                text, begun = rest.text, begun or bool(pieces)
                if ends:
                    yield rest
            if ends:
                text, begun = "", False


def line_pieces(chunks: Iterable[str]) -> Iterator[Piece]:
    """Yield each line that is neither blank nor ``<|endoftext|>``, without its end, as a document."""
    for line in _lines(chunks):
        if line and not line.isspace() and line != END_OF_TEXT:
            yield from in_pieces(line)


def _split(block: str, line_begins: bool) -> list[str]:
    """Return what is before, between and after the lines that end a document."""
    parts = []
    start, found = 0, block.find(END_OF_TEXT)
    while found >= 0:
        end = found + len(END_OF_TEXT)
        begins = block[found - 1] == "\n" if found else line_begins
        if begins and block[end : end + 1] in ("\n", ""):
            parts.append(block[start:found])
            start = end + 1
        found = block.find(END_OF_TEXT, end)
    return [*parts, block[start:]]


def _cut(text: str, start: int, size: int) -> int:
    """Return the last harmless place for a cut within ``size`` characters from ``start``, or else that distance."""
    end = start + size
    for begin in (max(start, end - 2**12), start):  # hardly ever is the whole searched
        cuts = [match.end() for match in _CUT.finditer(text, begin, end + 1)]
        if cuts:
            return cuts[-1]
    return end


def _blocks(chunks: Iterable[str], size: int) -> Iterator[tuple[str, bool, bool]]:
    """Yield text in blocks of whole lines, whether each begins with a line, and whether it is the last.

    A line longer than ``size`` comes in several blocks, which is why that must be longer than what ends a document.
    """
    rest, line_begins = "", True
    for chunk in chunks:
        rest += chunk
        end = rest.rfind("\n") + 1
        if end == 0 and len(rest) < size:
            continue
        end = end or len(rest)
        yield rest[:end], line_begins, False
        line_begins = rest[end - 1] == "\n"
        rest = rest[end:]
    yield rest, line_begins, True


def _lines(chunks: Iterable[str]) -> Iterator[str]:
    rest: list[str] = []
    for chunk in chunks:
        first, *others = chunk.split("\n")
        rest.append(first)
        for line in others:
            yield "".join(rest)
            rest = [line]
    yield "".join(rest)
