"""Scores by distance against the formula in float64, moved texts against transformers."""

from __future__ import annotations

import cmath
import math
from typing import Any

import pytest
import torch
from helpers.inspected import CONTEXT, LENGTH, Theirs, inspected, text
from helpers.models import LLAMA, close
from torch import Tensor
from torch.nn import functional as F

from gptlab import GPT, GptlabError
from gptlab.inspecting import position_scores, shifted, token_losses, trace
from gptlab.model.quantised import quantise_model

ROTARY: dict[str, dict[str, Any]] = {
    "RoPE": {"position": "rope"},
    "Llama, GQA": {**LLAMA, "n_kv_head": 2},
    "base": {"position": "rope", "rope": {"theta": 300.0}, "n_kv_head": 1, "window": 6, "sinks": 1},
    "scores scaled by layer": {"position": "rope", "scale_attn_by_inverse_layer_idx": True},
}


def queries_and_keys(model: GPT, ids: Tensor, layer: int, head: int) -> tuple[Tensor, Tensor]:
    """(T, D) float64 each, before positions rotate them."""
    config, block, d = model.config, model.blocks[layer], model.config.head_dim
    x = trace(model, ids, [f"residual.{layer}"])[f"residual.{layer}"].double()
    if config.norm == "layer":
        z = F.layer_norm(x, (config.n_embd,), block.ln_1.weight.double(), block.ln_1.bias.double(), config.norm_eps)
    else:
        z = F.rms_norm(x, (config.n_embd,), block.ln_1.weight.double(), config.norm_eps)
    rows = z @ block.attn.c_attn.weight.double().T
    rows = rows if block.attn.c_attn.bias is None else rows + block.attn.c_attn.bias.double()
    key = config.n_embd + head * config.kv_heads // config.n_head * d
    return rows[:, head * d : head * d + d], rows[:, key : key + d]


@pytest.mark.parametrize("changes", ROTARY.values(), ids=ROTARY)
@pytest.mark.parametrize(("layer", "head"), [(0, 1), (2, 3)])
@torch.no_grad()
def test_scores_pair_by_pair_are_rotations_by_the_distance(changes: dict[str, Any], layer: int, head: int) -> None:
    model, ids = inspected(**changes), text()
    scores = position_scores(model, ids, layer, head)
    q, k = queries_and_keys(model, ids, layer, head)
    theta = changes.get("rope", {}).get("theta", 10000.0)
    by_layer = layer + 1 if "scale_attn_by_inverse_layer_idx" in changes else 1
    assert scores.pairs is not None
    assert scores.angles is not None
    for pair in range(4):
        a, b = (torch.complex(x[:, pair], x[:, pair + 4]) for x in (q, k))
        angle = theta ** (-pair / 4)
        assert scores.angles[pair].item() == pytest.approx(angle, rel=1e-12)
        for distance in (0, 1, 7, LENGTH - 1):
            turn = cmath.exp(-1j * distance * angle)
            rotated = [(a[i].conj() * b[i - distance] * turn).real for i in range(distance, LENGTH)]
            expected = torch.stack(rotated).mean().item() / (math.sqrt(8) * by_layer)
            assert scores.pairs[distance, pair].item() == pytest.approx(expected, abs=2e-5)
    assert scores.total.shape == (LENGTH,)
    close(scores.pairs.sum(1), scores.total)
    assert scores.note == ""


@torch.no_grad()
def test_without_rotation_there_is_a_sum_and_a_sentence() -> None:
    for position, words in (("learned", "learned positions are added"), ("none", "no positions")):
        model, ids = inspected(position=position, n_kv_head=2), text()
        scores = position_scores(model, ids, 1, 3)
        q, k = queries_and_keys(model, ids, 1, 3)
        expected = torch.stack([(q @ k.T).diagonal(-d).mean() for d in range(LENGTH)]) / math.sqrt(8)
        close(scores.total.double(), expected, 2e-5)
        assert scores.pairs is None
        assert scores.angles is None
        assert words in scores.note


@torch.no_grad()
def test_a_blend_rotates_as_far_as_its_scale_says() -> None:
    model, ids = inspected(position="blend"), text()
    model.rope_scale.copy_(torch.tensor([1.0, 0.5, 0.25, 0.0]))
    scores = position_scores(model, ids, 0, 0)
    assert scores.pairs is not None
    assert scores.angles is not None
    close(scores.angles, torch.tensor([1.0, 0.05, 0.0025, 0.0], dtype=torch.float64), 1e-12)
    q, k = queries_and_keys(model, ids, 0, 0)
    still = torch.stack([(q[:, [3, 7]] @ k[:, [3, 7]].T).diagonal(-d).mean() for d in range(LENGTH)])
    close(scores.pairs[:, 3].double(), still / math.sqrt(8), 2e-5)


def test_a_moved_text_is_what_transformers_makes_of_it(known: tuple[GPT, Tensor, Theirs]) -> None:
    model, ids, theirs = known
    shift = shifted(model, ids, 17)
    before, _ = theirs.at(torch.arange(LENGTH))
    after, maps = theirs.at(torch.arange(LENGTH) + 17)
    close(shift.losses_before, F.cross_entropy(before[:-1], ids[1:], reduction="none"), 2e-5)
    close(shift.losses_after, F.cross_entropy(after[:-1], ids[1:], reduction="none"), 2e-5)
    close(shift.maps_before, theirs.maps, 1e-5)
    close(shift.maps_after, maps, 1e-5)
    moves = model.config.has_table
    assert (shift.largest_loss_change > 0.1) == moves
    assert (shift.largest_weight_change > 0.1) == moves
    if not moves:
        assert shift.largest_loss_change < 2e-5
        assert shift.largest_weight_change < 1e-5
    assert shift.largest_weight_change == (shift.maps_after - shift.maps_before).abs().max()
    few = shifted(model, ids, 17, layers=[])
    assert few.largest_weight_change == shift.largest_weight_change
    assert few.maps_after.shape == (0, *shift.maps_after.shape[1:])
    assert shift.largest_loss_change == (shift.losses_after - shift.losses_before).abs().max()


def test_rotary_positions_have_no_end() -> None:
    model, ids = inspected(position="rope"), text()
    assert shifted(model, ids, 1_000_000, layers=[1]).largest_loss_change < 1e-4
    assert shifted(model, ids, 5, layers=[1]).maps_after.shape == (1, 4, LENGTH, LENGTH)


def test_quantised_weights_move_alike() -> None:
    model, ids = inspected(position="rope", n_kv_head=2), text()
    quantise_model(model, 8)
    assert shifted(model, ids, 100).largest_loss_change < 0.02
    assert position_scores(model, ids, 0, 0).total.abs().max() > 0.1


def test_moving_by_nothing_changes_nothing() -> None:
    model, ids = inspected(), text()
    shift = shifted(model, ids, 0)
    assert shift.largest_loss_change == 0
    close(shift.losses_before, token_losses(model, ids), 1e-5)


def test_what_cannot_be_moved_is_refused() -> None:
    model, ids = inspected(), text()
    shifted(model, ids, CONTEXT - LENGTH)
    for by, words in (
        (CONTEXT - LENGTH + 1, "40 tokens moved by 25 reach position 64.*end at 63; move them by at most 24"),
        (-1, "at least 0, got -1"),
        (1.5, "got 1.5"),
    ):
        with pytest.raises(GptlabError, match=words):
            shifted(model, ids, by)  # type: ignore[arg-type]
    with pytest.raises(GptlabError, match="head must be 0 to 3, got 4"):
        position_scores(model, ids, 0, 4)
