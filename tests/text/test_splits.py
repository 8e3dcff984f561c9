"""Who is held out: the same documents as ever, whatever else is in the corpus and however it is read."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptlab.errors import GptlabError
from gptlab.text.documents import Documents, documents_of, open_documents
from gptlab.text.pieces import Piece, in_pieces
from gptlab.text.splits import Division, divide, divide_alike, survey

TEXTS = tuple(f"document {i}\n" for i in range(300))


def judge(documents: Sequence[str], held_out: float) -> tuple[list[str], list[str]] | None:
    """The rule as it was first written, on texts in memory; None where there is too little text."""

    def rank(document: str) -> float:
        return int.from_bytes(hashlib.sha256(document.encode()).digest()[:8], "big") / 2**64

    if len(documents) == 1:
        text = documents[0]
        cut = text.rfind("\n", 0, int(len(text) * (1 - held_out))) + 1
        parts = ([text[:cut]], [text[cut:]])
        return parts if text[:cut] and text[cut:] else None
    ranked = sorted(set(documents), key=rank)
    limit = sum(rank(document) < held_out for document in ranked)
    limit = min(max(limit, 1), len(ranked) - 1)
    chosen = set(ranked[:limit])
    parts = ([d for d in documents if d not in chosen], [d for d in documents if d in chosen])
    return parts if parts[0] and parts[1] else None


def halves(division: Division) -> tuple[list[str], list[str]]:
    parts: tuple[list[str], list[str]] = ([], [])
    text: list[str] = []
    sides = set()
    for piece, ends, side in division.parted():
        text.append(piece)
        sides.add(side)
        if ends:
            assert len(sides) == 1, "a document is on both sides"
            parts[side].append("".join(text))
            text, sides = [], set()
    assert not text, "the last document does not end"
    return parts


def split(documents: Documents, held_out: float) -> tuple[list[str], list[str]]:
    return halves(divide(documents, survey(documents), held_out))


def cut_small(texts: Sequence[str], size: int) -> Documents:
    def read() -> list[Piece]:
        return [piece for text in texts for piece in in_pieces(text, size)]

    return Documents("small", False, (lambda: iter(read()),))


shares = st.sampled_from([1e-9, 0.01, 0.1, 0.3, 0.5, 0.9, 0.999999])
lines = st.lists(st.sampled_from(["a", "bc", "\n", "\n", "é🌹", " "]), min_size=1, max_size=60).map("".join)


@settings(max_examples=200, derandomize=True, deadline=None, database=None)
@given(texts=st.lists(lines, min_size=1, max_size=12), held_out=shares, size=st.integers(1, 80))
def test_the_split_is_the_judges(texts: list[str], held_out: float, size: int) -> None:
    expected = judge(texts, held_out)
    documents = cut_small(texts, size)
    if expected is None:
        with pytest.raises(GptlabError, match="the corpus small is too short to hold a part of it out; add text"):
            split(documents, held_out)
    else:
        assert split(documents, held_out) == expected


@settings(max_examples=200, derandomize=True, deadline=None, database=None)
@given(text=lines, held_out=shares, size=st.integers(1, 80))
def test_one_document_is_cut_where_the_judge_cuts_it(text: str, held_out: float, size: int) -> None:
    text = "first\n" + text * 3
    expected = judge([text], held_out)
    if expected is None:
        with pytest.raises(GptlabError, match="too short"):
            split(cut_small([text], size), held_out)
    else:
        assert split(cut_small([text], size), held_out) == expected


def test_wikipedia(shared: Path, tmp_path: Path) -> None:
    path = shared / "data" / "enwiki.txt"
    if not path.exists():
        pytest.skip("shared/data is absent")
    (tmp_path / "enwiki.txt").write_text(path.open(encoding="utf-8").read(5_000_000), encoding="utf-8")
    documents = open_documents([str(tmp_path / "enwiki.txt")])
    for held_out in (0.01, 0.1):
        assert split(documents, held_out) == judge(list(documents), held_out)


def test_names(shared: Path) -> None:
    path = shared / "data" / "names.txt"
    if not path.exists():
        pytest.skip("shared/data is absent")
    documents = open_documents([str(path)], per_line=True)
    assert list(documents) == path.read_text(encoding="utf-8").split()
    assert split(documents, 0.1) == judge(list(documents), 0.1)


def test_added_documents_move_none_to_the_other_side() -> None:
    small, large = split(documents_of("c", TEXTS[:100]), 0.1), split(documents_of("c", TEXTS), 0.1)
    for fewer, more in zip(small, large, strict=True):
        assert set(fewer) < set(more)


def test_what_is_added_is_divided_as_it_would_be_together() -> None:
    found = survey(documents_of("c", TEXTS))
    together = split(documents_of("c", TEXTS), 0.1)
    assert halves(divide_alike(documents_of("c", TEXTS), found, 0.1, None)) == together


@pytest.mark.parametrize("held_out", [1e-9, 0.999999])
def test_a_copy_of_the_exception_joins_it(held_out: float) -> None:
    # With so small a share none would be held out, so one is, against the rule; with so large a share the reverse.
    documents = documents_of("c", TEXTS[:20])
    division = divide(documents, survey(documents), held_out)
    assert division.forced is not None
    parts = halves(division)
    alone = min(parts, key=len)
    assert len(alone) == 1
    more = documents_of("c", [TEXTS[250], *alone])
    added = halves(divide_alike(more, survey(more), held_out, division.forced))
    assert added[parts.index(alone)] == alone
    assert added[1 - parts.index(alone)] == [TEXTS[250]]


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
    found = survey(documents_of("c", texts), rows.append)
    assert (len(found.ranks), found.n_characters, found.n_bytes) == (4, 1_600_000, 3_200_000)
    assert rows[-1] == {"event": "read", "documents": 4, "bytes": 3_200_000}


def test_lone_surrogates_are_refused() -> None:
    with pytest.raises(GptlabError, match=r"lone surrogate \(U\+D800\)"):
        survey(documents_of("c", ["a\ud800"]))
