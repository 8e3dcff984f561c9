"""Fewer key heads on the spot: the project's own conversion, its errors by the definition, and its losses."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from helpers.inspected import OTHERS, inspected, text
from helpers.models import LLAMA, close, same_state
from torch import Tensor

from gptlab import GPT, GptlabError
from gptlab.conversion.circuits import circuit_errors, root
from gptlab.conversion.heads import permute_heads, regroup
from gptlab.conversion.layers import read_heads
from gptlab.conversion.statistics import Moments, assumed_statistics, collect_statistics
from gptlab.inspecting import attention_maps, share_keys, token_losses
from gptlab.model.quantised import quantise_model

SHARED: dict[str, dict[str, Any]] = {
    "learned": {},
    "RoPE": {"position": "rope"},
    "Llama": {**LLAMA, "n_kv_head": 2},
    "windows": {**OTHERS["learned, window, sinks"], "position": "rope"},
}


def lost(model: GPT, new: GPT, layer: int, order: list[int], moments: Moments) -> tuple[Tensor, Tensor]:
    """The share of each head's QK and OV circuits that a layer lost, by the source's heads: squared norms, in full."""
    before, after = (read_heads(one.blocks[layer].attn).expanded() for one in (model, new))
    query, read = root(moments.uncentred), root(moments.centred)
    keys, values = torch.zeros(4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    for place, head in enumerate(order):
        scores, new_scores = before.q[head].T @ before.k[head], after.q[place].T @ after.k[place]
        outputs, new_outputs = before.o[head] @ before.v[head], after.o[place] @ after.v[place]
        keys[head] = (query @ (scores - new_scores) @ read).norm() ** 2 / (query @ scores @ read).norm() ** 2
        values[head] = ((outputs - new_outputs) @ read).norm() ** 2 / (outputs @ read).norm() ** 2
    return keys, values


@pytest.mark.parametrize("changes", SHARED.values(), ids=SHARED)
@pytest.mark.parametrize("n_kv_head", [2, 1])
@pytest.mark.parametrize("measured", [False, True])
def test_sharing_is_the_conversion_with_its_errors(changes: dict[str, Any], n_kv_head: int, measured: bool) -> None:
    model, ids = inspected(**changes), text()
    statistics = collect_statistics(model, [text(seed=3)]) if measured else None
    shared = share_keys(model, n_kv_head, ids, statistics=statistics)
    assert shared.model.config == dataclasses.replace(model.config, n_kv_head=n_kv_head)
    if n_kv_head == model.config.kv_heads:
        assert same_state(shared.model, model)
        # Equal matrices multiplied in another place of a batch may differ in the last bit, depending on the processor.
        assert all(errors.abs().max() < 1e-12 for errors in (*shared.errors, *shared.layer_errors))
    else:
        expected = regroup(model, n_kv_head, statistics=statistics)
        close(shared.losses_after, token_losses(expected, ids), 2e-5)
        assert shared.layer_errors.keys.min() > 1e-3
    close(shared.losses_before, token_losses(model, ids), 0.0)
    assert shared.loss_after == pytest.approx(shared.losses_after.mean().item(), abs=1e-6)
    for layer, groups in enumerate(shared.groups):
        assert {len(group) for group in groups} == {4 // n_kv_head}
        order = [head for group in groups for head in group]
        assert sorted(order) == [0, 1, 2, 3]
        moments = assumed_statistics(model.blocks[layer]) if statistics is None else statistics[layer]
        keys, values = lost(model, shared.model, layer, order, moments)
        close(shared.errors.keys[layer], keys, 1e-8)
        close(shared.errors.values[layer], values, 1e-8)


def test_the_error_of_a_layer_is_that_of_the_conversion_of_neighbours() -> None:
    model, ids = inspected(), text()
    shared = share_keys(model, 2, ids, grouping="contiguous", method="mean")
    assert shared.groups == (((0, 1), (2, 3)),) * 3
    for layer in range(3):
        heads = [read_heads(one.blocks[layer].attn) for one in (model, shared.model)]
        errors = circuit_errors(heads[0], heads[1], assumed_statistics(model.blocks[layer]))
        assert shared.layer_errors.keys[layer].item() == pytest.approx(errors[0], rel=1e-12)
        assert shared.layer_errors.values[layer].item() == pytest.approx(errors[1], rel=1e-12)


def test_heads_come_back_in_the_order_of_the_source() -> None:
    model, ids = inspected(position="rope"), text()
    orders = [[2, 0, 3, 1], [1, 3, 0, 2], [3, 2, 1, 0]]
    groups = tuple(((a, b), (c, d)) for a, b, c, d in orders)
    moved = dataclasses.replace(share_keys(model, 2, ids), groups=groups, model=permute_heads(model, orders))
    before, after = attention_maps(model, ids), attention_maps(moved.model, ids)
    for layer in range(3):
        close(moved.in_source_order(after[layer], layer), before[layer])
        assert (after[layer] - before[layer]).abs().max() > 0.1


def test_another_text_needs_no_other_conversion() -> None:
    model, ids, other = inspected(position="rope"), text(), text(20, seed=8)
    shared = share_keys(model, 1, ids)
    again = shared.on(other)
    assert again.model is shared.model
    assert torch.equal(again.losses_after, token_losses(shared.model, other))
    assert torch.equal(again.losses_before, token_losses(model, other))


def test_what_cannot_be_shared_is_refused() -> None:
    model, ids = inspected(n_kv_head=2), text()
    for n in (4, 3, 0):
        with pytest.raises(GptlabError, match="possible: 1, 2"):
            share_keys(model, n, ids)
    with pytest.raises(GptlabError, match="method must be one of"):
        share_keys(model, 1, ids, method="median")  # type: ignore[arg-type]
    whole = inspected()
    quantise_model(whole, 8)
    with pytest.raises(GptlabError, match="8 bits; load it in float32"):
        share_keys(whole, 2, ids)
