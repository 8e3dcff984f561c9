"""What positions do to attention: scores by distance, and a text moved to other positions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gptlab.errors import GptlabError
from gptlab.inspecting.attention import check_maps, hooked, layer_inputs
from gptlab.inspecting.losses import losses_at
from gptlab.inspecting.running import as_row, check_index, looking
from gptlab.model.gpt import GPT


@dataclass(frozen=True, eq=False)
class PositionScores:
    """The score that a head's queries give keys, by distance; means over all queries of a text that reach so far.

    Attributes:
        total: (T,) float32 mean score of the key ``d`` tokens before the query, as the softmax takes it: divided by the
            square root of D. Keys beyond a window are scored as if they were seen.
        pairs: (T, D / 2) float32, what each pair of rotated channels contributes; they add up to ``total``. None where
            positions do not rotate.
        angles: (D / 2,) float64, by how much each pair rotates per token, in radians; None likewise.
        note: in words, where there are no pairs, why.
    """

    total: Tensor
    pairs: Tensor | None
    angles: Tensor | None
    note: str


NO_PAIRS = {
    "learned": "learned positions are added to the embeddings and rotate nothing, so that a score has no pairs",
    "none": "the model has no positions, so that a score has no pairs",
}


def position_scores(model: GPT, ids: Tensor | Sequence[int], layer: int, head: int) -> PositionScores:
    """Return the scores of one head by distance, with rotary positions also pair by pair.

    Args:
        model: any variant, in any dtype.
        ids: (T,) int64.
        layer: from 0.
        head: query head, from 0.

    Raises:
        GptlabError: a layer or head that the model does not have, or ids that it cannot read.
    """
    row, config = as_row(model, ids), model.config
    check_index(config.n_layer, layer, "layer"), check_index(config.n_head, head, "head")
    seen: list[Tensor] = []

    def look(attention: Any, inputs: tuple[Any, ...]) -> None:
        z, _, rotary, *_ = inputs
        q, k, _, _ = attention.project(z, rotary)
        seen.extend((q[0, head].float(), k[0, head // (config.n_head // config.kv_heads)].float()))

    with looking(model):
        with hooked([model.blocks[layer].attn], look):
            model(row, head=lambda hidden, _: hidden)
        q, k = seen  # (T, D) each
        length, half = row.shape[1], config.head_dim // 2
        by_channel = torch.stack([(q[d:] * k[: length - d]).mean(0) for d in range(length)])
        by_channel = by_channel / math.sqrt(config.head_dim)  # (T, D)
    total = by_channel.sum(1)
    if not config.has_rotation:
        return PositionScores(total, None, None, NO_PAIRS[config.position])
    angles, _ = model.frequencies
    if config.position == "blend":
        angles = angles * model.rope_scale.cpu().double()
    return PositionScores(total, by_channel[:, :half] + by_channel[:, half:], angles, "")


@dataclass(frozen=True, eq=False)
class Shift:
    """A text at its own positions and moved.

    Attributes:
        by: by how many positions.
        losses_before: (T - 1,) float32 nats of each token after the first.
        losses_after: the same, moved.
        maps_before: (layers, H, T, T) float32 weights of attention.
        maps_after: the same, moved.
        largest_weight_change: by how much a weight of attention of any layer changed at most, 0 to 1.
    """

    by: int
    losses_before: Tensor
    losses_after: Tensor
    maps_before: Tensor
    maps_after: Tensor
    largest_weight_change: float

    @property
    def largest_loss_change(self) -> float:
        """Nats by which the loss of a token changed at most."""
        return (self.losses_after - self.losses_before).abs().max().item()


def shifted(model: GPT, ids: Tensor | Sequence[int], by: int, layers: Sequence[int] | None = None) -> Shift:
    """Return what a model makes of a text whose first token stands at position ``by`` in place of 0.

    With rotary positions nothing changes but the rounding of float32, whatever ``by``. Learned positions are other
    vectors, each of which was trained for its own place. Sinks are the first *positions*: a text that is moved past
    them has none.

    Args:
        model: any variant, in any dtype.
        ids: (T,) int64.
        by: positions, at least 0.
        layers: whose maps are kept; None: all, which take twice the memory of `attention_maps`.

    Raises:
        GptlabError: a negative number, or positions past the end of those learned.
    """
    row, config = as_row(model, ids, least=2), model.config
    if isinstance(by, bool) or not isinstance(by, int) or by < 0:
        raise GptlabError(f"by must be a whole number of positions, at least 0, got {by!r}")
    length = row.shape[1]
    if config.has_table and length + by > config.context_length:
        raise GptlabError(
            f"{length:,} tokens moved by {by:,} reach position {length + by - 1:,}, and the learned positions end at"
            f" {config.context_length - 1:,}; move them by at most {max(config.context_length - length, 0):,}"
        )
    kept = range(config.n_layer) if layers is None else layers
    for layer in kept:
        check_index(config.n_layer, layer, "layer")
    check_maps(config, 2 * len(kept) + 3, length, row.device)  # three more pass by
    places = torch.arange(length), torch.arange(length) + by
    before, after = (layer_inputs(model, ids, at) for at in places)
    maps = torch.empty(2, len(kept), config.n_head, length, length, device=row.device)
    largest = 0.0
    for layer in range(config.n_layer):
        pair = before.maps(layer), after.maps(layer)
        largest = max(largest, (pair[1] - pair[0]).abs_().max().item())
        for i in (i for i, own in enumerate(kept) if own == layer):
            maps[0, i], maps[1, i] = pair
    losses = [losses_at(model, ids, at) for at in places]
    return Shift(by, losses[0], losses[1], maps[0], maps[1], largest)
