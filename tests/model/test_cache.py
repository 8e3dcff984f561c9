from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from helpers.models import close, in_chunks, noisy, random_ids
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gptlab import GptlabError
from gptlab.model import PADDING
from gptlab.model.kernels import use

LENGTH = 24
MODEL = noisy(n_layer=3)
KERNELS = ["reference", "sdpa"]


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@st.composite
def ways_to_split(draw: st.DrawFn, length: int) -> list[int]:
    cuts = sorted(draw(st.sets(st.integers(1, length - 1))))
    return [b - a for a, b in zip([0, *cuts], [*cuts, length], strict=True)]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("sizes", [[24], [8, 8, 8], [1, 16, 7], [23, 1], [1] * 24], ids=str)
def test_chunks_give_the_logits_of_the_whole(sizes: list[int], kernel: str) -> None:
    ids = random_ids(MODEL, 2, LENGTH)
    with use(kernel):
        close(in_chunks(MODEL, ids, sizes, MODEL.make_cache(2, LENGTH)), MODEL(ids))


@settings(max_examples=30, deadline=None)
@given(ways_to_split(LENGTH), st.integers(LENGTH, 64))
def test_any_chunks_in_a_cache_of_any_size_give_the_logits_of_the_whole(sizes: list[int], length: int) -> None:
    ids = random_ids(MODEL, 2, LENGTH)
    with torch.no_grad():
        close(in_chunks(MODEL, ids, sizes, MODEL.make_cache(2, length)), MODEL(ids))


# Ragged batches

LEFT = [[-1, -1, -1, 0, 1, 2], [0, 1, 2, 3, 4, 5], [-1, -1, -1, -1, -1, 0]]
RIGHT = [[0, 1, 2, -1, -1, -1], [0, 1, 2, 3, 4, 5], [0, -1, -1, -1, -1, -1]]
INSIDE = [[0, -1, 1, -1, -1, 2], [-1, 0, -1, 1, 2, -1], [0, 1, 2, 3, 4, 5]]
NOTHING = [[-1, -1, -1, -1, -1, -1], [0, 1, -1, 2, 3, -1], [-1, 0, 1, 2, 3, 4]]
PADDED = {"left": LEFT, "right": RIGHT, "inside": INSIDE, "a row of nothing": NOTHING}


def rows_alone(ids: Tensor, positions: Tensor, more: Tensor) -> list[Tensor]:
    """The logits of each row's real tokens, followed by ``more``, without padding, batch or cache."""
    return [
        MODEL(torch.cat([row[at != PADDING], rest])[None])[0]
        for row, at, rest in zip(ids, positions, more, strict=True)
    ]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("padding", PADDED)
@pytest.mark.parametrize("steps", [[1, 1, 1, 1, 1], [5], [2, 3]], ids=str)
def test_padded_rows_go_on_as_each_alone(padding: str, steps: list[int], kernel: str) -> None:
    positions = torch.tensor(PADDED[padding])
    ids, more = random_ids(MODEL, 3, 6), random_ids(MODEL, 3, 5, seed=1)
    cache = MODEL.make_cache(3, 11)
    with use(kernel):
        prefill = MODEL(ids, positions=positions, cache=cache)
        decoded = in_chunks(MODEL, more, steps, cache)
        for row, alone in enumerate(rows_alone(ids, positions, more)):
            real = positions[row] != PADDING
            close(torch.cat([prefill[row, real], decoded[row]]), alone)


@pytest.mark.parametrize("padding", PADDED)
def test_padding_in_a_later_chunk_is_stepped_around_too(padding: str) -> None:
    # First three plain tokens, then a ragged chunk, then one more token a row.
    start, ids, more = random_ids(MODEL, 3, 3), random_ids(MODEL, 3, 6, seed=1), random_ids(MODEL, 3, 1, seed=2)
    positions = torch.tensor(PADDED[padding])
    later = torch.where(positions == PADDING, PADDING, positions + 3)
    cache = MODEL.make_cache(3, 10)
    first = MODEL(start, cache=cache)
    second = MODEL(ids, positions=later, cache=cache)
    third = MODEL(more, cache=cache)
    for row in range(3):
        real = positions[row] != PADDING
        alone = MODEL(torch.cat([start[row], ids[row, real], more[row]])[None])[0]
        close(torch.cat([first[row], second[row, real], third[row]]), alone)


