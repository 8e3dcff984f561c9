"""Sliding windows, sinks, dilation and grouped queries: the rule, and every kernel that computes it."""

from __future__ import annotations

import importlib
import math

import pytest
import torch
from helpers.attention import D, H, assert_agrees, random_case, results
from helpers.models import close
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from gptlab.model import PADDING, Tokens, Visibility
from gptlab.model.cache import Full, Ring
from gptlab.model.kernels import KERNELS, Inputs, attention_weights, reference, select

banded_module = importlib.import_module("gptlab.model.kernels.banded")  # the package's name `banded` is the function
OTHERS = [name for name in KERNELS if name != "reference"]


def may_see(q: int, k: int, rule: Visibility, same_document: bool = True) -> bool:
    """The rule for one query and one key: the window counted key by key from the query back."""
    if q == PADDING:
        return True
    if k == PADDING or k > q or not same_document:
        return False
    if rule.window is None:
        return True
    return k in [q - i * rule.dilation for i in range(rule.window)] or k < rule.sinks


rules = st.builds(Visibility, st.none() | st.integers(1, 9), sinks=st.integers(0, 5), dilation=st.integers(1, 4))
windows = st.builds(Visibility, st.integers(1, 9), sinks=st.integers(0, 5), dilation=st.integers(1, 4))


def brute(rule: Visibility, queries: Tokens, keys: Tokens) -> Tensor:
    """`may_see` of every pair."""
    batch, n_queries = queries.positions.shape
    seen = torch.zeros(batch, n_queries, keys.positions.shape[1], dtype=torch.bool)
    for b in range(batch):
        for i, q in enumerate(queries.positions[b].tolist()):
            for j, k in enumerate(keys.positions[b].tolist()):
                together = queries.documents is None or keys.documents is None
                together = together or bool(queries.documents[b, i] == keys.documents[b, j])
                seen[b, i, j] = may_see(q, k, rule, together)
    return seen


@settings(deadline=None)
@given(st.data(), rules, st.booleans())
def test_visible_is_the_rule_for_every_pair(data: st.DataObject, rule: Visibility, with_documents: bool) -> None:
    batch = data.draw(st.integers(1, 3))

    def some() -> Tokens:
        n = data.draw(st.integers(1, 8))
        row = st.lists(st.integers(PADDING, 30), min_size=n, max_size=n)
        numbers = st.lists(st.integers(0, 2), min_size=n, max_size=n)
        positions, documents = (torch.tensor([data.draw(one) for _ in range(batch)]) for one in (row, numbers))
        return Tokens(positions, documents if with_documents else None)

    queries, keys = some(), some()
    visible = rule.visible(queries, keys)
    assert visible.dtype == torch.bool
    assert torch.equal(visible, brute(rule, queries, keys))


def plain(first: int, end: int) -> Tokens:
    return Tokens(torch.arange(first, end)[None], plain=True)


@pytest.mark.parametrize("sinks", [0, 2])
@pytest.mark.parametrize("dilation", [1, 2, 3])
@pytest.mark.parametrize("window", [None, 1, 2, 5])
def test_a_shape_that_is_named_is_what_visible_says(window: int | None, sinks: int, dilation: int) -> None:
    rule = Visibility(window, sinks if window else 0, dilation if window else 1)
    named = []
    for length in range(1, 14):
        whole = plain(0, length)
        pairs = [(whole, whole), *((plain(start, length), plain(0, length)) for start in range(length))]
        pairs += [(plain(length - 1, length), plain(start, length)) for start in range(length)]  # a ring's keys
        for queries, keys in pairs:
            shape, visible = rule.shape(queries, keys), rule.visible(queries, keys)
            named.append(shape)
            if shape == "causal":
                assert torch.equal(visible, torch.ones_like(visible).tril())
                assert visible.shape[1] == visible.shape[2]
            elif shape == "everything":
                assert visible.all()
    # Short sequences stay within the window, and take the same shortcuts as full attention.
    assert {"causal", "everything"} <= set(named) or (window is not None and dilation > 1)


@settings(max_examples=60, deadline=None)
@given(rule=windows, chunk=st.integers(1, 5), length=st.integers(1, 60), steps=st.lists(st.integers(1, 5), max_size=25))
def test_the_capacity_is_enough_for_every_query_of_every_chunk(
    rule: Visibility, chunk: int, length: int, steps: list[int]
) -> None:
    capacity = rule.capacity(length, chunk)
    assert capacity <= length
    shape = (1, 1, capacity, 1, torch.float32, torch.device("cpu"))
    cache = Ring(*shape, sinks=rule.sinks, chunk=chunk) if capacity < length else Full(*shape)
    first = 0
    for step in steps:
        n = min(step, chunk, length - first)
        if n == 0:
            break
        queries, kv = plain(first, first + n), torch.zeros(1, 1, n, 1)
        _, _, keys = cache.append(kv, kv, queries)
        stored = [p for p in keys.positions[0].tolist() if p != PADDING]
        assert len(stored) == len(set(stored))
        for i in range(first, first + n):  # every key that it may see is there
            assert {k for k in range(i + 1) if may_see(i, k, rule)} <= set(stored)
        first += n


