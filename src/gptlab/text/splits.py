"""Which documents are held out: a function of each document's text, and of the corpus where the share asks for it."""

from __future__ import annotations

import hashlib
import re
from array import array
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import numpy as np

from gptlab.errors import GptlabError
from gptlab.text.documents import Documents
from gptlab.text.tokenizers import refuse_surrogates

SPLITS = ("training", "validation")
TOLERANCE = 0.1
"""The held-out share of the bytes is the one asked for within this share of it (or of the rest, if that is smaller)."""
LEAST_TO_CUT = 64
"""Bytes of the shortest document that is ever cut in two; a name or a title stays whole."""

_REPORT_BYTES = 2**20
_WINDOW = 2**16  # bytes on either side of where a cut is wanted in which a line's end is looked for
_LINE_END, _WORD_END = re.compile(rb"\n"), re.compile(rb"\S(?=\s)")

Parted = Iterator[tuple[str, bool, int]]
"""Pieces of documents: the text, whether the document ends with it, and the place of its split in `SPLITS`."""


class Cut(NamedTuple):
    """A document whose end is held out while its beginning is trained on.

    Attributes:
        rank: of the document.
        n_bytes: of its beginning, in UTF-8.
    """

    rank: float
    n_bytes: int


class Rule(NamedTuple):
    """Who is held out; what is added to a dataset later is divided by the same rule.

    Attributes:
        held_out: documents of a rank below this share are, but for the exceptions; 0 where the validation text is
            another one.
        moved: ranks of the documents that are on the other side than their rank says.
        cut: the one document that is on both, or None.
        exact: a rank is a hash of every byte, white space at the end included, as in version 1 of the format.
    """

    held_out: float
    moved: tuple[float, ...] = ()
    cut: Cut | None = None
    exact: bool = False


Part = Literal["tune", "test"]
"""Of the held-out documents: those to choose recipes and rates on, and those to report on."""

TUNE_SHARE = 1 / 3
"""Of the held-out documents, those to tune on."""
LEAST_SHARE, LARGEST_SHARE, WANTED = 0.01, 0.05, 200
"""Shares to hold out where nobody says how much, and documents that are wanted of a corpus of many."""


class Survey(NamedTuple):
    """What one pass over the documents tells.

    Attributes:
        ranks: a hash of each document's text as a number from 0 to 1, (n_documents,), float64.
        sizes: bytes of UTF-8, (n_documents,), int64.
    """

    ranks: np.ndarray
    sizes: np.ndarray

    @property
    def n_bytes(self) -> int:
        """Bytes of all documents."""
        return int(self.sizes.sum())


class Division(NamedTuple):
    """How documents are divided.

    Attributes:
        parted: yields the documents' pieces with their splits, from the start at every call.
        rule: that says so.
    """

    parted: Callable[[], Parted]
    rule: Rule


def survey(
    documents: Documents, report: Callable[[dict[str, Any]], None] = lambda row: None, *, exact: bool = False
) -> Survey:
    """Read all documents and hash them.

    White space at the end makes no different document, so the same text with and without a final newline has one rank:
    that of the text with one newline (of a line, where each line is a document, without).

    Args:
        documents: to be read.
        report: called with plain values now and then.
        exact: see `Rule`.
    """
    ranks, sizes = array("d"), array("q")
    size = n_bytes = reported = 0
    digest = hashlib.sha256()
    body = digest.copy()  # up to the last character that is not white space
    for piece in documents.pieces():
        try:
            content = piece.text.encode()
        except UnicodeEncodeError:
            refuse_surrogates(piece.text)
            raise
        size += len(content)
        if stripped := content.rstrip():
            digest.update(stripped)
            body = digest.copy()
        digest.update(content[len(stripped) :])
        if piece.ends:
            if exact:
                body = digest
            elif not documents.items:
                body.update(b"\n")
            ranks.append(int.from_bytes(body.digest()[:8], "big") / 2**64)
            sizes.append(size)
            n_bytes, size = n_bytes + size, 0
            digest = hashlib.sha256()
            body = digest.copy()
        if n_bytes + size - reported >= _REPORT_BYTES:
            reported = n_bytes + size
            report({"event": "read", "documents": len(ranks), "bytes": reported})
    return Survey(np.frombuffer(ranks, dtype=np.float64), np.frombuffer(sizes, dtype=np.int64))