@pytest.mark.parametrize("padding", PADDED)
def test_what_stands_in_the_padding_does_not_matter(padding: str) -> None:
    positions = torch.tensor(PADDED[padding])
    ids, more = random_ids(MODEL, 3, 6), random_ids(MODEL, 3, 2, seed=1)
    other = torch.where(positions == PADDING, (ids + 1) % 256, ids)
    outputs = []
    for variant in (ids, other):
        cache = MODEL.make_cache(3, 8)
        logits = MODEL(variant, positions=positions, cache=cache)
        outputs.append(torch.cat([logits[positions != PADDING], MODEL(more, cache=cache).flatten(0, 1)]))
    assert not torch.equal(ids, other)
    assert torch.equal(*outputs)


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_any_padding_in_any_chunks_gives_each_row_as_alone(data: st.DataObject) -> None:
    batch, n_chunks = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 4))
    real = [
        torch.tensor(
            data.draw(st.lists(st.lists(st.booleans(), min_size=n, max_size=n), min_size=batch, max_size=batch))
        )
        for n in data.draw(st.lists(st.integers(1, 6), min_size=n_chunks, max_size=n_chunks))
    ]
    ids = random_ids(MODEL, batch, sum(chunk.shape[1] for chunk in real))
    whole = torch.cat(real, 1)
    positions = torch.where(whole, whole.cumsum(1) - 1, PADDING)
    cache = MODEL.make_cache(batch, ids.shape[1])
    parts, at = [], 0
    with torch.no_grad():
        for chunk in real:
            here = slice(at, at := at + chunk.shape[1])
            parts.append(MODEL(ids[:, here], positions=positions[:, here], cache=cache))
        logits = torch.cat(parts, 1)
        assert torch.isfinite(logits).all()
        for row in range(batch):
            if whole[row].any():
                close(logits[row, whole[row]], MODEL(ids[row, whole[row]][None])[0])
    for layer in cache.layers:
        assert torch.equal(layer.counts, whole.sum(1))


# Keeping some rows


@pytest.mark.parametrize("rows", [[0], [2], [0, 2], [2, 0, 1], [1, 1, 2]], ids=str)
@pytest.mark.parametrize("positions", [None, torch.tensor(LEFT), torch.tensor(INSIDE)], ids=["plain", "left", "inside"])
def test_kept_rows_go_on_as_they_would_have(rows: list[int], positions: Tensor | None) -> None:
    ids, more = random_ids(MODEL, 3, 6), random_ids(MODEL, 3, 2, seed=1)
    caches = [MODEL.make_cache(3, 8) for _ in range(2)]
    for cache in caches:
        MODEL(ids, positions=positions, cache=cache)
    expected = in_chunks(MODEL, more, [1, 1], caches[0])[rows]
    caches[1].keep(rows)
    close(in_chunks(MODEL, more[rows], [1, 1], caches[1]), expected)


def test_keeping_the_short_rows_makes_room() -> None:
    ids = random_ids(MODEL, 3, 6)
    cache = MODEL.make_cache(3, 6)
    MODEL(ids, positions=torch.tensor(LEFT), cache=cache)
    cache.keep([0, 2])  # of three tokens and one
    more = random_ids(MODEL, 2, 3, seed=1)
    decoded = MODEL(more, cache=cache)
    close(decoded[0], MODEL(torch.cat([ids[0, 3:], more[0]])[None])[0, -3:])
    close(decoded[1], MODEL(torch.cat([ids[2, 5:], more[1]])[None])[0, -3:])


# Going back


