"""From GPT-2 to Llama: every combination of norm, feed-forward network and biases through what holds of any model."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from helpers.models import close, noisy, random_ids
from torch import Tensor

from gptlab.model import GPT
from gptlab.model.kernels import use

EVERY: list[dict[str, Any]] = [
    {"norm": norm, "mlp": mlp, "bias": bias}
    for norm, mlp, bias in itertools.product(["layer", "rms"], ["gelu", "swiglu"], [True, False])
]
LLAMA: dict[str, Any] = {"norm": "rms", "mlp": "swiglu", "bias": False, "position": "rope", "n_kv_head": 2}
ATTENTION: list[dict[str, Any]] = [{}, {"position": "rope", "n_kv_head": 2, "window": (5, None), "sinks": 2}]
LENGTH = 30


def gradients(model: GPT, ids: Tensor, kernel: str, documents: Tensor | None) -> list[Tensor]:
    """Logits, and the gradient of every parameter."""
    model.zero_grad()
    with use(kernel):
        logits = model(ids, documents=documents)
    logits.logsumexp(-1).mean().backward()
    parameters = list(model.parameters())
    assert all(parameter.grad is not None for parameter in parameters)
    return [logits.detach(), *(p.grad.clone() for p in parameters if p.grad is not None)]


@pytest.mark.parametrize("attention", ATTENTION, ids=str)
@pytest.mark.parametrize("switches", EVERY, ids=str)
def test_kernels_agree_in_logits_and_gradients(switches: dict[str, Any], attention: dict[str, Any]) -> None:
    model = noisy(**switches, **attention)
    ids = random_ids(model, 2, LENGTH)
    for documents in (None, torch.arange(LENGTH).expand(2, -1) // 11):
        expected = gradients(model, ids, "reference", documents)
        for kernel in ("sdpa", "banded") if attention else ("sdpa",):
            for actual, wanted in zip(gradients(model, ids, kernel, documents), expected, strict=True):
                close(actual, wanted)


@torch.no_grad()
@pytest.mark.parametrize("attention", ATTENTION, ids=str)
@pytest.mark.parametrize("switches", EVERY, ids=str)
def test_cached_and_padded_is_as_whole_and_alone(switches: dict[str, Any], attention: dict[str, Any]) -> None:
    model = noisy(**switches, **attention)
    ids = random_ids(model, 2, LENGTH)
    cache = model.make_cache(2, LENGTH, chunk=7)
    parts = [model(part, cache=cache) for part in ids.split([7, 1, 7, 7, 1, 7], dim=1)]
    close(torch.cat(parts, 1), model(ids))
    positions = torch.arange(LENGTH).repeat(2, 1)
    positions[1] = (positions[1] - 13).clamp(min=-1)
    close(model(ids, positions=positions)[1, 13:], model(ids[1:, 13:])[0])


@pytest.mark.slow
def test_compiled_a_llama_computes_the_same() -> None:
    model = noisy(**LLAMA)
    ids = random_ids(model, 2, LENGTH)
    with torch.no_grad():
        close(torch.compile(model)(ids), model(ids))
