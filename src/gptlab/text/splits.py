"""Which documents are held out: a function of each document's text alone."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from gptlab.errors import GptlabError
from gptlab.text.documents import Documents
from gptlab.text.tokenizers import refuse_surrogates

SPLITS = ("training", "validation")
_REPORT_BYTES = 2**20

Parted = Iterator[tuple[str, bool, int]]
"""Pieces of documents: the text, whether the document ends with it, and the place of its split in `SPLITS`."""


class Survey(NamedTuple):
    """What one pass over the documents tells.

    Attributes:
        ranks: a hash of each document's text as a number from 0 to 1, (n_documents,), float64.
        n_characters: in all documents.
        n_bytes: of UTF-8 in all documents.
    """

    ranks: np.ndarray
    n_characters: int
    n_bytes: int


class Division(NamedTuple):
    """How documents are divided.

    Attributes:
        parted: yields the documents' pieces with their splits, from the start at every call.
        forced: the rank that is on the other side than the share to hold out says, or None.
    """

    parted: Callable[[], Parted]
    forced: float | None


def survey(documents: Documents, report: Callable[[dict[str, Any]], None] = lambda row: None) -> Survey:
    """Read all documents and hash them."""
    ranks, digest = array("d"), hashlib.sha256()
    n_characters = n_bytes = reported = 0
    for piece in documents.pieces():
        try:
            content = piece.text.encode()
        except UnicodeEncodeError:
            refuse_surrogates(piece.text)
            raise
        digest.update(content)
        n_characters += len(piece.text)
        n_bytes += len(content)
        if piece.ends:
            ranks.append(int.from_bytes(digest.digest()[:8], "big") / 2**64)
            digest = hashlib.sha256()
        if n_bytes - reported >= _REPORT_BYTES:
            reported = n_bytes
            report({"event": "read", "documents": len(ranks), "bytes": n_bytes})
    return Survey(np.frombuffer(ranks, dtype=np.float64), n_characters, n_bytes)


def divide(documents: Documents, found: Survey, held_out: float) -> Division:
    """Divide a corpus.

    A document is held out when its rank is below ``held_out``, so equal documents stay together and added ones move
    none to the other side. Each split has at least one: where the rule gives all to one side, the document whose rank
    is next to the border changes over. A corpus of one document is cut at ``1 - held_out`` of its characters, at a
    line's end.

    Raises:
        GptlabError: too little text for two parts.
    """
    short = GptlabError(f"the corpus {documents.name} is too short to hold a part of it out; add text")
    if len(found.ranks) == 1:
        cut = _line_end(documents, int(found.n_characters * (1 - held_out)))
        if cut in (0, found.n_characters):
            raise short
        return Division(lambda: _cut_at(documents, cut), None)
    ranks = np.unique(found.ranks)
    if len(ranks) == 1:
        raise short
    below = int((ranks < held_out).sum())
    n_held = min(max(below, 1), len(ranks) - 1)
    forced = None if n_held == below else float(ranks[0] if below == 0 else ranks[-1])
    return divide_alike(documents, found, held_out, forced)


def divide_alike(documents: Documents, found: Survey, held_out: float, forced: float | None) -> Division:
    """Divide documents by the share and the exception of others that they join."""
    in_validation = found.ranks < held_out
    if forced is not None:
        in_validation ^= found.ranks == forced
    return Division(lambda: _by_document(documents, in_validation), forced)


def _by_document(documents: Documents, in_validation: np.ndarray) -> Parted:
    i = 0
    for text, ends in documents.pieces():
        if i == len(in_validation):
            raise _changed(documents)
        yield text, ends, int(in_validation[i])
        i += ends
    if i < len(in_validation):
        raise _changed(documents)


def _changed(documents: Documents) -> GptlabError:
    return GptlabError(f"the files of {documents.name} were changed while they were read; run the same command again")


def _line_end(documents: Documents, limit: int) -> int:
    """Return the position after the last line that ends within ``limit`` characters of the one document, or 0."""
    position = found = 0
    for text, _ in documents.pieces():
        end = text.rfind("\n", 0, max(limit - position, 0)) + 1
        found = position + end if end else found
        position += len(text)
    return found


def _cut_at(documents: Documents, cut: int) -> Parted:
    """Yield the one document as two: its first ``cut`` characters, and the rest."""
    position = 0
    for text, ends in documents.pieces():
        here = min(max(cut - position, 0), len(text))
        position += len(text)
        if here:
            yield text[:here], position >= cut, 0
        if here < len(text):
            yield text[here:], ends, 1
