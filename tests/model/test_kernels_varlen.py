"""Packed FlashAttention: what it is given, as far as that can be told without a GPU."""

from __future__ import annotations

import importlib
import math
from typing import Any

import pytest
import torch
from helpers.models import close
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from gptlab import GptlabError
from gptlab.model import Tokens, Visibility
from gptlab.model.kernels import Inputs, reference, varlen

varlen_module = importlib.import_module("gptlab.model.kernels.varlen")  # the package's name `varlen` is the function
H, D = 6, 8


def as_documented(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> Tensor:
    """`varlen_attn` as PyTorch documents it, sequence by sequence. Window sizes do not count the query's own key."""
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert enable_gqa or query.shape[1] == key.shape[1]
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    left, right = (math.inf if n == -1 else n for n in window_size)
    out = torch.full_like(query, math.nan)
    for (start, end), ends in zip(cu_seq_q.unfold(0, 2, 1).tolist(), cu_seq_k[1:].tolist(), strict=True):
        assert 0 < end - start <= min(max_q, max_k)
        assert ends == end
        q, k, v = (x[start:end].transpose(0, 1) for x in (query, key, value))  # (H, n, D)
        i = torch.arange(end - start)
        distance = i[:, None] - i
        hidden = (distance > left) | (-distance > right)
        scores = (q @ k.mT / math.sqrt(query.shape[-1])).masked_fill(hidden, -math.inf)
        out[start:end] = (scores.softmax(-1) @ v).transpose(0, 1)
    return out


def tokens_of(batch: int, length: int, documents: bool, seed: int = 0) -> Tokens:
    generator = torch.Generator().manual_seed(seed)
    # Numbers that fall as well as rise, and start anywhere; never the same again in a row.
    numbers = torch.randint(0, 2, (batch, length), generator=generator).cumsum(1)
    numbers = (numbers * 7 + torch.arange(batch)[:, None]) % 101
    return Tokens(torch.arange(length).expand(batch, -1), numbers if documents else None, in_order=True)


@settings(deadline=None)
@given(
    window=st.none() | st.integers(1, 9),
    batch=st.integers(1, 3),
    length=st.integers(1, 25),
    n_kv_head=st.sampled_from([6, 3, 2, 1]),
    documents=st.booleans(),
    seed=st.integers(0, 9),
)
def test_what_is_packed_and_unpacked_is_the_reference(
    window: int | None, batch: int, length: int, n_kv_head: int, documents: bool, seed: int
) -> None:
    tokens, rule = tokens_of(batch, length, documents, seed), Visibility(window)
    results = []
    for kernel in ("reference", "varlen"):
        generator = torch.Generator().manual_seed(seed)
        shapes = [(batch, H, length, D), (batch, n_kv_head, length, D), (batch, n_kv_head, length, D)]
        q, k, v = (torch.randn(shape, generator=generator).requires_grad_() for shape in shapes)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(varlen_module, "_varlen_attn", lambda: as_documented)
            out = (
                reference(Inputs(q, k, v, rule, tokens, tokens))
                if kernel == "reference"
                else varlen_module.packed(q, k, v, rule, tokens)
            )
        upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
        results.append([out.detach(), *torch.autograd.grad((out * upstream).sum(), (q, k, v))])
    close(results[1][0], results[0][0], 1e-5)
    for actual, expected in zip(results[1][1:], results[0][1:], strict=True):
        close(actual, expected, 1e-4)


def test_the_operator_of_the_installed_torch_takes_what_it_is_given() -> None:
    # On the device "meta" it computes shapes alone, but checks its arguments.
    tokens = tokens_of(2, 20, documents=False)
    q, k, v = (torch.empty(2, n, 20, D, device="meta", dtype=torch.bfloat16) for n in (H, 2, 2))
    out = varlen_module.packed(q, k, v, Visibility(5), tokens)
    assert out.shape == q.shape
    assert out.dtype == torch.bfloat16


def test_where_documents_begin() -> None:
    def starts(*rows: list[int]) -> list[int] | None:
        documents = torch.tensor(rows)
        positions = torch.arange(documents.shape[1]).expand(documents.shape)
        begins = varlen_module.starts(Tokens(positions, documents, in_order=True))
        return None if begins is None else begins.tolist()

    assert varlen_module.starts(Tokens(torch.arange(4).expand(3, -1), in_order=True)).tolist() == [0, 4, 8, 12]
    assert starts([5, 5, 5]) == [0, 3]
    assert starts([3, 3, 1, 1, 1], [1, 1, 1, 1, 0]) == [0, 2, 5, 9, 10]
    assert starts([0, 1, 0]) is None
    assert starts([0, 0, 0], [0, 1, 0]) is None


@pytest.mark.parametrize(
    ("rule", "window"),
    [
        (Visibility(), (-1, 0)),
        (Visibility(256), (255, 0)),
        (Visibility(1), (0, 0)),
        (Visibility(8, sinks=1), None),
        (Visibility(8, dilation=2), None),
    ],
)
def test_the_window_in_flash_attention_s_words(rule: Visibility, window: tuple[int, int] | None) -> None:
    assert rule.left_right == window


# What it cannot do


def obstacle(patch: pytest.MonkeyPatch, **changes: object) -> str | None:
    """On a pretended GPU, with a windowed batch of several documents, changed in some ways."""
    patch.setattr(varlen_module, "_has_flash_attention", lambda device: case["flash"])
    case: dict[str, Any] = {"flash": True} | {
        "n_kv_head": 2,
        "width": D,
        "device": "cuda",
        "dtype": torch.bfloat16,
        "dropout": 0.0,
        "own_queries": False,
    }
    case |= {"rule": Visibility(5), "tokens": tokens_of(2, 20, documents=True)} | changes
    with FakeTensorMode():
        shapes = [(2, n, 20, case["width"]) for n in (H, case["n_kv_head"], case["n_kv_head"])]
        shapes += [shapes[0]] * case["own_queries"]
        tensors = [torch.empty(shape, device=case["device"], dtype=case["dtype"]) for shape in shapes]
    tokens = case["tokens"]
    q, k, v, *q_sinks = tensors
    keys = case.get("keys", tokens)
    return varlen_module.obstacle(Inputs(q, k, v, case["rule"], tokens, keys, case["dropout"], *q_sinks))


def test_nothing_is_in_its_way(monkeypatch: pytest.MonkeyPatch) -> None:
    assert obstacle(monkeypatch) is None
    assert obstacle(monkeypatch, rule=Visibility(), n_kv_head=H, dtype=torch.float16) is None


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dropout": 0.1}, "does not support dropout"),
        ({"device": "cpu"}, "runs on CUDA only, not on cpu"),
        ({"dtype": torch.float32}, "computes bfloat16 and float16, not torch.float32"),
        ({"width": 12}, "needs heads of a multiple of 8, at most 256 wide, not 12"),
        ({"width": 512}, "needs heads of a multiple of 8, at most 256 wide, not 512"),
        ({"rule": Visibility(5, sinks=1)}, "supports neither sinks nor dilation"),
        ({"rule": Visibility(5, dilation=2)}, "supports neither sinks nor dilation"),
        ({"own_queries": True}, "supports neither sinks nor dilation"),
        ({"keys": tokens_of(2, 20, documents=True)}, "needs whole sequences without padding or cache"),
        ({"tokens": Tokens(torch.arange(20).expand(2, -1))}, "needs whole sequences without padding or cache"),
        (
            {"tokens": Tokens(torch.arange(20).expand(2, -1), torch.arange(20).expand(2, -1) % 3, in_order=True)},
            "needs each document in one piece",
        ),
    ],
    ids=str,
)
def test_what_it_cannot_compute_it_says(
    changes: dict[str, object], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert obstacle(monkeypatch, **changes) == reason


def test_an_older_torch_is_told_by_its_signature(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(varlen_module, "_parameters", lambda: frozenset({"query", "is_causal"}))
    assert "whose varlen_attn has enable_gqa and window_size; this is 2." in (obstacle(monkeypatch) or "")
    monkeypatch.setattr(varlen_module, "_parameters", lambda: frozenset({"query", "window_size"}))
    assert "whose varlen_attn has enable_gqa; this is 2." in (obstacle(monkeypatch) or "")
    assert obstacle(monkeypatch, n_kv_head=H) is None


def test_an_older_gpu_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    right = varlen_module._has_flash_attention
    for capability, enough in (((7, 5), False), ((8, 0), True), ((9, 0), True)):
        right.cache_clear()
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, capability=capability: capability)
        assert right(torch.device("cuda", 0)) == enough
    right.cache_clear()
    assert obstacle(monkeypatch, flash=False) == "needs a GPU of compute capability 8.0 or later"


def test_forced_where_it_cannot_it_refuses() -> None:
    tokens = tokens_of(1, 20, documents=False)
    q, k, v = torch.randn(3, 1, H, 20, D)
    with pytest.raises(GptlabError, match="the varlen kernel runs on CUDA only, not on cpu; choose another kernel"):
        varlen(Inputs(q, k, v, Visibility(5), tokens, tokens))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("window", [None, 1, 20])
@pytest.mark.parametrize("documents", [False, True])
def test_on_a_gpu_it_is_the_reference_forward_and_backward(window: int | None, documents: bool) -> None:
    tokens = tokens_of(2, 311, documents)
    numbers = None if tokens.documents is None else tokens.documents.cuda()
    tokens = Tokens(tokens.positions.cuda(), numbers, in_order=True)
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(2, n, 311, 64, generator=generator).bfloat16().cuda() for n in (H, 2, 2)]
    results = []
    for kernel, dtype in ((reference, torch.float32), (varlen, torch.bfloat16)):
        q, k, v = (x.to(dtype).requires_grad_() for x in start)
        out = kernel(Inputs(q, k, v, Visibility(window), tokens, tokens))
        upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
        results.append([out.detach(), *torch.autograd.grad((out * upstream).sum(), (q, k, v))])
    for expected, actual in zip(*results, strict=True):
        # A bfloat16 is off by 2^-9; a handful of such roundings follow one another.
        assert (actual.float() - expected).norm() / expected.norm() < 0.01