def default_share(n_documents: int) -> float:
    """Return the share to hold out of a corpus: a hundredth, and of thousands of documents what gives `WANTED`."""
    share = max(LEAST_SHARE, WANTED / max(n_documents, 1))
    return share if share <= LARGEST_SHARE else LEAST_SHARE


def part_of(text: str) -> tuple[Part, float]:
    """Return which of the held-out documents a whole one belongs to, and its place in their order, from 0 to 1.

    Both depend on its text alone, white space at its end aside, and not on why it is held out: they are further bits
    of the hash of its rank (of a line, where each line is a document, of the line with its end).
    """
    digest = hashlib.sha256(text.rstrip().encode() + b"\n").digest()
    place = int.from_bytes(digest[8:16], "big") / 2**64
    return ("tune" if place < TUNE_SHARE else "test"), place


def is_whole(text: str, rule: Rule, *, items: bool = False) -> bool:
    """Is a held-out text a whole document, which the rule holds out, and not the end of one that was cut?

    Args:
        text: of a held-out document.
        rule: that held it out.
        items: each document is a line.
    """
    content = text.encode() if rule.exact else text.rstrip().encode() + (b"" if items else b"\n")
    rank = int.from_bytes(hashlib.sha256(content).digest()[:8], "big") / 2**64
    return (rank < rule.held_out) is not (rank in rule.moved)


def divide(documents: Documents, surveyed: Survey, held_out: float) -> Division:
    """Divide a corpus so that ``held_out`` of its bytes are held out, within `TOLERANCE`.

    A document is held out when its rank is below ``held_out``: equal documents stay together, and added ones move none
    to the other side. Where that misses the share, documents are moved, those nearest to the border first. Where whole
    documents do not make up for the difference, the longest one that is longer than it is cut (its end is held out, and
    its copies are cut at the same place), or else documents are moved and then one is cut. Documents of fewer than
    `LEAST_TO_CUT` bytes are never cut; a corpus of nothing else gets as near to the share as whole documents allow.

    Raises:
        GptlabError: too little text for two parts.
    """
    plan = _plan(surveyed, held_out)
    if plan is None:
        raise GptlabError(f"the corpus {documents.name} is too short to hold a part of it out; add text")
    moved, cut = plan
    rule = Rule(held_out, moved)
    if cut is not None:
        rule = rule._replace(cut=Cut(cut.rank, _place(documents, surveyed.ranks == cut.rank, cut)))
    return divide_alike(documents, surveyed, rule)


def divide_alike(documents: Documents, surveyed: Survey, rule: Rule) -> Division:
    """Divide documents by the rule of others that they join."""
    in_validation = (surveyed.ranks < rule.held_out) ^ np.isin(surveyed.ranks, rule.moved)
    in_both = np.zeros(len(surveyed.ranks), bool) if rule.cut is None else surveyed.ranks == rule.cut.rank
    n_bytes = 0 if rule.cut is None else rule.cut.n_bytes
    return Division(lambda: _by_document(documents, in_validation, in_both, n_bytes), rule)


def divide_between(documents: Documents, validation: Documents) -> Division:
    """Train on all of some documents, and hold out all of some others."""

    def parted() -> Parted:
        for side, part in enumerate((documents, validation)):
            yield from ((text, ends, side) for text, ends in part.pieces())

    return Division(parted, Rule(0.0))


# --- the share ------------------------------------------------------------------------------------------------


class _WantedCut(NamedTuple):
    rank: float
    n_bytes: int  # of the beginning
    size: int  # of the document, or of its shortest copy
    slack: int  # bytes by which the cut may be elsewhere


