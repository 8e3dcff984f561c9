"""Which heads should share a key and a value: those whose circuits one shared read keeps best.

The number of ways to divide heads is too large to try all (5,775 for 12 heads in groups of 4; 6e11 for 25 in groups of
5), and the loss of one group is an eigenvalue problem. So groups are first formed from the losses of all pairs, then
improved by exchanging two heads as long as the true loss falls. On GPT-2's own heads that found the best division
wherever all of them could be tried (layers 0, 5 and 11; 6, 4 and 3 groups).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gptlab.conversion.circuits import energies, pair_energies
from gptlab.conversion.layers import Heads
from gptlab.conversion.statistics import Moments

Loss = Callable[[tuple[int, ...]], float]
"""What a group of heads, ascending, loses by sharing."""

STARTS = 20
"""Random divisions from which the search over pairs begins, besides that into neighbours."""
TRIES = 40
"""Exchanges whose true loss is computed before a division counts as the best: those that the pairs favour."""
FALLS = 1e-9
"""Smaller differences of losses are rounding errors."""


def fitted_order(heads: Heads, moments: Moments, n_groups: int, *, rotated: bool, bias: bool) -> list[int]:
    """Return an order of the query heads of a layer in which each group of neighbours shares with little loss.

    Args:
        heads: the layer's.
        moments: of what it reads.
        n_groups: a divisor of the number of query heads.
        rotated: whether positions rotate its keys.
        bias: whether the model has biases.
    """
    n_head = len(heads.q)
    if n_groups in (1, n_head):
        return list(range(n_head))
    loss = group_loss(heads.expanded(), moments, rotated=rotated, bias=bias)
    pairs = torch.zeros(n_head, n_head, dtype=torch.float64)
    for a, b in itertools.combinations(range(n_head), 2):
        pairs[a, b] = pairs[b, a] = loss((a, b))
    groups = _improve(_divide(pairs, n_groups), pairs, loss)
    return [head for group in sorted(groups) for head in group]


def group_loss(heads: Heads, moments: Moments, *, rotated: bool, bias: bool) -> Loss:
    """Return the function that gives the energy that a group's QK and OV circuits lose if they share a key and a value.

    Each of the two as a share of the whole layer's energy; the sum over the groups of a division is from 0 to 2.
    Arguments as in `fitted_order`, with a key/value head for each query head.
    """
    use = heads.q @ moments.uncentred @ heads.q.mT
    values = energies(heads.v, heads.o.mT @ heads.o, moments.centred if bias else moments.uncentred)
    if rotated:
        keys = pair_energies(heads.k, use, moments.uncentred)
        all_keys = keys.diagonal(dim1=1, dim2=2).real.sum().item()
    else:
        keys = energies(heads.k, use, moments.centred)
        all_keys = _trace(keys)
    all_values = _trace(values)

    @functools.cache
    def loss(group: tuple[int, ...]) -> float:
        lost_keys = _lost_pairs(keys, group) if rotated else _lost(keys, group)
        # A layer whose keys or values are all 0 has nothing to lose.
        return lost_keys / (all_keys or 1.0) + _lost(values, group) / (all_values or 1.0)

    return loss


def _trace(gram: Tensor) -> float:
    return torch.einsum("hdhd->", gram).item()


def _lost(gram: Tensor, group: Sequence[int]) -> float:
    """(H, D, H, D) -> all but the D largest eigenvalues of a group's part."""
    width = gram.shape[1]
    chosen = torch.tensor(group)
    part = gram[chosen][:, :, chosen].flatten(2).flatten(0, 1)  # (g D, g D)
    return torch.linalg.eigvalsh(part)[:-width].clamp(min=0).sum().item()


def _lost_pairs(grams: Tensor, group: Sequence[int]) -> float:
    """(D / 2, H, H) -> all but the largest eigenvalue of a group's part, summed over the pairs of channels."""
    chosen = torch.tensor(group)
    return torch.linalg.eigvalsh(grams[:, chosen][:, :, chosen])[:, :-1].clamp(min=0).sum().item()


def _divide(pairs: Tensor, n_groups: int) -> list[tuple[int, ...]]:
    """Divide heads into equal groups so that the sum of ``pairs`` (H, H) within them is small."""
    n_head = len(pairs)
    generator = torch.Generator().manual_seed(0)
    best, least = torch.arange(n_head), float("inf")
    for start in range(1 + STARTS):
        order = torch.randperm(n_head, generator=generator) if start else torch.arange(n_head)
        member = torch.empty_like(order)
        member[order] = torch.arange(n_head) // (n_head // n_groups)  # the group of each head
        while True:
            gains = _exchanges(pairs, member)
            place = gains.argmin()
            if gains.flatten()[place] > -FALLS:
                break
            a, b = divmod(int(place), n_head)
            member[[a, b]] = member[[b, a]]
        total = pairs[member[:, None] == member].sum().item()
        if total < least - FALLS:
            best, least = member, total
    return [tuple(torch.where(best == group)[0].tolist()) for group in range(n_groups)]


def _exchanges(pairs: Tensor, member: Tensor) -> Tensor:
    """Return by how much the sum of pairs within groups grows if heads a and b change places: (H, H)."""
    within = torch.nn.functional.one_hot(member).double()  # (H, G)
    to_group = pairs @ within  # (H, G)
    to_others = to_group[:, member]  # [a, b]: of a to b's group
    own = to_others.diagonal()
    gains = to_others + to_others.T - 2 * pairs - own[:, None] - own
    return gains.masked_fill(member[:, None] == member, 0.0)


def _improve(groups: list[tuple[int, ...]], pairs: Tensor, loss: Loss) -> list[tuple[int, ...]]:
    """Exchange heads of different groups as long as that lowers the loss."""
    n_head = len(pairs)
    improved = True
    while improved:
        improved = False
        home = {head: i for i, group in enumerate(groups) for head in group}
        member = torch.tensor([home[head] for head in range(n_head)])
        growth = _exchanges(pairs, member)
        candidates = [(a, b) for a, b in itertools.combinations(range(n_head), 2) if home[a] != home[b]]
        candidates.sort(key=lambda pair: growth[pair].item())
        for a, b in candidates[:TRIES]:
            i, j = home[a], home[b]
            first = tuple(sorted({*groups[i]} - {a} | {b}))
            second = tuple(sorted({*groups[j]} - {b} | {a}))
            if loss(first) + loss(second) < loss(groups[i]) + loss(groups[j]) - FALLS:
                groups[i], groups[j] = first, second
                improved = True
                break
    return groups