def test_one_slot_less_than_the_capacity_would_lose_a_key() -> None:
    for rule in (Visibility(3), Visibility(3, sinks=2), Visibility(3, dilation=2), Visibility(1, sinks=1)):
        for chunk in (1, 4):
            length, assert_span = 100, (rule.window - 1) * rule.dilation + 1  # type: ignore[operator]
            needed = set()
            for i in range(50, 50 + chunk):  # what one chunk's queries see, and what lies between: a ring has no holes
                near = [k for k in range(i + 1) if may_see(i, k, rule) and k >= rule.sinks]
                needed |= set(range(min(near), i + 1))
            assert rule.span == assert_span
            assert rule.capacity(length, chunk) == len(needed) + rule.sinks
            assert rule.capacity(5, chunk) <= 5


# Kernels


def by_hand(tensors: list[Tensor], rule: Visibility, tokens: Tokens) -> Tensor:
    """Query by query in float64, keys chosen by `may_see`."""
    q, k, v = (t.double() for t in tensors[:3])
    q_sinks = tensors[3].double() if len(tensors) == 4 else q
    seen = brute(rule, tokens, tokens)
    rows = []
    for b in range(q.shape[0]):
        for h in range(H):
            g = h // (H // k.shape[1])
            for i in range(q.shape[2]):
                keys = seen[b, i].nonzero()[:, 0].tolist()
                scores = [k[b, g, j] @ (q_sinks if j < rule.sinks else q)[b, h, i] / math.sqrt(D) for j in keys]
                rows.append(torch.softmax(torch.stack(scores), 0) @ v[b, g, keys])
    return torch.stack(rows).view_as(q)


W = 5
LENGTHS = [1, W - 1, W, W + 1, 2 * W, 23]


@pytest.mark.parametrize("n_kv_head", [6, 2, 1])
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("documents", [False, True])
def test_the_reference_is_the_formula_forward_and_backward(length: int, n_kv_head: int, documents: bool) -> None:
    for rule in (Visibility(W), Visibility(W, sinks=2), Visibility(W, dilation=3, sinks=3)):
        tensors, tokens = random_case(1, length, n_kv_head, documents, sinks=rule.sinks > 0)
        actual = results("reference", tensors, rule, tokens)
        expected = by_hand(tensors, rule, tokens)
        upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
        gradients = torch.autograd.grad((expected * upstream).sum(), tensors, allow_unused=True, materialize_grads=True)
        close(actual[0], expected.detach().float())
        for one, other in zip(actual[1:], gradients, strict=True):
            close(one, other, 1e-5)


@pytest.mark.parametrize("kernel", OTHERS)
@pytest.mark.parametrize("n_kv_head", [6, 3, 2, 1])
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("block", [3, 256])
def test_every_kernel_agrees_with_the_reference(
    length: int, n_kv_head: int, kernel: str, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(banded_module, "BLOCK", block)
    for documents in (False, True):
        for rule in (Visibility(W), Visibility(W, sinks=2), Visibility(W, dilation=3, sinks=3), Visibility(1, sinks=1)):
            for own_queries in {False, rule.sinks > 0}:
                assert_agrees(kernel, rule, *random_case(2, length, n_kv_head, documents, own_queries))


@pytest.mark.parametrize("kernel", OTHERS)
@settings(max_examples=60, deadline=None)
@given(
    rule=windows,
    batch=st.integers(1, 3),
    length=st.integers(1, 70),
    n_kv_head=st.sampled_from([6, 3, 2, 1]),
    documents=st.booleans(),
    own_queries=st.booleans(),
    block=st.integers(1, 20),
    seed=st.integers(0, 9),
)
def test_every_kernel_agrees_with_the_reference_on_anything(
    kernel: str,
    rule: Visibility,
    batch: int,
    length: int,
    n_kv_head: int,
    documents: bool,
    own_queries: bool,
    block: int,
    seed: int,
) -> None:
    case = random_case(batch, length, n_kv_head, documents, own_queries and rule.sinks > 0, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(banded_module, "BLOCK", block)
        assert_agrees(kernel, rule, *case)


@settings(max_examples=40, deadline=None)
@given(data=st.data(), rule=rules, n_kv_head=st.sampled_from([6, 3, 2, 1]))
def test_sdpa_agrees_with_the_reference_on_ragged_queries_against_any_cache(
    data: st.DataObject, rule: Visibility, n_kv_head: int
) -> None:
    n_queries, n_keys = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 12))
    rows = [st.lists(st.integers(PADDING, 40), min_size=n, max_size=n) for n in (n_queries, n_keys)]
    queries, keys = (Tokens(torch.tensor([data.draw(row), data.draw(row)])) for row in rows)
    assume(rule.visible(queries, keys).any(-1).all())
    generator = torch.Generator().manual_seed(0)
    q, q_sinks = torch.randn(2, 2, H, n_queries, D, generator=generator)
    k, v = torch.randn(2, 2, n_kv_head, n_keys, D, generator=generator)
    for sinks_see in (None, q_sinks if rule.sinks and rule.window else None):
        actual = KERNELS["sdpa"](Inputs(q, k, v, rule, queries, keys, 0.0, sinks_see))
        close(actual, reference(Inputs(q, k, v, rule, queries, keys, 0.0, sinks_see)))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("rule", [Visibility(16), Visibility(16, sinks=4), Visibility(8, sinks=3, dilation=3)], ids=str)
