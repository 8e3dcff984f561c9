# Output projections fitted anew: against a direct least-squares solution, and never for the worse.
from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers.models import LLAMA, random_ids
from helpers.models import lively as noisy
from torch import Tensor

from gptlab import GPT, GptlabError
from gptlab.conversion.heads import regroup
from gptlab.conversion.layers import rebuild
from gptlab.conversion.refit import RIDGES, refit_outputs


@torch.no_grad()
def seen(model: GPT, ids: Tensor, layer: int) -> tuple[Tensor, Tensor]:
    """What the output projection of a layer reads and writes: (tokens, H D) and (tokens, C)."""
    tensors: list[Tensor] = []

    def keep(_module: Any, inputs: Any, out: Tensor) -> None:
        tensors.extend([inputs[0].flatten(0, 1), out.flatten(0, 1)])

    handle = model.blocks[layer].attn.c_proj.register_forward_hook(keep)
    model(ids)
    handle.remove()
    return tensors[0], tensors[1]


def matrix(model: GPT, layer: int) -> Tensor:
    projection = model.blocks[layer].attn.c_proj
    parts = [projection.weight] if projection.bias is None else [projection.weight, projection.bias[:, None]]
    return torch.cat(parts, 1).detach().double()


@pytest.mark.parametrize("changes", [{}, {"bias": False}, LLAMA], ids=["biases", "none", "llama"])
def test_it_is_the_ridge_regression_of_a_direct_solution(changes: dict[str, Any]) -> None:
    model = noisy(**changes)
    bias = model.config.bias
    converted, ids = regroup(model, 1, method="mean"), random_ids(256, 16)
    new = refit_outputs(model, converted, ids)
    for layer in (0, 1):
        start = matrix(converted, layer)
        f, y = seen(new, ids, layer)[0].double(), seen(model, ids, layer)[1].double()
        if bias:
            f = torch.cat([f, torch.ones(len(f), 1)], 1)
        candidates = []
        for ridge in RIDGES:
            # As if there were tokens more that ask for what is there.
            size = ridge * 32 * f[:, :32].square().mean()
            more = math.sqrt(size) * torch.eye(f.shape[1], dtype=torch.float64)
            rows, wanted = torch.cat([f, more]), torch.cat([y, more @ start.T])
            candidates.append(torch.linalg.lstsq(rows, wanted).solution.T)
        assert not torch.allclose(matrix(new, layer), start, atol=1e-3)
        assert min((matrix(new, layer) - one).abs().max() for one in candidates) < 1e-5


@pytest.mark.parametrize("change", [{"n_kv_head": 1}, {"window": 4}])
def test_no_layer_is_worse_on_the_calibration_text(change: dict[str, Any]) -> None:
    model, ids = noisy(), random_ids(256, 6)
    if "n_kv_head" in change:
        converted = regroup(model, 1, method="svd")
    else:
        converted = rebuild(model, lambda _, heads: heads, **change)
    new = refit_outputs(model, converted, ids)
    for layer in (0, 1):
        f, y = seen(new, ids, layer)[0].double(), seen(model, ids, layer)[1].double()
        f = torch.cat([f, torch.ones(len(f), 1)], 1)
        before, after = ((y - f @ matrix(one, layer).T).square().sum() for one in (converted, new))
        assert after <= before * (1 + 1e-6)


def test_it_repairs_on_other_texts_too() -> None:
    model = noisy()
    converted = regroup(model, 1, method="mean")
    new, held_out = refit_outputs(model, converted, random_ids(256, 40)), random_ids(256, 10, seed=1)
    with torch.no_grad():
        errors = [(one(held_out) - model(held_out)).square().mean().item() for one in (converted, new)]
    assert errors[1] < 0.8 * errors[0]


def test_what_is_right_already_stays() -> None:
    model = noisy()
    new = refit_outputs(model, model, random_ids(256, 4))
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(new.state_dict()[name], tensor, rtol=0.0, atol=1e-6)
    assert new.wte.weight.data_ptr() != model.wte.weight.data_ptr()


def test_modes_and_models_are_left_as_they_were() -> None:
    model = noisy(dropout=0.5).train()
    converted = regroup(model, 2)
    states = [{name: tensor.clone() for name, tensor in one.state_dict().items()} for one in (model, converted)]
    new = refit_outputs(model, converted, random_ids(256, 4))
    assert model.training
    assert converted.training
    assert new.training
    for one, state in zip((model, converted), states, strict=True):
        assert all(torch.equal(tensor, state[name]) for name, tensor in one.state_dict().items())


def test_bad_input() -> None:
    with pytest.raises(GptlabError, match=r"differ in n_layer, 2 and 3; the second must be a conversion"):
        refit_outputs(noisy(), noisy(n_layer=3), random_ids(256, 1))
    with pytest.raises(GptlabError, match="calibration text is empty"):
        refit_outputs(noisy(), noisy(), [])
