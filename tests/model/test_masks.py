from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gptlab.model import PADDING, Tokens, Visibility
from gptlab.model.cache import Full


@st.composite
def tokens(draw: st.DrawFn, batch: int, with_documents: bool) -> Tokens:
    n = draw(st.integers(1, 8))
    row = st.lists(st.integers(PADDING, 9), min_size=n, max_size=n)
    positions = torch.tensor(draw(st.lists(row, min_size=batch, max_size=batch)))
    documents = torch.tensor(
        draw(st.lists(st.lists(st.integers(0, 2), min_size=n, max_size=n), min_size=batch, max_size=batch))
    )
    return Tokens(positions, documents if with_documents else None)


@given(st.data(), st.booleans())
def test_every_query_among_its_own_keys_sees_at_least_one(data: st.DataObject, with_documents: bool) -> None:
    queries = data.draw(tokens(2, with_documents))
    assert Visibility().visible(queries, queries).any(-1).all()


def plain(length: int, start: int = 0, batch: int = 2) -> Tokens:
    return Tokens(torch.arange(start, start + length).expand(batch, -1), plain=True)


def test_a_whole_sequence_is_the_lower_triangle() -> None:
    queries = plain(7)
    assert Visibility().shape(queries, queries) == "causal"
    assert torch.equal(Visibility().visible(queries, queries), torch.ones(2, 7, 7).tril().bool())


def test_one_new_token_sees_all_that_the_cache_holds() -> None:
    assert Visibility().shape(plain(1, start=6), plain(7)) == "everything"
    assert Visibility().visible(plain(1, start=6), plain(7)).all()


@pytest.mark.parametrize(
    ("queries", "keys"),
    [
        (plain(3, start=4), plain(7)),
        (Tokens(torch.tensor([[6]])), plain(7, batch=1)),
        (plain(1, start=6, batch=1), Tokens(torch.arange(7)[None])),
        (Tokens(torch.arange(7)[None]), Tokens(torch.arange(7)[None])),
    ],
    ids=["a chunk", "a query that may be padding", "keys that may be empty", "nothing known"],
)
def test_no_other_shape_is_known_without_looking(queries: Tokens, keys: Tokens) -> None:
    assert Visibility().shape(queries, keys) is None


@given(
    chunks=st.lists(st.integers(1, 5), min_size=1, max_size=6),
    known=st.lists(st.booleans(), min_size=6, max_size=6),
    truncated=st.lists(st.integers(0, 3), min_size=6, max_size=6),
)
def test_a_shape_that_is_named_is_what_visible_says(chunks: list[int], known: list[bool], truncated: list[int]) -> None:
    # The queries and keys that a cache really hands out, chunk after chunk.
    cache = Full(2, 1, sum(chunks), 1, torch.float32, torch.device("cpu"))
    for n, is_known, back in zip(chunks, known, truncated, strict=False):
        first = int(cache.counts[0])
        queries = Tokens(torch.arange(first, first + n).expand(2, -1), plain=is_known)
        kv = torch.zeros(2, 1, n, 1)
        _, _, keys = cache.append(kv, kv, queries)
        visible = Visibility().visible(queries, keys)
        shape = Visibility().shape(queries, keys)
        if shape == "causal":
            assert torch.equal(visible, torch.ones_like(visible).tril())
            assert visible.shape[1] == visible.shape[2]
        elif shape == "everything":
            assert visible.all()
        else:
            assert not is_known or n > 1 or not all(known[: len(chunks)])
        cache.truncate(back)


@pytest.mark.parametrize("length", [1, 17, 1024])
def test_full_attention_needs_a_slot_for_every_token(length: int) -> None:
    assert Visibility().capacity(length, 1) == length
    assert Visibility().capacity(length, 512) == length