def _plan(surveyed: Survey, held_out: float) -> tuple[tuple[float, ...], _WantedCut | None] | None:
    """Return the ranks to move and what to cut so that the share is met; None: there is too little to divide."""
    total = surveyed.n_bytes
    target, slack = held_out * total, TOLERANCE * min(held_out, 1 - held_out) * total
    held = int(surveyed.sizes[surveyed.ranks < held_out].sum())
    gap = abs(held - target)
    if gap <= slack:
        return (), None
    ranks, inverse, copies = np.unique(surveyed.ranks, return_inverse=True, return_counts=True)
    sizes = np.bincount(inverse, surveyed.sizes)  # of all copies
    single = np.full(len(ranks), np.iinfo(np.int64).max)
    np.minimum.at(single, inverse, surveyed.sizes)
    too_much = held > target
    rest = np.flatnonzero((ranks < held_out) == too_much)  # those from which the difference can be taken
    moved: list[float] = []
    left = gap
    for i in rest[np.argsort(np.abs(ranks[rest] - held_out), kind="stable")].tolist():
        if left <= slack:
            break
        if sizes[i] <= left + slack:
            moved.append(float(ranks[i]))
            left -= sizes[i]
    if left <= slack:
        return tuple(moved), None
    cut = _longest(rest[sizes[rest] > gap], single)
    if cut is not None:  # then nothing need be moved
        moved = []
    else:
        gap, rest = left, rest[~np.isin(ranks[rest], moved)]
        cut = _longest(rest, single)  # all of them are longer than the gap
    if cut is None:
        smallest = rest[np.argmin(sizes[rest])]
        one_sided = not moved and len(rest) == len(ranks)
        if len(rest) > 1 and (one_sided or sizes[smallest] < 2 * gap):
            moved.append(float(ranks[smallest]))
        elif one_sided:
            return None
        return tuple(moved), None
    part = round(gap / copies[cut])
    n_bytes = min(max(part if too_much else int(single[cut]) - part, 1), int(single[cut]) - 1)
    return tuple(moved), _WantedCut(float(ranks[cut]), n_bytes, int(single[cut]), int(slack / copies[cut]))


def _longest(among: np.ndarray, single: np.ndarray) -> int | None:
    among = among[single[among] >= LEAST_TO_CUT]
    return int(among[np.argmax(single[among])]) if len(among) else None


def _place(documents: Documents, which: np.ndarray, wanted: _WantedCut) -> int:
    """Return how many bytes of a document come before its cut.

    That is at the line's end nearest to what is wanted, where there is one within the slack; else at a word's end, else
    between two characters.

    Args:
        documents: to be read.
        which: (n_documents,) bool; the first of these is the one.
        wanted: where, and how far from there at most.
    """
    slack = min(wanted.slack, _WINDOW)
    low, high = max(wanted.n_bytes - slack, 1), min(wanted.n_bytes + slack, wanted.size - 1)
    begin = max(low - 4, 0)  # a character has at most four bytes
    window = b"".join(_bytes_of(documents, int(np.argmax(which)), begin, high + 4))

    def nearest(places: Iterator[int]) -> int | None:
        return min((p for p in places if low <= p <= high), key=lambda p: abs(p - wanted.n_bytes), default=None)

    for pattern in (_LINE_END, _WORD_END):
        place = nearest(begin + match.end() for match in pattern.finditer(window))
        if place is not None:
            return place
    place = wanted.n_bytes
    while place > begin and window[place - begin : place - begin + 1] and window[place - begin] & 0xC0 == 0x80:
        place -= 1  # the bytes of a character after its first
    while place - begin < len(window) and (place == 0 or window[place - begin] & 0xC0 == 0x80):
        place += 1
    return place


def _bytes_of(documents: Documents, which: int, begin: int, end: int) -> Iterator[bytes]:
    """Yield bytes ``begin`` to ``end`` of one document."""
    number = position = 0
    for text, ends in documents.pieces():
        if number == which:
            content = text.encode()
            yield content[max(begin - position, 0) : max(end - position, 0)]
            position += len(content)
            if position >= end:
                return
        number += ends
        if number > which:
            return


# --- pieces ---------------------------------------------------------------------------------------------------


def _by_document(documents: Documents, in_validation: np.ndarray, in_both: np.ndarray, n_bytes: int) -> Parted:
    i = position = 0
    for text, ends in documents.pieces():
        if i == len(in_validation):
            raise _changed(documents)
        if in_both[i]:
            content = text.encode()
            head = content[: max(n_bytes - position, 0)].decode(errors="ignore")
            position += len(content)
            if head:
                yield head, ends or position >= n_bytes, 0
            if len(head) < len(text):
                yield text[len(head) :], ends, 1
        else:
            yield text, ends, int(in_validation[i])
        if ends:
            i, position = i + 1, 0
    if i < len(in_validation):
        raise _changed(documents)


def _changed(documents: Documents) -> GptlabError:
    return GptlabError(f"the files of {documents.name} were changed while they were read; run the same command again")
