"""Who is held out: the share that was asked for, every text once, equal texts together, whatever the lengths are."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptlab.errors import GptlabError
from gptlab.text.documents import Documents, documents_of, open_documents
from gptlab.text.segmentation import Piece, in_pieces
from gptlab.text.splits import LEAST_TO_CUT, TOLERANCE, Division, Rule, Survey, _plan, divide, divide_alike, survey

TEXTS = tuple(f"document {i}\n" for i in range(300))
many = settings(max_examples=200, derandomize=True, deadline=None, database=None)


def rank(document: str) -> float:
    """As it was first written down; data prepared then are on disk."""
    return int.from_bytes(hashlib.sha256(document.encode()).digest()[:8], "big") / 2**64


def sides(division: Division) -> list[tuple[str, int]]:
    """Each document or part of one, with its side."""
    parts: list[tuple[str, int]] = []
    text: list[str] = []
    on: set[int] = set()
    for piece, ends, side in division.parted():
        text.append(piece)
        on.add(side)
        if ends:
            assert len(on) == 1, "a document is on both sides"
            parts.append(("".join(text), side))
            text, on = [], set()
    assert not text, "the last document does not end"
    return parts


def halves(division: Division) -> tuple[list[str], list[str]]:
    parts = sides(division)
    return [text for text, side in parts if not side], [text for text, side in parts if side]


def split(documents: Documents, held_out: float) -> tuple[list[str], list[str]]:
    return halves(divide(documents, survey(documents), held_out))


def share(parts: tuple[list[str], list[str]]) -> float:
    training, validation = (sum(len(text.encode()) for text in part) for part in parts)
    return validation / (training + validation)


def in_small_pieces(texts: Sequence[str], size: int, *, items: bool = False) -> Documents:
    def read() -> list[Piece]:
        return [piece for text in texts for piece in in_pieces(text, size)]

    return Documents("small", items, (lambda: iter(read()),))


shares = st.sampled_from([1e-9, 0.01, 0.05, 0.1, 0.3, 0.5, 0.9, 0.999999])
lines = st.lists(st.sampled_from(["a", "bc", "\n", "é🌹", "word ", "longer words\n"]), min_size=1, max_size=20)
bodies = st.tuples(lines.map("".join), st.sampled_from([1, 1, 1, 10, 100])).map(lambda t: t[0] * t[1])


@many
@given(texts=st.lists(bodies, min_size=1, max_size=12), held_out=shares, size=st.integers(1, 80))
def test_every_text_is_there_once_and_the_share_is_that_asked_for(texts: list[str], held_out: float, size: int) -> None:
    documents = in_small_pieces(texts, size)
    if len({text.rstrip(" \n") for text in texts}) == 1 and min(len(text.encode()) for text in texts) < LEAST_TO_CUT:
        # One document only, in copies, and that too short to be cut.
        with pytest.raises(GptlabError, match="too short to hold a part of it out"):
            divide(documents, survey(documents), held_out)
        return
    parts = sides(divide(documents, survey(documents), held_out))
    left = list(parts)
    for text in texts:
        part, side = left.pop(0)
        if part != text:  # the beginning is trained on, the end held out
            assert side == 0
            tail, other = left.pop(0)
            assert (part + tail, other) == (text, 1)
            assert len(text.encode()) >= LEAST_TO_CUT
        assert part
    assert not left
    total = sum(len(text.encode()) for text in texts)
    held = sum(len(text.encode()) for text, side in parts if side)
    assert 0 < held < total
    copies = max(sum(other.rstrip() == text.rstrip() for other in texts) for text in texts)
    allowed = TOLERANCE * min(held_out, 1 - held_out) * total
    assert abs(held - held_out * total) <= max(allowed, LEAST_TO_CUT * copies)
    if min(len(text.encode()) for text in texts) >= LEAST_TO_CUT:
        assert abs(held - held_out * total) <= allowed + 5 * copies  # a character has up to four bytes


@many
@given(
    sizes=st.lists(st.one_of(st.integers(1, 300), st.integers(1, 10**12)), min_size=1, max_size=40),
    seed=st.integers(0, 2**32 - 1),
    held_out=st.one_of(shares, st.floats(1e-6, 1 - 1e-6)),
)
def test_any_lengths(sizes: list[int], seed: int, held_out: float) -> None:
    ranks = np.random.default_rng(seed).random(len(sizes))
    n_bytes = np.array(sizes, np.int64)
    plan = _plan(Survey(ranks, n_bytes), held_out)
    if plan is None:
        assert len(sizes) == 1
        assert sizes[0] < LEAST_TO_CUT
        return
    moved, cut = plan
    in_validation = (ranks < held_out) ^ np.isin(ranks, moved)
    held = int(n_bytes[in_validation].sum())
    if cut is not None:
        (which,) = np.flatnonzero(ranks == cut.rank)
        assert which not in np.flatnonzero(np.isin(ranks, moved))
        assert 0 < cut.n_bytes < sizes[which] == cut.size
        held += (0 if in_validation[which] else sizes[which]) - cut.n_bytes
    total = sum(sizes)
    assert 0 < held < total
    allowed = TOLERANCE * min(held_out, 1 - held_out) * total
    assert abs(held - held_out * total) <= max(allowed, LEAST_TO_CUT if min(sizes) < LEAST_TO_CUT else 1)


LONG = "a line of some words, as long as lines are in a text\n"


@pytest.mark.parametrize(
    ("texts", "held_out"),
    [
        (["A title\n", LONG.replace("\n", " ") * 400], 0.01),
        (["one long line " * 700, "another long line " * 700], 0.1),
        ([LONG * 20_000, "a note\n" * 100], 0.05),
        ([LONG * 20_000, "another note\n" * 100], 0.05),
        (["".join("abcdefghij klmnop qrst"[i * 7 % 22] for i in range(364_000))], 0.01),
        (["acgt" * 91_000], 0.01),
        (["a note\n", "word " * 3000, "word " * 3000], 0.1),
        ([LONG * n for n in (1, 2, 4, 8, 16, 1000)], 0.1),
        ([f"{i} {LONG}" * 2000 if i == 7 else f"{i}\n" for i in range(2000)], 0.01),
    ],
    ids=["title", "two lines", "book", "book again", "one line", "genome", "copies", "powers", "one of many"],
)
@pytest.mark.parametrize("items", [False, True])
def test_the_share_where_documents_are_of_very_different_lengths(
    texts: list[str], held_out: float, items: bool
) -> None:
    assert share(split(documents_of("c", texts, items=items), held_out)) == pytest.approx(held_out, rel=TOLERANCE)


def test_validation_is_the_end_of_the_longest_document_from_a_line_on() -> None:
    book = "".join(f"{i} {LONG}" for i in range(1000))
    training, validation = split(documents_of("c", ["a note\n", book, "two notes\n"]), 0.05)
    assert book.endswith(validation[-1])
    assert validation[-1].split()[0].isdecimal()
    assert training[0] in ("a note\n", book.removesuffix(validation[-1]))


def test_no_character_is_cut() -> None:
    text = "🌹" * 1000
    training, validation = split(documents_of("c", [text]), 0.1003)
    assert training[0] + validation[0] == text
    assert set(training[0] + validation[0]) == {"🌹"}


def test_white_space_at_the_end_makes_no_different_document() -> None:
    texts = [f"document {i}\nof lines" for i in range(1200)]
    both = texts + [f"{text}\n" for text in texts] + [f"{text} \n\n" for text in texts[:9]]
    training, validation = split(documents_of("c", both), 0.1)
    assert len(validation) > 200
    assert not {text.rstrip() for text in validation} & {text.rstrip() for text in training}


@pytest.mark.parametrize("long", [False, True])
def test_both_forms_of_the_document_that_is_cut(long: bool) -> None:
    text = LONG.strip() * (4000 if long else 100)
    training, validation = split(documents_of("c", [text, "short\n", text + "\n"]), 0.1)
    heads, tails = ([t for t in part if len(t) > 10] for part in (training, validation))
    assert (len(heads), len(tails)) == (2, 2)
    assert heads[0] == heads[1]
    assert tails[1] == tails[0] + "\n"


def test_who_is_held_out_stays_so_from_version_to_version() -> None:
    # Files end in a newline, lines of a list have none: these ranks are those of the first version.
    texts = [f"document {i}\n" for i in range(4000)]
    names = [f"name{i}" for i in range(4000)]
    assert split(documents_of("c", texts), 0.1)[1] == [text for text in texts if rank(text) < 0.1]
    assert split(documents_of("c", names, items=True), 0.1)[1] == [name for name in names if rank(name) < 0.1]
    surveyed = survey(documents_of("c", ["a", "a\n", "b \n"]), exact=True)
    assert surveyed.ranks.tolist() == [rank("a"), rank("a\n"), rank("b \n")]


def test_wikipedia(shared: Path, tmp_path: Path) -> None:
    path = shared / "data" / "enwiki.txt"
    if not path.exists():
        pytest.skip("shared/data is absent")
    (tmp_path / "enwiki.txt").write_text(path.open(encoding="utf-8").read(5_000_000), encoding="utf-8")
    documents = open_documents([str(tmp_path / "enwiki.txt")])
    for held_out in (0.01, 0.1):
        parts = split(documents, held_out)
        assert share(parts) == pytest.approx(held_out, rel=TOLERANCE)
        assert sorted("".join(parts[0] + parts[1])) == sorted("".join(documents))


def test_names(shared: Path) -> None:
    path = shared / "data" / "names.txt"
    if not path.exists():
        pytest.skip("shared/data is absent")
    documents = open_documents([str(path)], per_line=True)
    names = path.read_text(encoding="utf-8").split()
    assert list(documents) == names
    assert split(documents, 0.1) == (
        [name for name in names if rank(name) >= 0.1],
        [name for name in names if rank(name) < 0.1],
    )


def test_added_documents_move_none_to_the_other_side() -> None:
    texts = [f"document {i}\n" for i in range(6000)]
    small, large = split(documents_of("c", texts[:2000]), 0.1), split(documents_of("c", texts), 0.1)
    for fewer, more in zip(small, large, strict=True):
        assert set(fewer) < set(more)


@pytest.mark.parametrize("held_out", [1e-9, 0.999999])
def test_a_copy_of_an_exception_joins_it(held_out: float) -> None:
    # With so small a share none would be held out, so one is, against the rule; with so large a share the reverse.
    documents = documents_of("c", TEXTS[:20])
    division = divide(documents, survey(documents), held_out)
    assert len(division.rule.moved) == 1
    parts = halves(division)
    alone = min(parts, key=len)
    assert len(alone) == 1
    more = documents_of("c", [TEXTS[250], *alone])
    added = halves(divide_alike(more, survey(more), division.rule))
    assert added[parts.index(alone)] == alone
    assert added[1 - parts.index(alone)] == [TEXTS[250]]


def test_a_copy_of_the_document_that_was_cut_is_cut_alike() -> None:
    book = "".join(f"{i} {LONG}" for i in range(100))
    documents = documents_of("c", [book, "a note\n"])
    division = divide(documents, survey(documents), 0.1)
    more = documents_of("c", [book.rstrip()])
    training, validation = halves(divide_alike(more, survey(more), division.rule))
    assert training[0] in halves(division)[0]
    assert validation[0] + "\n" in halves(division)[1]


def test_files_that_change_while_they_are_read_are_noticed(tmp_path: Path) -> None:
    for later in ("a\n<|endoftext|>\nb", "a\n<|endoftext|>\nb\n<|endoftext|>\nc\n<|endoftext|>\nd"):
        (tmp_path / "a.txt").write_text("a\n<|endoftext|>\nb\n<|endoftext|>\nc")
        documents = open_documents([str(tmp_path / "a.txt")])
        division = divide(documents, survey(documents), 0.5)
        (tmp_path / "a.txt").write_text(later)
        with pytest.raises(GptlabError, match="the files of a were changed while they were read"):
            halves(division)


def test_a_survey_counts_and_reports() -> None:
    rows: list[dict[str, object]] = []
    texts = ["é" * 400_000] * 4
    surveyed = survey(documents_of("c", texts), rows.append)
    assert (surveyed.sizes.tolist(), surveyed.n_bytes) == ([800_000] * 4, 3_200_000)
    assert rows[-1] == {"event": "read", "documents": 4, "bytes": 3_200_000}


def test_a_rule_that_holds_nothing_out() -> None:
    documents = documents_of("c", TEXTS)
    assert halves(divide_alike(documents, survey(documents), Rule(0.0))) == (list(TEXTS), [])


def test_lone_surrogates_are_refused() -> None:
    with pytest.raises(GptlabError, match=r"lone surrogate \(U\+D800\)"):
        survey(documents_of("c", ["a\ud800"]))
