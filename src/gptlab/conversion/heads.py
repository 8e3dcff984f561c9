"""Fewer key/value heads for a trained model: multi-head attention (MHA) to grouped-query attention (GQA).

Ainslie et al. 2023 (*GQA*) average the key and value projections of each group of heads and train on. Averaging is
arbitrary: the D directions that one head's keys use have nothing to do with those of the next. `regroup` asks instead
which shared key and value lose least of what the heads compute, given that queries and output projections may adapt;
`gptlab.conversion.circuits` has the mathematics, `gptlab.conversion.grouping` says which heads should share.

Exact, whatever the method: heads may be permuted (`permute_heads`), and repeated (`repeat_heads`). Exact with ``svd``
and ``procrustes``: weights of attention sum to 1, so the part of the values that is the same for all tokens, their bias
included, moves into the bias of ``c_proj``; and without rotary positions whatever is the same for all keys, their bias
included, drops out of the softmax.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from gptlab.config import ModelConfig, divisors
from gptlab.conversion.circuits import align, factorise, factorise_pairs
from gptlab.conversion.grouping import fitted_order
from gptlab.conversion.layers import Heads, read_heads, rebuild
from gptlab.conversion.statistics import Moments, assumed_statistics
from gptlab.errors import GptlabError, nearest
from gptlab.model.gpt import GPT

Method = Literal["svd", "uncentred", "activations", "procrustes", "mean", "first", "random"]
"""How heads come to share a key and a value:

- ``svd``: joint truncated factorisation of their circuits; not where positions rotate the keys.
- ``uncentred``: the same without what the softmax and biases make exact, as in closed forms of QK and OV that do not
  centre (A3, arXiv 2505.12942; KQ-SVD, 2512.05916). For comparison; nor does it go with rotated keys.
- ``activations``: the singular vectors of the keys, and of the values, that a text gives, whatever their use (Yu et al.
  2024, arXiv 2406.07056). For comparison; nor does it go with rotated keys.
- ``procrustes``: each head rotated to its group, then the mean. With rotary positions one rotation and scale for each
  pair of channels is all that a key may undergo, and the best of those is taken; values, which no position rotates, are
  factorised as ``svd`` does.
- ``mean``, ``first``, ``random``: the paper's three: the mean of the heads, the first of them, a new initialisation.
"""
Grouping = Literal["fitted", "contiguous"]
"""Which heads share: those that fit, or neighbours, as in the paper."""


FACTORISED: tuple[Method, ...] = ("svd", "uncentred", "activations")
"""Methods that mix the channels of a key freely."""
LOOKING: tuple[Method, ...] = (*FACTORISED, "procrustes")
"""Methods that look at what layers read; the paper's three look at weights alone."""


def rotates_keys(config: ModelConfig) -> bool:
    """Whether positions rotate queries and keys, which then are no longer free to be mixed."""
    return config.position not in ("learned", "none")


def best_method(config: ModelConfig) -> Method:
    """Return the method that loses least for a model."""
    return "procrustes" if rotates_keys(config) else "svd"


def regroup(
    model: GPT,
    n_kv_head: int,
    *,
    method: Method | None = None,
    grouping: Grouping | None = None,
    statistics: Sequence[Moments] | None = None,
    seed: int = 0,
) -> GPT:
    """Return a new model with fewer key/value heads that computes nearly the same; the source is left as it is.

    The query heads stay, in another order where ``grouping`` is ``fitted``. A source that has shared heads already is
    first given one for each query head, so that any smaller number that divides ``n_head`` can be reached.

    Args:
        model: the source.
        n_kv_head: key/value heads of the result: a divisor of ``n_head``, at most the source's own.
        method: see `Method`; None is `best_method`.
        grouping: see `Grouping`; None is ``fitted`` for ``svd`` and ``procrustes``, ``contiguous`` for the others.
        statistics: of every layer, from `collect_statistics`; None is what the layer norms alone tell. Not used by the
            paper's three, except to fit groups.
        seed: of ``random``: its keys and values are those of ``GPT(config, seed)``.

    Raises:
        GptlabError: an impossible ``n_kv_head``, an unknown method or grouping, ``svd`` for a model with rotary
            positions, statistics of another model.
    """
    config = model.config
    method = best_method(config) if method is None else method
    check_method(config, method)
    grouping = best_grouping(method) if grouping is None else grouping
    orders = group_heads(model, n_kv_head, grouping=grouping, statistics=statistics)
    moments = _moments(model, statistics)
    settings = {"n_kv_head": n_kv_head}
    fresh = GPT(ModelConfig.from_dict({**config.to_dict(), **settings}), seed) if method == "random" else None

    def change(layer: int, heads: Heads) -> Heads:
        heads = _permuted(heads.expanded(), orders[layer])
        if fresh is not None:
            new = read_heads(fresh.blocks[layer].attn)
            return heads._replace(k=new.k, v=new.v)
        if method in ("mean", "first"):
            k, v = (rows.unflatten(0, (n_kv_head, -1)) for rows in (heads.k, heads.v))
            return (
                heads._replace(k=k[:, 0], v=v[:, 0]) if method == "first" else heads._replace(k=k.mean(1), v=v.mean(1))
            )
        heads = _share_keys(heads, n_kv_head, method, moments[layer], rotated=rotates_keys(config))
        by = "svd" if method == "procrustes" and rotates_keys(config) else method
        return _share_values(heads, n_kv_head, by, moments[layer], bias=config.bias)

    return rebuild(model, change, **settings)


