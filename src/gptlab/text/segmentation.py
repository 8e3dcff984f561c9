"""A text divided into documents, and documents into pieces of bounded length, cut where no tokenizer notices."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple, cast

from gptlab.text.tokenizers import END_OF_TEXT

_END = re.compile(re.escape(END_OF_TEXT) + r"(?=\s)")
_BLANK = re.compile(r"[ \t]*\n?")  # what follows a mark on its line

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
    """Yield the documents of a text that comes in chunks.

    ``<|endoftext|>`` ends a document where white space or the text's end follows it, on a line of its own or behind a
    text; what follows it on its line belongs to neither. Anything else makes it a word like any other, as in
    ``"<|endoftext|>"``. Documents of nothing but white space are left out.
    """
    text = ""  # what there is of the current document and was not yielded yet
    begun = False  # pieces of it were
    for part, ends in _parts(chunks):
        text += part
        if begun or (text and not text.isspace()):
            *pieces, rest = in_pieces(text, size)
            yield from pieces
            text, begun = rest.text, begun or bool(pieces)
            if ends:
                yield rest
        if ends:
            text, begun = "", False


def line_pieces(chunks: Iterable[str]) -> Iterator[Piece]:
    """Yield each line that is not blank, without its end, as a document; ``<|endoftext|>`` as in `document_pieces`."""
    for line in _lines(chunks):
        if END_OF_TEXT not in line:
            documents = [line]
        else:
            documents = ["".join(piece.text for piece in whole) for whole in _wholes(document_pieces([line]))]
        for document in documents:
            if document and not document.isspace():
                yield from in_pieces(document)


def _wholes(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    whole: list[Piece] = []
    for piece in pieces:
        whole.append(piece)
        if piece.ends:
            yield whole
            whole = []


def _parts(chunks: Iterable[str]) -> Iterator[tuple[str, bool]]:
    """Yield a text without the marks that end documents, and whether a document ends after each part."""
    rest, after_mark = "", False
    for chunk in chunks:
        rest += chunk
        start = 0
        while True:
            if after_mark:
                begin = cast(re.Match[str], _BLANK.match(rest, start)).end()
                after_mark = begin == len(rest) and not rest.endswith("\n", start)
                start = begin
            mark = _END.search(rest, start)
            if mark is None:
                break
            yield rest[start : mark.start()], True
            start, after_mark = mark.end(), True
        # What may be the beginning of a mark, or one that is not seen yet to be followed by white space, waits.
        held = next(n for n in range(len(END_OF_TEXT), -1, -1) if rest.endswith(END_OF_TEXT[:n], start))
        yield rest[start : len(rest) - held], False
        rest = rest[len(rest) - held :]
    yield rest.removesuffix(END_OF_TEXT), True


def _cut(text: str, start: int, size: int) -> int:
    """Return the last harmless place for a cut within ``size`` characters from ``start``, or else that distance."""
    end = start + size
    for begin in (max(start, end - 2**12), start):  # hardly ever is the whole searched
        cuts = [match.end() for match in _CUT.finditer(text, begin, end + 1)]
        if cuts:
            return cuts[-1]
    return end


def _lines(chunks: Iterable[str]) -> Iterator[str]:
    rest: list[str] = []
    for chunk in chunks:
        first, *others = chunk.split("\n")
        rest.append(first)
        for line in others:
            yield "".join(rest)
            rest = [line]
    yield "".join(rest)