@pytest.mark.parametrize("positions", [None, torch.tensor(LEFT), torch.tensor(RIGHT)], ids=["plain", "left", "right"])
@pytest.mark.parametrize("sizes", [[4], [1, 1, 1, 1], [1, 3]], ids=str)
def test_after_truncation_it_is_as_if_one_had_never_gone_there(positions: Tensor | None, sizes: list[int]) -> None:
    ids, astray, more = (random_ids(MODEL, 3, n, seed=n) for n in (6, 4, 3))
    straight, back = MODEL.make_cache(3, 10), MODEL.make_cache(3, 10)
    for cache in (straight, back):
        MODEL(ids, positions=positions, cache=cache)
    in_chunks(MODEL, astray, sizes, back)
    back.truncate(4)
    for one, other in zip(straight.layers, back.layers, strict=True):
        assert torch.equal(one.positions, other.positions)
        assert torch.equal(one.counts, other.counts)
        assert one.seen == other.seen
        assert one.used == other.used
    assert torch.equal(MODEL(more, cache=back), MODEL(more, cache=straight))


def test_truncation_takes_back_tokens_of_the_first_chunk_too() -> None:
    ids = random_ids(MODEL, 2, 12)
    cache = MODEL.make_cache(2, 12)
    MODEL(ids, cache=cache)
    cache.truncate(5)
    close(MODEL(ids[:, 7:], cache=cache), MODEL(ids)[:, 7:])


@pytest.mark.parametrize("n", [6, 7, 100])
def test_truncating_everything_leaves_an_empty_cache(n: int) -> None:
    ids = random_ids(MODEL, 3, 6)
    cache = MODEL.make_cache(3, 6)
    MODEL(ids, positions=torch.tensor(LEFT), cache=cache)
    cache.truncate(n)
    other = random_ids(MODEL, 3, 6, seed=1)
    close(MODEL(other, cache=cache), MODEL(other))


# Refusals


def test_a_full_cache_says_so_and_stays_as_it_was() -> None:
    ids = random_ids(MODEL, 2, 8)
    cache = MODEL.make_cache(2, 8)
    MODEL(ids[:, :6], cache=cache)
    with pytest.raises(GptlabError, match="the cache has 8 slots and 6 are used: no room for 3 more tokens"):
        MODEL(random_ids(MODEL, 2, 3), cache=cache)
    close(MODEL(ids[:, 6:], cache=cache), MODEL(ids)[:, 6:])


def test_documents_and_a_cache_are_refused_together_and_the_cache_stays_as_it_was() -> None:
    ids = random_ids(MODEL, 2, 8)
    cache = MODEL.make_cache(2, 8)
    for positions in (None, torch.arange(8).expand(2, -1)):
        with pytest.raises(GptlabError, match="documents= and cache= cannot be combined"):
            MODEL(ids, positions=positions, documents=torch.zeros_like(ids), cache=cache)
    close(MODEL(ids, cache=cache), MODEL(ids))


# What it holds


def test_the_cache_has_the_dtype_of_the_weights_unless_asked() -> None:
    assert {layer.k.dtype for layer in MODEL.make_cache(1, 4).layers} == {torch.float32}
    assert {layer.v.dtype for layer in noisy().bfloat16().make_cache(1, 4).layers} == {torch.bfloat16}
    assert {layer.k.dtype for layer in MODEL.make_cache(1, 4, dtype=torch.float16).layers} == {torch.float16}


def test_a_cache_of_low_precision_rounds_keys_and_values_only() -> None:
    ids = random_ids(MODEL, 2, LENGTH)
    whole = MODEL(ids)
    actual = in_chunks(MODEL, ids, [8] * 3, MODEL.make_cache(2, LENGTH, dtype=torch.bfloat16))
    assert actual.dtype == torch.float32
    assert not torch.equal(actual, whole)
    assert (actual - whole).norm() / whole.norm() < 0.01  # bfloat16 rounds by 2^-9


def test_nbytes_counts_keys_and_values() -> None:
    cache = MODEL.make_cache(2, 10)
    assert cache.nbytes == sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.k, layer.v))
    assert len(cache.layers) == 3
    assert cache.layers[0].capacity == 10