def _share_keys(heads: Heads, n_groups: int, method: Method, moments: Moments, *, rotated: bool) -> Heads:
    use = heads.q @ moments.uncentred @ heads.q.mT  # (H, D, D)
    if rotated:
        # A rotated key bias is not the same for all keys: it is one of the things to be kept.
        k, mix = factorise_pairs(heads.k, use, moments.uncentred, n_groups)
    elif method in ("uncentred", "activations"):
        k, mix = factorise(heads.k, use if method == "uncentred" else _any_use(use), moments.uncentred, n_groups)
    else:
        if method == "svd":
            k, mix = factorise(heads.k, use, moments.centred, n_groups)
        else:
            k, mix = align(heads.k, moments.centred, n_groups)
        k[..., -1] = 0.0
    return heads._replace(q=mix @ heads.q, k=k)


def _any_use(use: Tensor) -> Tensor:
    """Uses (H, D, D) that tell no direction and no head from another, of the same mean size."""
    return torch.eye(use.shape[-1], dtype=use.dtype).expand_as(use) * use.diagonal(dim1=1, dim2=2).mean()


def _share_values(heads: Heads, n_groups: int, method: Method, moments: Moments, *, bias: bool) -> Heads:
    folded = bias and method not in ("uncentred", "activations")
    moment = moments.centred if folded else moments.uncentred
    use = heads.o.mT @ heads.o
    if method == "procrustes":
        v, mix = align(heads.v, moment, n_groups)
    else:
        v, mix = factorise(heads.v, _any_use(use) if method == "activations" else use, moment, n_groups)
    o = heads.o @ mix.mT
    if not folded:
        return heads._replace(v=v, o=o)
    v[..., -1] = 0.0
    # What the mean input gives is the same for all tokens: let it be what it was.
    new = heads._replace(v=v, o=o)
    return new._replace(bias=heads.bias + _mean_output(heads, moments.mean) - _mean_output(new, moments.mean))


