"""How much of what learned positions say to a head is about distance, and so could be said by rotation."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gptlab.config import RopeConfig
from gptlab.conversion.layers import read_heads
from gptlab.errors import GptlabError
from gptlab.model.gpt import GPT
from gptlab.model.rope import frequencies


class RelativeShares(NamedTuple):
    """Shares of the variance of positional scores, 0 to 1.

    Attributes:
        distance: (L, H) float64, what a function of the distance explains at best.
        rotary: (L, H) float64, what a function explains that rotation can compute: a sum of sines and cosines of the
            distance with the frequencies of RoPE.
    """

    distance: Tensor
    rotary: Tensor


@torch.no_grad()
def relative_shares(model: GPT, length: int | None = None) -> RelativeShares:
    """Return for each head how far the scores that positions alone give depend on the distance alone.

    The score of key s for query t is p_t^T M_h p_s, with M_h = q_h^T k_h and p the rows of the table as the layer's
    norm would pass them on by themselves: centred over channels, times its gain. Only differences between the keys of
    one query count, for the softmax sees no others; s goes from 0 to t. In layers after the first the stream holds
    more of positions than the table's rows, which this does not see.

    Args:
        model: with learned positions; nothing but the table, the norms before attention, queries and keys counts.
        length: positions to look at, from 0; None is the whole table.

    Raises:
        GptlabError: a model without learned positions, or a length that the table does not have or that is under 3.
    """
    config = model.config
    if config.position != "learned":
        raise GptlabError(f"only learned positions are vectors to look at; this model has position={config.position!r}")
    length = config.context_length if length is None else length
    if not 3 <= length <= config.context_length:
        raise GptlabError(f"length must be 3 to {config.context_length:,} positions, got {length!r}")
    table = model.wpe.weight[:length].double().cpu()
    if config.norm == "layer":
        table = table - table.mean(1, keepdim=True)
    fit = _Fit(length, config.head_dim)
    distance, rotary = [], []
    for block in model.blocks:
        heads, read = read_heads(block.attn).expanded(), table * block.ln_1.weight.double().cpu()
        for q, k in zip(heads.q, heads.k, strict=True):
            by_distance, by_rotation = fit.shares((read @ q[:, :-1].T) @ (read @ k[:, :-1].T).T)
            distance.append(by_distance)
            rotary.append(by_rotation)
    shape = (config.n_layer, config.n_head)
    return RelativeShares(torch.stack(distance).view(shape), torch.stack(rotary).view(shape))


class _Fit:
    """Least squares of causal scores by a number for each query and a function of the distance.

    With the queries' numbers eliminated the function's normal equations are N f = r, where N[d, d'] is the number of
    queries that reach distance d, on the diagonal, less the sum of 1 / (t + 1) over the queries t that reach both. In
    the coordinates y = N^(-1/2) r what a family of functions explains is the squared length of y's projection.
    """

    def __init__(self, length: int, head_dim: int) -> None:
        reached = torch.arange(length)
        self.keys = reached.double() + 1  # of each query
        from_there = (1 / self.keys).flip(0).cumsum(0).flip(0)
        normal = torch.diag(length - reached.double()) - from_there[torch.maximum(reached[:, None], reached)]
        values, vectors = torch.linalg.eigh(normal)
        # The first is 0: the constant function, which the queries' numbers are.
        root = values[1:].sqrt()
        self.coordinates = (vectors[:, 1:] / root).T
        angles = reached.double()[:, None] * frequencies(RopeConfig(), head_dim, length)[0]
        waves = (vectors[:, 1:] * root).T @ torch.cat([angles.cos(), angles.sin()], 1)
        basis, sizes, _ = torch.linalg.svd(waves, full_matrices=False)
        self.waves = basis[:, sizes > 1e-12 * sizes[0]]
        self.seen = reached[:, None] >= reached
        self.distances = (reached[:, None] - reached)[self.seen]

    def shares(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """What a function of the distance, and what one of rotations, explains of (T, T) scores."""
        means = (scores * self.seen).sum(1) / self.keys
        rest = (scores - means[:, None])[self.seen]
        right = torch.zeros(len(scores), dtype=torch.float64).index_add_(0, self.distances, rest)
        found, variance = self.coordinates @ right, rest.square().sum()
        return found.square().sum() / variance, (self.waves.T @ found).square().sum() / variance
