"""A model converted on the spot to fewer key/value heads, and what was lost by it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from gptlab.conversion.circuits import head_energies
from gptlab.conversion.heads import (
    Grouping,
    Method,
    best_grouping,
    best_method,
    check_method,
    group_heads,
    permute_heads,
    regroup,
    repeat_heads,
)
from gptlab.conversion.layers import read_heads
from gptlab.conversion.statistics import Moments, assumed_statistics
from gptlab.errors import GptlabError
from gptlab.inspecting.losses import token_losses
from gptlab.model.gpt import GPT
from gptlab.model.quantised import bits_of

LEAST = torch.finfo(torch.float64).tiny
"""Of an energy that is divided by: a head that reads nothing has none, and loses nothing."""


class CircuitErrors(NamedTuple):
    """The energy that circuits lost, as a share of their own: 0 for none, 1 for all (`gptlab.conversion.circuits`).

    Attributes:
        keys: float64, of QK: where a head looks. With rotary positions that of tokens at the same place.
        values: float64, of OV: what it writes.
    """

    keys: Tensor
    values: Tensor


@dataclass(frozen=True, eq=False)
class Sharing:
    """A model with fewer key/value heads.

    Attributes:
        source: the model as it was.
        model: the converted model, with weights of its own.
        groups: for each layer the query heads of the source that share a key and a value, group by group. Heads of the
            converted model stand in this order.
        errors: (n_layer, n_head) each, by the source's heads.
        layer_errors: (n_layer,) each, of all heads of a layer together.
        losses_before: (T - 1,) float32 nats of each token of a text after the first.
        losses_after: the same of the converted model.
    """

    source: GPT
    model: GPT
    groups: tuple[tuple[tuple[int, ...], ...], ...]
    errors: CircuitErrors
    layer_errors: CircuitErrors
    losses_before: Tensor
    losses_after: Tensor

    @property
    def loss_before(self) -> float:
        """Mean loss of the text in nats per token."""
        return self.losses_before.cpu().double().mean().item()

    @property
    def loss_after(self) -> float:
        """The same of the converted model."""
        return self.losses_after.cpu().double().mean().item()

    def on(self, ids: Tensor | Sequence[int]) -> Sharing:
        """Return the same conversion with the losses of another text, (T,) int64: nothing is converted again."""
        return dataclasses.replace(
            self, losses_before=token_losses(self.source, ids), losses_after=token_losses(self.model, ids)
        )

    def in_source_order(self, by_head: Tensor, layer: int) -> Tensor:
        """Put what the converted model has for each head of a layer, (H, ...), into the order of the source's heads."""
        order = torch.tensor([head for group in self.groups[layer] for head in group], device=by_head.device)
        return by_head[order.argsort()]


def share_keys(
    model: GPT,
    n_kv_head: int,
    ids: Tensor | Sequence[int],
    *,
    statistics: Sequence[Moments] | None = None,
    method: Method | None = None,
    grouping: Grouping | None = None,
) -> Sharing:
    """Let the query heads of a model share fewer keys and values, in closed form, and measure what that costs.

    Args:
        model: its weights in floats.
        n_kv_head: key/value heads of the result: a divisor of ``n_head``, at most the source's own.
        ids: (T,) int64, the text to measure the loss on.
        statistics: of every layer's inputs, as `gptlab.conversion.statistics.collect_statistics` measures them, best
            on another text than ``ids``; None is what the layer norms alone tell.
        method: how; None is the best for the model's positions (`gptlab.conversion.heads`).
        grouping: which heads share; None is the best for the method.

    Raises:
        GptlabError: an impossible number or method, a quantised model, or ids that the model cannot read.
    """
    config = model.config
    if (bits := bits_of(model)) is not None:
        raise GptlabError(f"the model's weights are whole numbers of {bits} bits; load it in float32 to share its keys")
    method = best_method(config) if method is None else method
    check_method(config, method)
    grouping = best_grouping(method) if grouping is None else grouping
    if n_kv_head == config.kv_heads:
        orders = [list(range(config.n_head))] * config.n_layer
        source, new = model, repeat_heads(model, n_kv_head)
    else:
        orders = group_heads(model, n_kv_head, grouping=grouping, statistics=statistics)
        source = permute_heads(repeat_heads(model), orders)
        new = regroup(source, n_kv_head, method=method, grouping="contiguous", statistics=statistics)
    by_head = torch.zeros(2, config.n_layer, config.n_head, dtype=torch.float64)
    by_layer = torch.zeros(2, config.n_layer, dtype=torch.float64)
    for layer, order in enumerate(orders):
        moments = assumed_statistics(model.blocks[layer]) if statistics is None else statistics[layer]
        heads = [read_heads(one.blocks[layer].attn) for one in (source, new)]
        lost, whole = head_energies(heads[0], heads[1], moments)
        lost = lost.clamp(min=0.0)  # where nothing is lost, rounding may say less than nothing
        by_head[:, layer, order] = lost / whole.clamp(min=LEAST)
        by_layer[:, layer] = lost.sum(1) / whole.sum(1).clamp(min=LEAST)
    size = config.n_head // n_kv_head
    groups = tuple(tuple(tuple(order[i : i + size]) for i in range(0, len(order), size)) for order in orders)
    errors, layer_errors = CircuitErrors(*by_head), CircuitErrors(*by_layer)
    return Sharing(model, new, groups, errors, layer_errors, token_losses(model, ids), token_losses(new, ids))
