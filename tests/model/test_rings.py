"""The caches of models with windows, grouped queries and rotary positions: every way to read gives the same logits."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers.models import close, in_chunks, noisy, random_ids
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gptlab import GptlabError
from gptlab.model import GPT, PADDING, Cache
from gptlab.model.cache import Full, Ring
from gptlab.model.kernels import KERNELS, use

LENGTH = 60
WINDOWS: list[dict[str, Any]] = [
    {"window": window, "sinks": sinks, "dilation": dilation}
    for window, sinks, dilation in itertools.product([4, (3, 5), (4, None)], [0, 3], [1, 2])
]
WINDOWS += [{}, {"window": (4, 3), "sinks": 2, "dilation": (1, 3)}, {"window": 1}, {"window": 1, "sinks": 1}]


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def left_padded(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    longest = max(map(len, rows))
    ids, positions = torch.zeros(2, len(rows), longest, dtype=torch.int64)
    positions.fill_(PADDING)
    for i, row in enumerate(rows):
        ids[i, longest - len(row) :] = row
        positions[i, longest - len(row) :] = torch.arange(len(row))
    return ids, positions


@pytest.mark.parametrize("position", ["learned", "rope", "none"])
@pytest.mark.parametrize("n_kv_head", [4, 2, 1])
@pytest.mark.parametrize("windows", WINDOWS, ids=str)
def test_whole_chunked_token_by_token_and_padded_are_one_function(
    position: str, n_kv_head: int, windows: dict[str, Any]
) -> None:
    model = noisy(position=position, n_kv_head=n_kv_head, **windows)
    ids = random_ids(model, 2, LENGTH)
    with use("reference"):
        expected = model(ids)
    close(model(ids), expected)
    close(model(ids, cache=model.make_cache(2, LENGTH, chunk=LENGTH)), expected)
    close(in_chunks(model, ids, [4] * 15, model.make_cache(2, LENGTH, chunk=4)), expected)
    close(
        in_chunks(model, ids, [7, 1, 1, 5, 7, 2, 7, 7, 1, 1, 1, 7, 6, 7], cache := model.make_cache(2, 60, chunk=7)),
        expected,
    )
    by_token = model.make_cache(2, LENGTH, chunk=1)
    close(in_chunks(model, ids, [1] * LENGTH, by_token), expected)
    for c in (cache, by_token):
        for layer in c.layers:
            assert isinstance(layer, Ring) == (layer.capacity < LENGTH)
            assert layer.seen == LENGTH  # the shorter rings went round many times
    if windows:
        assert min(layer.capacity for layer in by_token.layers) <= LENGTH / 4

    rows = [ids[0, :23], ids[1, 6:20], ids[0, 30:31]]
    padded, positions = left_padded(rows)
    more = random_ids(model, 3, 20, seed=1)
    cache = model.make_cache(3, 43, chunk=5)
    parts = zip(padded.split(5, dim=1), positions.split(5, dim=1), strict=True)
    prefill = torch.cat([model(part, positions=at, cache=cache) for part, at in parts], 1)
    decoded = in_chunks(model, more, [1, 1, 3, 5, 1, 1, 1, 1, 1, 5], cache)
    for i, row in enumerate(rows):
        with use("reference"):
            alone = model(torch.cat([row, more[i]])[None])[0]
        close(torch.cat([prefill[i, -len(row) :], decoded[i]]), alone)


@pytest.mark.parametrize("kernel", ["reference", "sdpa"])
def test_far_past_the_window_and_the_context_a_ragged_batch_is_each_row_alone(kernel: str) -> None:
    model = noisy(position="rope", n_kv_head=2, n_layer=3, window=(6, 9, 4), sinks=2, dilation=(1, 2, 1))
    rows = [random_ids(model, 1, n, seed=n)[0] for n in (150, 37, 90)]
    padded, positions = left_padded(rows)
    more = random_ids(model, 3, 150, seed=1)
    cache = model.make_cache(3, sys.maxsize, chunk=32)
    with use(kernel):
        parts = zip(padded.split(32, dim=1), positions.split(32, dim=1), strict=True)
        prefill = torch.cat([model(part, positions=at, cache=cache) for part, at in parts], 1)
        decoded = in_chunks(model, more, [1] * 60 + [30] * 3, cache)
    for i, row in enumerate(rows):
        alone = model(torch.cat([row, more[i]])[None])[0]
        close(torch.cat([prefill[i, -len(row) :], decoded[i]]), alone)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_padding_in_any_chunks_of_a_ring_gives_each_row_as_alone(data: st.DataObject) -> None:
    chunk, batch = 6, data.draw(st.integers(1, 3))
    lengths = data.draw(st.lists(st.integers(1, chunk), min_size=1, max_size=12))
    flags = [st.lists(st.lists(st.booleans(), min_size=n, max_size=n), min_size=batch, max_size=batch) for n in lengths]
    whole = torch.cat([torch.tensor(data.draw(flag)) for flag in flags], 1)
    with torch.no_grad():
        ids = random_ids(RAGGED, batch, whole.shape[1])
        positions = torch.where(whole, whole.cumsum(1) - 1, PADDING)
        cache = RAGGED.make_cache(batch, 1000, chunk=chunk)
        parts = zip(ids.split(lengths, dim=1), positions.split(lengths, dim=1), strict=True)
        logits = torch.cat([RAGGED(part, positions=at, cache=cache) for part, at in parts], 1)
        assert torch.isfinite(logits).all()
        for row in range(batch):
            if whole[row].any():
                close(logits[row, whole[row]], RAGGED(ids[row, whole[row]][None])[0])


RAGGED = noisy(position="rope", n_kv_head=2, window=(3, 4), sinks=2, dilation=(2, 1))


# Going back


def start(model: GPT, chunk: int, lengths: list[int]) -> Cache:
    """A cache that has read rows of these lengths, padded on the left where they differ."""
    rows = [random_ids(model, 1, n, seed=n)[0] for n in lengths]
    ids, positions = left_padded(rows)
    cache = model.make_cache(len(rows), 10_000 if model.config.position == "rope" else 64, chunk=chunk)
    if len(set(lengths)) == 1:
        in_chunks(model, ids, [chunk] * (lengths[0] // chunk) + [lengths[0] % chunk] * (lengths[0] % chunk > 0), cache)
    else:
        for part, at in zip(ids.split(chunk, dim=1), positions.split(chunk, dim=1), strict=True):
            model(part, positions=at, cache=cache)
    return cache


@pytest.mark.parametrize("lengths", [[47, 47], [47, 30], [40, 2], [3, 3], [12, 11]], ids=str)
@pytest.mark.parametrize(
    "windows", [{"window": 5}, {"window": (3, None), "sinks": 2}, {"window": 4, "dilation": 2}], ids=str
)
@pytest.mark.parametrize(
    ("astray", "back"), [([4], [4]), ([1, 1, 1, 1], [4]), ([2, 2], [1, 3]), ([3], [3]), ([1], [1])], ids=str
)
def test_after_truncation_of_a_ring_it_is_as_if_one_had_never_gone_there(
    lengths: list[int], windows: dict[str, Any], astray: list[int], back: list[int]
) -> None:
    model = noisy(position="rope", n_kv_head=2, **windows)
    straight, returned = (start(model, 4, lengths) for _ in range(2))
    in_chunks(model, random_ids(model, 2, sum(astray), seed=5), astray, returned)
    for n in back:
        returned.truncate(n)
    for one, other in zip(straight.layers, returned.layers, strict=True):
        assert torch.equal(one.counts, other.counts)
        assert one.seen == other.seen
    more = random_ids(model, 2, 12, seed=6)
    sizes = [1, 4, 1, 1, 4, 1]
    close(in_chunks(model, more, sizes, returned), in_chunks(model, more, sizes, straight), 1e-6)


def test_truncation_may_be_repeated_for_ever_as_speculative_decoding_does() -> None:
    model = noisy(position="rope", window=5, sinks=1)
    ids = random_ids(model, 2, 50)
    cache, logits = model.make_cache(2, 10_000, chunk=4), []
    for t in range(0, 50, 2):  # two right tokens, two wrong ones
        guess = torch.cat([ids[:, t : t + 2], random_ids(model, 2, 2, seed=t)], 1)
        logits.append(model(guess, cache=cache)[:, :2])
        cache.truncate(2)
    close(torch.cat(logits, 1), model(ids))


@pytest.mark.parametrize("window", [5, (None, 5), (5, None)], ids=str)
@pytest.mark.parametrize("steps", [[5], [4, 1], [1, 1, 1, 1, 1], [1000]], ids=str)
@pytest.mark.parametrize("lengths", [[47, 47], [47, 30]], ids=str)
def test_a_ring_refuses_to_go_back_further_than_it_can_and_stays_as_it_was(
    steps: list[int], window: Any, lengths: list[int]
) -> None:
    model = noisy(position="rope", window=window)
    cache, other = (start(model, 4, lengths) for _ in range(2))
    for n in steps[:-1]:
        cache.truncate(n)
        other.truncate(n)
    with pytest.raises(GptlabError, match="this cache can take back its last 4 tokens, in one step or several, not"):
        cache.truncate(steps[-1])
    more = random_ids(model, 2, 4, seed=6)
    assert torch.equal(model(more, cache=cache), model(more, cache=other))


def test_slots_that_padding_took_count_as_gone() -> None:
    # One real token and three of padding: the padding went over the oldest keys.
    model = noisy(position="rope", window=3)
    cache = start(model, 4, [20])
    model(random_ids(model, 1, 4), positions=torch.tensor([[20, -1, -1, -1]]), cache=cache)
    with pytest.raises(GptlabError, match="can take back"):
        cache.truncate(4)
    cache.truncate(1)
    more = random_ids(model, 1, 9, seed=3)
    close(model(more[:, :4], cache=cache), model(more[:, :4], cache=start(model, 4, [20])))


def test_a_ring_that_never_went_round_can_go_back_to_the_beginning() -> None:
    model = noisy(position="rope", window=5, sinks=1)
    cache = start(model, 4, [8])  # 5 + 3 + 1 slots
    cache.truncate(8)
    ids = random_ids(model, 1, 4, seed=9)
    close(model(ids, cache=cache), model(ids))


@pytest.mark.parametrize("rows", [[0], [1], [1, 0], [1, 1, 0]], ids=str)
@pytest.mark.parametrize("lengths", [[47, 47], [47, 6], [6, 30]], ids=str)
def test_kept_rows_of_a_ring_go_on_as_they_would_have(rows: list[int], lengths: list[int]) -> None:
    model = noisy(position="rope", n_kv_head=1, window=(4, None), sinks=1)
    cache, other = (start(model, 4, lengths) for _ in range(2))
    more = random_ids(model, 2, 20, seed=1)
    sizes = [1] * 12 + [4, 4]
    expected = in_chunks(model, more, sizes, cache)[rows]
    other.keep(rows)
    close(in_chunks(model, more[rows][:, :12], [1] * 12, other), expected[:, :12])
    other.truncate(3)
    close(in_chunks(model, more[rows][:, 9:], [3, 4, 4], other), expected[:, 9:])


# Refusals


@pytest.mark.parametrize("window", [5, (None, 5), (5, None)], ids=str)
@pytest.mark.parametrize("explicit", [False, True])
def test_a_chunk_that_is_too_large_is_refused_and_the_cache_stays_as_it_was(window: Any, explicit: bool) -> None:
    model = noisy(position="rope", window=window)
    cache, other = (start(model, 4, [40]) for _ in range(2))
    positions = torch.arange(40, 45)[None] if explicit else None
    with pytest.raises(GptlabError, match="5 tokens at once do not fit this cache's chunks of 4; split them"):
        model(random_ids(model, 1, 5), positions=positions, cache=cache)
    more = random_ids(model, 1, 4, seed=6)
    assert torch.equal(model(more, cache=cache), model(more, cache=other))


@pytest.mark.parametrize("window", [(None, 5), (5, None)], ids=str)
def test_a_full_layer_without_room_refuses_before_a_ring_takes_anything(window: Any) -> None:
    model = noisy(position="rope", window=window)
    ids = random_ids(model, 1, 30)
    cache = model.make_cache(1, 30, chunk=4)
    in_chunks(model, ids[:, :28], [4] * 7, cache)
    with pytest.raises(GptlabError, match="no room for 3 more tokens"):
        model(ids[:, :3], positions=torch.arange(28, 31)[None], cache=cache)
    close(model(ids[:, 28:], cache=cache), model(ids)[:, 28:])


def test_a_ring_does_not_carry_learned_positions_past_their_end() -> None:
    model = noisy(window=5)
    ids = random_ids(model, 1, 64)
    cache = model.make_cache(1, 64, chunk=4)
    close(in_chunks(model, ids, [4] * 16, cache), model(ids))
    with pytest.raises(GptlabError, match="65 tokens exceed the context of 64 learned positions"):
        model(ids[:, :1], cache=cache)


@pytest.mark.parametrize("position", ["rope", "none"])
def test_positions_without_a_table_have_no_last_one(position: str) -> None:
    model = noisy(position=position, window=9)
    ids = random_ids(model, 1, 200)
    expected = model(ids)
    assert torch.isfinite(expected).all()
    close(in_chunks(model, ids, [25] * 8, model.make_cache(1, 200, chunk=25)), expected)


# What it holds


def test_the_memory_of_a_ring_does_not_grow_with_the_length() -> None:
    model = noisy(position="rope", n_kv_head=2, window=8, sinks=3, dilation=(1, 2))
    sizes = {model.make_cache(2, length, chunk=16).nbytes for length in (100, 10_000, 10**9, sys.maxsize)}
    slots = (8 + 15 + 3) + (15 + 15 + 3)
    assert sizes == {2 * 2 * slots * 2 * 8 * 4}  # k and v, batch, slots, key heads, width, bytes
    kinds = [type(layer) for layer in noisy(position="rope", window=(8, None)).make_cache(1, 100, chunk=4).layers]
    assert kinds == [Ring, Full]


def test_a_ring_goes_on_in_the_storage_that_it_began_with() -> None:
    model = noisy(position="rope", window=4, sinks=1)
    cache = model.make_cache(1, sys.maxsize, chunk=2)
    before = [(layer.k.data_ptr(), layer.v.data_ptr(), layer.positions.data_ptr()) for layer in cache.layers]
    for t in range(300):
        model(torch.tensor([[t % 256]]), cache=cache)
    assert before == [(layer.k.data_ptr(), layer.v.data_ptr(), layer.positions.data_ptr()) for layer in cache.layers]
    assert sorted(cache.layers[0].positions[0].tolist()) == [0, 295, 296, 297, 298, 299]


def test_the_ring_of_the_docstring() -> None:
    model = noisy(position="rope", window=3, sinks=1)
    cache = model.make_cache(1, 100, chunk=1)
    in_chunks(model, random_ids(model, 1, 6), [1] * 6, cache)
    assert cache.layers[0].positions.tolist() == [[0, 4, 5, 3]]


def test_a_ring_of_low_precision_is_read_alike_by_every_kernel() -> None:
    model = noisy(position="rope", window=4)
    ids = random_ids(model, 2, LENGTH)
    expected = model(ids)
    for kernel in ("reference", "sdpa", None):
        cache = model.make_cache(2, LENGTH, chunk=20, dtype=torch.bfloat16)
        if kernel is None:
            actual = in_chunks(model, ids, [20] * 3, cache)
        else:
            with use(kernel):
                actual = in_chunks(model, ids, [20] * 3, cache)
        assert (actual - expected).norm() / expected.norm() < 0.01


def test_the_first_chunk_of_a_cached_prompt_is_read_by_banded(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    banded = KERNELS["banded"]
    monkeypatch.setitem(KERNELS, "banded", lambda *args: called.append(args[0].q.shape[2]) or banded(*args))  # type: ignore[func-returns-value]
    model = noisy(position="rope", window=4, sinks=1)
    ids = random_ids(model, 1, LENGTH)
    actual = in_chunks(model, ids, [40, 20], model.make_cache(1, 1000, chunk=40))
    assert called == [40, 40]  # both layers; the second chunk also needs what the cache holds
    with use("reference"):
        close(actual, model(ids))
