"""Cutting documents: where it changes no id, and that nothing of a text is lost on the way."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptlab.text.segmentation import _CUT, Piece, document_pieces, in_pieces, line_pieces
from gptlab.text.tokenizers import END_OF_TEXT, GPT2Tokenizer, Tokenizer, byte_tokenizer, train_bpe

many = settings(max_examples=150, derandomize=True, deadline=None, database=None)

# What engines might class differently, and what GPT-2's pattern treats apart: see the tests of tokenizers.
ODD = (
    *("\x1c", "\x1f", "\x85", "\xa0", "\u1680", "\u180e", "\u2003", "\u200b", "\u2028", "\u3000", "\ufeff"),
    *(" ", "  ", "\t", "\n", "\n\n", " \n", "\v", "\f", "\0", "\x7f", "\xad", "!", "!!", "...", "_", "'", "’"),
    *("'s", "'t", "'re", "'ve", "'m", "'ll", "'d", "'S", "a", "word", "Z9", "7", "42", "é", "e\u0301", "\u0300"),
    *("½", "Ⅷ", "٣", "漢", "ﬁ", "👩‍👩‍👧", "ß", "\U0010ffff", "=", "//", "{}", "0x1f", END_OF_TEXT),
)
texts = st.lists(
    st.one_of(st.sampled_from(ODD), st.text(st.characters(exclude_categories=["Cs"]), max_size=4)), max_size=20
).map("".join)


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    """A vocabulary that holds tokens of every kind of character, so that a wrong cut shows."""
    return train_bpe(
        ["the cat's 42 mats,\n\n  they'll sit!! 漢漢 é é ½½ ...\t\t// {} 0x1f Z9Z9 \u3000\u3000" * 30], 400
    )


@many
@given(text=texts)
def test_no_cut_changes_an_id_of_gpt2(gpt2_tokenizer: GPT2Tokenizer, text: str) -> None:
    whole = gpt2_tokenizer._encoding.encode_ordinary(text)  # tiktoken itself
    for match in _CUT.finditer(text):
        head, tail = text[: match.end()], text[match.end() :]
        assert gpt2_tokenizer.encode(head) + gpt2_tokenizer.encode(tail) == whole


@many
@given(text=texts)
def test_no_cut_changes_an_id_of_a_trained_vocabulary(trained: Tokenizer, text: str) -> None:
    assert trained.splits_as_gpt2
    for match in _CUT.finditer(text):
        head, tail = text[: match.end()], text[match.end() :]
        assert trained.encode(head) + trained.encode(tail) == trained.encode(text)


@many
@given(text=texts, size=st.integers(1, 40))
def test_a_document_is_cut_where_it_may_be_and_never_longer_than_asked(text: str, size: int) -> None:
    pieces = list(in_pieces(text, size))
    assert "".join(piece.text for piece in pieces) == text
    assert [piece.ends for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert all(0 < len(piece.text) <= size for piece in pieces) or text == ""
    harmless = {match.end() for match in _CUT.finditer(text)}
    position = 0
    for piece in pieces[:-1]:
        within = [cut for cut in harmless if position < cut <= position + size]
        position += len(piece.text)
        assert position == (max(within) if within else position)
        assert within or len(piece.text) == size


def test_the_whole_piece_is_searched_for_a_cut() -> None:
    text = "a b" + "c" * 9000 + " d"
    assert [piece.text for piece in in_pieces(text, 9001)] == ["a", " b" + "c" * 8999, "c d"]
    assert [piece.text for piece in in_pieces(text, 9002)] == ["a", " b" + "c" * 9000, " d"]


def judged_documents(text: str) -> list[str]:
    """The rule in one regular expression; blank documents are left out."""
    end = re.compile(rf"{re.escape(END_OF_TEXT)}(?:[ \t]+\n?|\n|\Z)")
    return [part for part in end.split(text) if part.strip()]


def joined(pieces: Iterable[Piece]) -> Iterator[str]:
    parts: list[str] = []
    for piece in pieces:
        parts.append(piece.text)
        if piece.ends:
            yield "".join(parts)
            parts = []
    assert not parts, "the last document does not end"


separated = st.lists(
    st.sampled_from(
        (END_OF_TEXT, END_OF_TEXT, "\n", "\n", "\n", " ", "\t", "a", "bc ", "<|end", "<|endoftext|", "x" * 30)
    )
)


@many
@given(parts=separated, chunk=st.integers(1, 60), size=st.integers(14, 50))
def test_documents_do_not_depend_on_chunks_and_pieces(parts: list[str], chunk: int, size: int) -> None:
    text = "".join(parts)
    chunks = [text[i : i + chunk] for i in range(0, len(text), chunk)]
    pieces = list(document_pieces(chunks, size))
    assert list(joined(pieces)) == judged_documents(text)
    assert all(len(piece.text) <= size for piece in pieces)


@many
@given(parts=separated, chunk=st.integers(1, 60))
def test_lines_do_not_depend_on_chunks(parts: list[str], chunk: int) -> None:
    text = "".join(parts)
    chunks = [text[i : i + chunk] for i in range(0, len(text), chunk)]
    expected = [document for line in text.split("\n") for document in judged_documents(line)]
    assert list(joined(line_pieces(chunks))) == expected


@pytest.mark.parametrize(
    ("text", "documents"),
    [
        ("story<|endoftext|>\nnext", ["story", "next"]),
        ("story\n<|endoftext|> \nnext", ["story\n", "next"]),
        ("one <|endoftext|> two <|endoftext|>", ["one ", "two "]),
        ("one<|endoftext|>\n\nTitle", ["one", "\nTitle"]),
        ("split('<|endoftext|>') and <|endoftext|>: words", ["split('<|endoftext|>') and <|endoftext|>: words"]),
        ("a<|endoftext|>b", ["a<|endoftext|>b"]),
    ],
)
def test_what_ends_a_document(text: str, documents: list[str]) -> None:
    assert list(joined(document_pieces([text]))) == documents
    assert list(joined(document_pieces(text))) == documents  # a character at a time


@pytest.mark.parametrize("kind", ["gpt2", "trained", "bytes"])
def test_a_long_document_encodes_as_its_pieces_do(
    gpt2_tokenizer: GPT2Tokenizer, trained: Tokenizer, shared: Path, kind: str
) -> None:
    path = shared / "data" / "tinyshakespeare.txt"
    if not path.exists():
        pytest.skip("shared/data is absent")
    text = path.read_text(encoding="utf-8")[:300_000]
    tokenizer = {"gpt2": gpt2_tokenizer, "trained": trained, "bytes": byte_tokenizer()}[kind]
    pieces = [piece.text for piece in in_pieces(text, 1000)]
    assert len(pieces) > 290
    assert [i for piece in pieces for i in tokenizer.encode(piece)] == tokenizer.encode(text)
