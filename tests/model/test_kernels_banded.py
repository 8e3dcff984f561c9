"""The banded kernel's branch for devices without the fused operators of the CPU, computed on the CPU."""

from __future__ import annotations

import importlib

import pytest
import torch
from helpers.attention import assert_agrees, random_case, results
from hypothesis import given, settings
from hypothesis import strategies as st

from gptlab.model import Tokens, Visibility, kernels
from gptlab.model.attention import attend
from gptlab.model.kernels import Inputs, reference

banded_module = importlib.import_module("gptlab.model.kernels.banded")  # the package's name `banded` is the function


@pytest.fixture
def written_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """No fused operator may be used."""
    monkeypatch.setattr(banded_module, "_fused", lambda q: False)

    def forbidden(*args: object, **kwargs: object) -> None:
        raise AssertionError("the fused operator was called")

    for name in ("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention_for_cpu_backward"):
        monkeypatch.setattr(torch.ops.aten, name, forbidden)


W = 5
RULES = [
    Visibility(),
    Visibility(W),
    Visibility(W, sinks=2),
    Visibility(W, dilation=3, sinks=3),
    Visibility(1, sinks=1),
]


@pytest.mark.usefixtures("written_out")
@pytest.mark.parametrize("n_kv_head", [6, 2, 1])
@pytest.mark.parametrize("length", [1, W - 1, W, W + 1, 2 * W, 23])
def test_without_the_fused_operators_banded_is_the_reference(length: int, n_kv_head: int) -> None:
    for rule in RULES:
        for documents in (False, True):
            for own_queries in {False, rule.sinks > 0}:
                assert_agrees("banded", rule, *random_case(2, length, n_kv_head, documents, own_queries))


@settings(max_examples=60, deadline=None)
@given(
    rule=st.builds(Visibility, st.integers(1, 9), sinks=st.integers(0, 5), dilation=st.integers(1, 4))
    | st.just(Visibility()),
    batch=st.integers(1, 3),
    length=st.integers(1, 70),
    n_kv_head=st.sampled_from([6, 3, 2, 1]),
    documents=st.booleans(),
    own_queries=st.booleans(),
    block=st.integers(1, 20),
    seed=st.integers(0, 9),
)
def test_without_the_fused_operators_banded_is_the_reference_on_anything(
    rule: Visibility,
    batch: int,
    length: int,
    n_kv_head: int,
    documents: bool,
    own_queries: bool,
    block: int,
    seed: int,
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(banded_module, "_fused", lambda q: False)
        patch.setattr(banded_module, "BLOCK", block)
        assert_agrees(
            "banded", rule, *random_case(batch, length, n_kv_head, documents, own_queries and rule.sinks > 0, seed)
        )


@pytest.mark.usefixtures("written_out")
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_without_the_fused_operators_bfloat16_stays_within_its_rounding(rule: Visibility) -> None:
    tensors, tokens = random_case(2, 200, 2, sinks=rule.sinks > 0)
    rounded = [t.detach().bfloat16().requires_grad_() for t in tensors]
    exact = results("reference", [t.detach().float().requires_grad_() for t in rounded], rule, tokens)
    for expected, actual in zip(exact, results("banded", rounded, rule, tokens), strict=True):
        assert actual.dtype == torch.bfloat16
        # A bfloat16 is off by 2^-9; a handful of such roundings follow one another.
        assert (actual.float() - expected).norm() / expected.norm() < 0.01


@pytest.mark.slow
@pytest.mark.parametrize("n_kv_head", [6, 2])
@pytest.mark.parametrize("rule", [Visibility(), Visibility(40), Visibility(40, sinks=3)], ids=str)
def test_compiled_training_in_bfloat16_takes_it_on_the_cpu(rule: Visibility, n_kv_head: int) -> None:
    tensors, tokens = random_case(2, 300, n_kv_head, sinks=rule.sinks > 0)
    rounded = [t.detach().bfloat16().requires_grad_() for t in tensors]
    with pytest.MonkeyPatch.context() as patch:
        # Whatever else is called instead of it fails.
        patch.setitem(kernels.KERNELS, "sdpa", None)
        patch.setitem(kernels.KERNELS, "reference", None)
        q, k, v, *q_sinks = rounded
        torch._dynamo.reset()
        compiled = torch.compile(attend, fullgraph=True)
        out = compiled(q, k, v, rule, tokens, None, 0.0, *q_sinks)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    actual = [out.detach(), *torch.autograd.grad((out * upstream).sum(), rounded)]
    exact = [t.detach().float().requires_grad_() for t in rounded]
    q, k, v, *q_sinks = exact
    out = reference(Inputs(q, k, v, rule, tokens, tokens, 0.0, *q_sinks))
    expected = [out.detach(), *torch.autograd.grad((out * upstream).sum(), exact)]
    for one, other in zip(actual, expected, strict=True):
        assert (one.float() - other).norm() / other.norm() < 0.01


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_banded_is_the_reference() -> None:
    for rule in RULES:
        tensors, tokens = random_case(2, 300, 2, documents=True, sinks=rule.sinks > 0)
        on_gpu = [t.detach().cuda().requires_grad_() for t in tensors]
        assert tokens.documents is not None
        there = Tokens(tokens.positions.cuda(), tokens.documents.cuda(), in_order=True)
        assert_agrees(rule, on_gpu, there)