def test_bfloat16_stays_within_its_rounding(kernel: str, rule: Visibility) -> None:
    tensors, tokens = random_case(2, 200, 2, sinks=rule.sinks > 0)
    rounded = [t.detach().bfloat16().requires_grad_() for t in tensors]
    exact = results("reference", [t.detach().float().requires_grad_() for t in rounded], rule, tokens)
    actual = results(kernel, rounded, rule, tokens)
    for one, other in zip(actual, exact, strict=True):
        assert one.dtype == torch.bfloat16
        # A bfloat16 is off by 2^-9; a handful of such roundings follow one another.
        assert (one.float() - other).norm() / other.norm() < 0.01
        assert (one.float() - other).abs().max() < 0.02 * max(1.0, other.abs().max().item())


def test_banded_never_holds_more_than_a_block_of_scores() -> None:
    rule, length = Visibility(64, sinks=4), 4096
    (q, k, v), tokens = random_case(1, length, 2)
    largest = []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor):
                largest.append(out.numel())
            return out

    with Watch(), torch.no_grad():
        KERNELS["banded"](Inputs(q, k, v, rule, tokens, tokens))
    assert max(largest) <= max(H * banded_module.BLOCK * (banded_module.BLOCK + 64 + 4), q.numel())
    assert max(largest) < H * length * length / 50


@pytest.mark.parametrize("kernel", KERNELS)
def test_values_outside_the_window_cannot_leak(kernel: str) -> None:
    rule = Visibility(4, sinks=2, dilation=2)
    (q, k, v), tokens = random_case(1, 40, 2)
    poisoned = v.detach().clone()
    seen = {j for j in range(40) if may_see(30, j, rule)}
    for j in range(40):
        if j not in seen:
            poisoned[:, :, j] = 1e6
    with torch.no_grad():
        before, after = (
            KERNELS[kernel](Inputs(q, k, values, rule, tokens, tokens))[:, :, 30] for values in (v, poisoned)
        )
    close(after, before)


@pytest.mark.parametrize("rule", [Visibility(4), Visibility(4, sinks=2), Visibility(3, sinks=1, dilation=2)], ids=str)
def test_weights_are_shares_of_what_is_visible(rule: Visibility) -> None:
    (q, k, _), tokens = random_case(2, 20, 3)
    weights = attention_weights(q, k, rule, tokens, tokens)
    close(weights.sum(-1), torch.ones(2, H, 20), 1e-6)
    assert torch.equal(weights > 0, brute(rule, tokens, tokens)[:, None].expand_as(weights))


# Choosing


def test_banded_is_chosen_for_long_windowed_sequences_and_only_where_it_applies() -> None:
    def choice(rule: Visibility, length: int, dropout: float = 0.0, **known: bool) -> str:
        tokens = Tokens(torch.arange(length)[None], **known)
        x = torch.empty(1, 1, length, 8)
        kernel = select(Inputs(x, x, x, rule, tokens, tokens, dropout))
        return next(name for name, one in KERNELS.items() if one is kernel)

    assert choice(Visibility(8), 64, in_order=True) == "banded"
    assert choice(Visibility(8, sinks=2, dilation=2), 64, in_order=True) == "banded"
    assert choice(Visibility(8), 15, in_order=True) == "sdpa"  # short: one masked product is faster
    assert choice(Visibility(), 64, in_order=True) == "sdpa"
    assert choice(Visibility(8), 64) == "sdpa"  # may hold padding
    assert choice(Visibility(8), 64, dropout=0.1, in_order=True) == "sdpa"
    queries, keys = plain(10, 74), plain(0, 74)
    q, k = torch.empty(1, 1, 64, 8), torch.empty(1, 1, 74, 8)
    assert select(Inputs(q, k, k, Visibility(8), queries, keys)) is KERNELS["sdpa"]
