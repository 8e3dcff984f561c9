"""FlexAttention: the masks that are made for it, what it computes, and when it compiles anew.

Without compilation the operator computes the same mathematics from the same masks, slowly; the fast tests run it so.
"""

from __future__ import annotations

import gc
import importlib
import shutil
import weakref
from typing import Any

import pytest
import torch
from helpers.models import close, noisy, random_ids
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from gptlab import GptlabError
from gptlab.model import PADDING, Tokens, Visibility, kernels
from gptlab.model.kernels import Inputs, flex, reference, use
from gptlab.model.kernels.blocks import blocks, mask_mod

flex_module = importlib.import_module("gptlab.model.kernels.flex")  # the package's name `flex` is the function
H, D = 6, 8

rules = st.builds(Visibility, st.none() | st.integers(1, 9), sinks=st.integers(0, 5), dilation=st.integers(1, 4))


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    without_compilation(monkeypatch)


def without_compilation(patch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("torch.nn.attention.flex_attention")
    patch.setattr(module, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    patch.setattr(flex_module, "_compiled", lambda: module.flex_attention)


def in_order(batch: int, length: int, documents: bool = False, seed: int = 0) -> Tokens:
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randint(0, 2, (batch, length), generator=generator).cumsum(1) if documents else None
    return Tokens(torch.arange(length).expand(batch, -1), numbers, plain=not documents, in_order=True)


def padded(batch: int, length: int) -> Tokens:
    """Rows of different lengths, padded on the left."""
    lengths = torch.tensor([max(1, length - 7 * row - 1) for row in range(batch)])
    return Tokens((torch.arange(length) - (length - lengths)[:, None]).clamp(min=PADDING))


@st.composite
def pairs(draw: st.DrawFn, batch: int = 2) -> tuple[Tokens, Tokens]:
    """Queries and keys: the same whole sequences, or anything against anything, as in a batch with a cache."""
    documents = draw(st.booleans())
    if draw(st.booleans()):
        tokens = in_order(batch, draw(st.integers(1, 40)), documents, draw(st.integers(0, 9)))
        return tokens, tokens
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    both = []
    for n in (draw(st.integers(1, 20)), draw(st.integers(1, 40))):
        positions = torch.randint(PADDING, 40, (batch, n), generator=generator)
        if draw(st.booleans()):  # as they come: padding, then in order
            positions = positions.sort(dim=1).values
        numbers = torch.randint(0, 3, (batch, n), generator=generator)
        both.append(Tokens(positions, numbers if documents else None))
    return both[0], both[1]


def inputs(queries: Tokens, keys: Tokens, n_kv_head: int, own_queries: bool, width: int = D) -> list[Tensor]:
    """q, k, v and, where sinks see queries of their own, q_sinks."""
    generator = torch.Generator().manual_seed(0)
    batch, n_queries = queries.positions.shape
    q, q_sinks = torch.randn(2, batch, H, n_queries, width, generator=generator)
    k, v = torch.randn(2, batch, n_kv_head, keys.positions.shape[1], width, generator=generator)
    return [q, k, v, *[q_sinks] * own_queries]


def assert_agrees(rule: Visibility, queries: Tokens, keys: Tokens, tensors: list[Tensor]) -> None:
    q, k, v, *q_sinks = tensors
    actual = flex(Inputs(q, k, v, rule, queries, keys, 0.0, *q_sinks))
    close(actual, reference(Inputs(q, k, v, rule, queries, keys, 0.0, *q_sinks)), 1e-5)


# The masks


def pooled(visible: Tensor, size: int, fill: bool) -> Tensor:
    """(B, Tq, Tk) bool -> (B, nQ, size, nK, size), the last blocks filled up."""
    fills = [-n % size for n in visible.shape[1:]]
    whole = torch.nn.functional.pad(visible, (0, fills[1], 0, fills[0]), value=fill)
    return whole.unflatten(2, (-1, size)).unflatten(1, (-1, size))


@settings(deadline=None)
@given(rule=rules, pair=pairs())
def test_the_mask_function_is_what_visible_says(rule: Visibility, pair: tuple[Tokens, Tokens]) -> None:
    queries, keys = pair
    b, q, k = (torch.arange(n) for n in (2, queries.positions.shape[1], keys.positions.shape[1]))
    actual = mask_mod(rule, queries, keys)(b[:, None, None], torch.tensor(0), q[:, None], k)
    assert torch.equal(actual.expand(2, len(q), len(k)), rule.visible(queries, keys))


@settings(deadline=None)
@given(rule=rules, pair=pairs(), size=st.integers(1, 9))
def test_no_block_with_a_visible_pair_is_left_out_and_no_full_one_hides_any(
    rule: Visibility, pair: tuple[Tokens, Tokens], size: int
) -> None:
    some, every = blocks(rule, *pair, size)
    visible = rule.visible(*pair)
    assert not (pooled(visible, size, fill=False).any(-1).any(2) & ~some).any()
    assert not (every & ~pooled(visible, size, fill=False).all(-1).all(2)).any()


@settings(deadline=None)
@given(rule=st.builds(Visibility, st.none() | st.integers(1, 20)), length=st.integers(1, 60), size=st.integers(1, 9))
def test_the_blocks_of_a_whole_sequence_are_exact(rule: Visibility, length: int, size: int) -> None:
    tokens = in_order(1, length)
    some, every = blocks(rule, tokens, tokens, size)
    visible = pooled(rule.visible(tokens, tokens), size, fill=False)
    assert torch.equal(some, visible.any(-1).any(2))
    assert torch.equal(every, visible.all(-1).all(2))


def test_blocks_of_other_documents_are_left_out() -> None:
    documents = torch.arange(32)[None] // 8
    tokens = Tokens(torch.arange(32)[None], documents, in_order=True)
    some, every = blocks(Visibility(), tokens, tokens, 4)
    document = torch.arange(8) // 2
    assert torch.equal(some[0], (document[:, None] == document) & torch.ones(8, 8, dtype=torch.bool).tril())
    assert torch.equal(every[0], some[0] & ~torch.eye(8, dtype=torch.bool))


def test_a_mask_takes_no_memory_of_length_squared() -> None:
    tokens, largest = in_order(1, 8192), 0

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor):
                largest = max(largest, out.numel())
            return out

    with Watch():
        mask = flex_module._make_block_mask(Visibility(256, sinks=4), tokens, tokens)
    assert largest <= 2 * 8192
    assert mask.shape == (1, 1, 8192, 8192)
    # Of 64 blocks of keys a block of queries needs its own, two of its window and that of the sinks, at most.
    assert (mask.kv_num_blocks + mask.full_kv_num_blocks).max() == 4


def test_layers_share_a_mask_and_it_goes_with_its_tokens() -> None:
    tokens = in_order(1, 300)
    first = flex_module._block_mask(Visibility(20), tokens, tokens)
    assert flex_module._block_mask(Visibility(20), tokens, tokens) is first
    assert flex_module._block_mask(Visibility(21), tokens, tokens) is not first
    gone = weakref.ref(tokens)
    del tokens, first
    gc.collect()
    assert gone() is None


# What it computes


@settings(deadline=None, max_examples=50)
@given(rule=rules, pair=pairs(), n_kv_head=st.sampled_from([6, 3, 2, 1]), own_queries=st.booleans())
def test_the_operator_agrees_with_the_reference_on_anything(
    rule: Visibility, pair: tuple[Tokens, Tokens], n_kv_head: int, own_queries: bool
) -> None:
    assume(rule.visible(*pair).any(-1).all())
    with pytest.MonkeyPatch.context() as patch:
        without_compilation(patch)
        assert_agrees(rule, *pair, inputs(*pair, n_kv_head, own_queries and rule.sinks > 0))


@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++", "cl"))), reason="needs a C++ compiler")
def test_compiled_it_agrees_with_the_reference() -> None:
    # One graph serves all of these.
    for length, window in ((4, 5), (5, 5), (6, 5), (10, 5), (23, 1), (127, 40), (128, 300)):
        tokens = in_order(2, length)
        assert_agrees(Visibility(window), tokens, tokens, inputs(tokens, tokens, 2, own_queries=False))


W = 20
LENGTHS = [1, W - 1, W, W + 1, 2 * W, 311]
RULES = [Visibility(), Visibility(W), Visibility(W, sinks=3), Visibility(W, dilation=3, sinks=3)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "rule"),
    [("whole", RULES[2]), ("documents", RULES[1]), ("padding", RULES[3]), ("cache", RULES[0]), ("cache", RULES[2])],
    ids=str,
)
def test_compiled_it_agrees_with_the_reference_on_every_kind_of_tokens(kind: str, rule: Visibility) -> None:
    for length in LENGTHS:
        queries = keys = in_order(2, length, documents=kind == "documents")
        if kind == "padding":
            queries = keys = padded(2, length)
        elif kind == "cache":  # a quarter of the tokens are new
            queries = Tokens(keys.positions[:, length - max(length // 4, 1) :])
            keys = Tokens(keys.positions)
        assert_agrees(rule, queries, keys, inputs(queries, keys, 2, own_queries=rule.sinks > 0))


@pytest.mark.slow
@pytest.mark.parametrize("n_kv_head", [6, 3, 1])
def test_compiled_it_agrees_with_the_reference_for_any_number_of_heads(n_kv_head: int) -> None:
    tokens = in_order(2, 311)
    assert_agrees(Visibility(W), tokens, tokens, inputs(tokens, tokens, n_kv_head, own_queries=False))


@pytest.mark.slow
@pytest.mark.parametrize("rule", [Visibility(W), Visibility(W, sinks=3)], ids=str)
def test_compiled_bfloat16_stays_within_its_rounding(rule: Visibility) -> None:
    tokens = in_order(2, 311)
    rounded = [t.bfloat16() for t in inputs(tokens, tokens, 2, rule.sinks > 0)]
    q, k, v, *q_sinks = rounded
    actual = flex(Inputs(q, k, v, rule, tokens, tokens, 0.0, *q_sinks))
    assert actual.dtype == torch.bfloat16
    q, k, v, *q_sinks = (t.float() for t in rounded)
    exact = reference(Inputs(q, k, v, rule, tokens, tokens, 0.0, *q_sinks))
    # A bfloat16 is off by 2^-9; a handful of such roundings follow one another.
    assert (actual.float() - exact).norm() / exact.norm() < 0.01
    assert (actual.float() - exact).abs().max() < 0.02 * max(1.0, exact.abs().max().item())


@pytest.mark.slow
def test_compiled_code_serves_every_window_and_length() -> None:
    torch._dynamo.reset()
    count = importlib.import_module("torch._dynamo.utils").counters["stats"]

    def graphs(rule: Visibility, tokens: Tokens) -> int:
        before = count["unique_graphs"]
        flex(Inputs(*inputs(tokens, tokens, 2, own_queries=False), rule, tokens, tokens))
        return count["unique_graphs"] - before

    # As many rows as heads would be taken for one number by the compiler.
    assert graphs(Visibility(30), in_order(4, 300)) == 1
    for length, window in ((301, 30), (700, 31), (1024, 256), (555, 1)):
        assert graphs(Visibility(window), in_order(4, length)) == 0
    assert graphs(Visibility(30), in_order(5, 300)) == 0
    assert graphs(Visibility(30), in_order(4, 300, documents=True)) == 1
    assert graphs(Visibility(40), in_order(4, 512, documents=True)) == 0
    assert graphs(Visibility(40), in_order(4, 513, documents=True)) == 1


# In a model

MODELS: list[dict[str, Any]] = [
    {"position": "rope", "n_kv_head": 2, "window": 5},
    {"position": "rope", "n_kv_head": 2, "window": 5, "sinks": 2, "dilation": 2},
    {"position": "learned", "n_kv_head": 1, "window": (3, None)},
    {"position": "rope", "n_kv_head": 2, "window": 5, "norm": "rms", "mlp": "swiglu", "bias": False},
]


def assert_model_agrees(**values: Any) -> None:
    model = noisy(**values)
    ids = random_ids(model, 2, 40)
    documents = torch.arange(40).expand(2, -1) // 15
    with torch.no_grad():
        expected, divided = model(ids), model(ids, documents=documents)
        with use("flex"):
            close(model(ids), expected, 1e-5)
            close(model(ids, documents=documents), divided, 1e-5)
            cache = model.make_cache(2, 40, chunk=30)
            close(torch.cat([model(part, cache=cache) for part in ids.split([30, 8, 1, 1], dim=1)], 1), expected, 1e-5)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("values", MODELS, ids=str)
def test_a_model_computes_the_same_logits(values: dict[str, Any]) -> None:
    assert_model_agrees(**values)


@pytest.mark.slow
@pytest.mark.parametrize("values", MODELS, ids=str)
def test_compiled_a_model_computes_the_same_logits(values: dict[str, Any]) -> None:
    assert_model_agrees(**values)


# What it cannot do


def test_it_refuses_in_words_what_it_cannot_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = in_order(2, 20)
    q, k, v = inputs(tokens, tokens, 2, own_queries=False)
    with pytest.raises(GptlabError, match="the flex kernel does not support dropout; choose another kernel"):
        flex(Inputs(q, k, v, Visibility(4), tokens, tokens, 0.1))
    for trained in range(3):
        tensors = [x.clone().requires_grad_(i == trained) for i, x in enumerate((q, k, v))]
        with pytest.raises(GptlabError, match="the flex kernel computes no gradients on the CPU"):
            flex(Inputs(*tensors, Visibility(4), tokens, tokens))
    with pytest.raises(GptlabError, match=r"float32, bfloat16 and float16, not torch\.float64"):
        flex(Inputs(q.double(), k, v, Visibility(4), tokens, tokens))
    with pytest.raises(GptlabError, match="on the CPU and on CUDA, not on meta"):
        flex(Inputs(q.to("meta"), k, v, Visibility(4), tokens, tokens))

    def failing(*args: object, **kwargs: object) -> None:
        raise torch._dynamo.exc.TorchDynamoException("no working C++ compiler\nand much more")

    monkeypatch.setattr(flex_module, "_compiled", lambda: failing)
    with pytest.raises(GptlabError, match=r"could not be compiled \(no working C\+\+ compiler\)"):
        flex(Inputs(q, k, v, Visibility(4), tokens, tokens))


def test_training_with_it_on_the_cpu_is_refused() -> None:
    model = noisy(position="rope", window=5)
    with use("flex"), pytest.raises(GptlabError, match="computes no gradients on the CPU"):
        model(random_ids(model, 1, 20))


@pytest.mark.slow
def test_inside_a_compiled_model_it_is_refused_on_the_cpu() -> None:
    # There PyTorch 2.13 computes wrong values without a word.
    model = noisy(position="rope", window=5)
    ids = random_ids(model, 1, 20)
    with torch.no_grad(), use("flex"), pytest.raises(GptlabError, match="a part of what is compiled on the CPU"):
        torch.compile(model)(ids)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("documents", [False, True])
def test_on_a_gpu_inside_a_compiled_model_it_computes_the_same(documents: bool) -> None:
    model = noisy(position="rope", n_embd=128, n_kv_head=2, window=5, sinks=2).cuda()
    ids = random_ids(model, 2, 300).cuda()
    numbers = torch.arange(300, device="cuda").expand(2, -1) // 100 if documents else None
    results = []
    for name, run in (("reference", model), ("flex", torch.compile(model))):
        with use(name):
            logits = run(ids, documents=numbers)
        model.zero_grad()
        logits.logsumexp(-1).mean().backward()
        results.append([logits.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    for expected, actual in zip(*results, strict=True):
        close(actual, expected, 1e-3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("documents", [False, True])
def test_on_a_gpu_it_is_the_reference_forward_and_backward(rule: Visibility, documents: bool) -> None:
    tokens = in_order(2, 311, documents)
    numbers = None if tokens.documents is None else tokens.documents.cuda()
    tokens = Tokens(tokens.positions.cuda(), numbers, plain=not documents, in_order=True)
    results = []
    for kernel in (reference, kernels.SPECIAL["flex"]):
        tensors = [t.cuda().requires_grad_() for t in inputs(tokens, tokens, 2, rule.sinks > 0, width=32)]
        q, k, v, *q_sinks = tensors
        out = kernel(Inputs(q, k, v, rule, tokens, tokens, 0.0, *q_sinks))
        upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).cuda()
        results.append([out.detach(), *torch.autograd.grad((out * upstream).sum(), tensors)])
    close(results[1][0], results[0][0], 1e-4)
    for actual, expected in zip(results[1][1:], results[0][1:], strict=True):
        close(actual, expected, 1e-3)