def _mean_output(heads: Heads, mean: Tensor) -> Tensor:
    """(C,): what all heads together write when every token's input is the mean (C,)."""
    values = heads.v @ torch.cat([mean, mean.new_ones(1)])  # (H_kv, D)
    return torch.einsum("hcd,hd->c", heads.o, values.repeat_interleave(len(heads.o) // len(values), 0))


def group_heads(
    model: GPT, n_kv_head: int, *, grouping: Grouping = "fitted", statistics: Sequence[Moments] | None = None
) -> list[list[int]]:
    """Return for each layer an order of the query heads in which those that share a key and a value are neighbours.

    Args:
        model: the source, and so for the next and ``statistics`` as in `regroup`.
        n_kv_head: number of groups.
        grouping: see `Grouping`.
        statistics: of every layer.

    Raises:
        GptlabError: as `regroup`.
    """
    config = model.config
    check_heads(config, n_kv_head)
    check_grouping(grouping)
    if grouping == "contiguous":
        return [list(range(config.n_head)) for _ in model.blocks]
    moments = _moments(model, statistics)
    return [
        fitted_order(read_heads(block.attn), moments[layer], n_kv_head, rotated=rotates_keys(config), bias=config.bias)
        for layer, block in enumerate(model.blocks)
    ]


def _moments(model: GPT, statistics: Sequence[Moments] | None) -> Sequence[Moments]:
    if statistics is None:
        return [assumed_statistics(block) for block in model.blocks]
    if [len(moments.mean) for moments in statistics] != [model.config.n_embd] * model.config.n_layer:
        raise GptlabError("the statistics are of another model; collect them from the one to convert")
    return statistics


def repeat_heads(model: GPT, n_kv_head: int | None = None) -> GPT:
    """Return a new model with more key/value heads, each a repetition: exactly the same function.

    Args:
        model: the source.
        n_kv_head: a multiple of the source's own that divides ``n_head``; None is one for every query head.

    Raises:
        GptlabError: any other number.
    """
    config = model.config
    n_kv_head = config.n_head if n_kv_head is None else n_kv_head
    check_heads(config, n_kv_head, more=True)
    times = n_kv_head // config.kv_heads

    def repeated(_: int, heads: Heads) -> Heads:
        return heads._replace(k=heads.k.repeat_interleave(times, 0), v=heads.v.repeat_interleave(times, 0))

    return rebuild(model, repeated, n_kv_head=n_kv_head)


def check_heads(config: ModelConfig, n_kv_head: int, *, more: bool = False) -> None:
    """Refuse numbers of key/value heads that a model cannot be given.

    Args:
        config: of the source.
        n_kv_head: the number asked for.
        more: by repetition; else by sharing.

    Raises:
        GptlabError: an impossible number; it names the possible ones.
    """
    has = config.kv_heads
    possible = [n for n in divisors(config.n_head) if (n % has == 0 if more else n <= has)]
    if n_kv_head not in possible:
        raise GptlabError(
            f"a model of {config.n_head} query heads and {has} key/value heads cannot be given {n_kv_head}"
            f" key/value heads{' by repetition' if more else ''}; possible: {', '.join(map(str, possible))}"
        )


def check_method(config: ModelConfig, method: str) -> None:
    """Refuse methods that do not exist or that a model's positions do not allow.

    Raises:
        GptlabError: one of the two.
    """
    if method not in get_args(Method):
        raise GptlabError(
            f"method must be one of {', '.join(get_args(Method))}, got {method!r}{nearest(method, get_args(Method))}"
        )
    if method in FACTORISED and rotates_keys(config):
        raise GptlabError(
            f"method {method!r} mixes the channels of a key freely, which rotary positions do not allow; use"
            " 'procrustes', or convert the heads of the model before its positions"
        )


def check_grouping(grouping: str) -> None:
    """Refuse groupings that do not exist.

    Raises:
        GptlabError: an unknown one.
    """
    if grouping not in get_args(Grouping):
        raise GptlabError(
            f"grouping must be fitted or contiguous, got {grouping!r}{nearest(grouping, get_args(Grouping))}"
        )


def best_grouping(method: Method) -> Grouping:
    """Return the grouping that goes with a method where none is asked for."""
    return "fitted" if method in ("svd", "uncentred", "procrustes") else "contiguous"


def permute_heads(model: GPT, orders: Sequence[Sequence[int]]) -> GPT:
    """Return a new model with the query heads of each layer in another order: exactly the same function.

    Args:
        model: the source.
        orders: for each layer, which old head comes first, second, ... Heads that share a key must stay neighbours.

    Raises:
        GptlabError: not one order for each layer, not every head once, or a group torn apart.
    """
    if len(orders) != model.config.n_layer:
        raise GptlabError(f"there are {len(orders)} orders for n_layer={model.config.n_layer}; give one for each layer")
    return rebuild(model, lambda layer, heads: _permuted(heads, orders[layer]))


def _permuted(heads: Heads, order: Sequence[int]) -> Heads:
    n_head, size = len(heads.q), len(heads.q) // len(heads.k)
    if sorted(order) != list(range(n_head)):
        raise GptlabError(f"an order of {n_head} heads must name each of 0 to {n_head - 1} once, got {list(order)}")
    groups = [head // size for head in order]
    if any(groups[i] != groups[i - i % size] for i in range(n_head)):
        raise GptlabError(
            f"heads that share a key/value head must stay neighbours, {size} by {size}, got {list(order)};"
            " use repeat_heads first"
        )
    queries, keys = torch.tensor(order), torch.tensor(groups[::size])
    return heads._replace(q=heads.q[queries], k=heads.k[keys], v=heads.v[keys], o=heads.o[queries])
