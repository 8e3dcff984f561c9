"""What the heads of a model look at, and how alike those are that share keys, or would.

Functions of explicit attention maps, as `GPT.attention_maps` returns them, and of key projections; `diagnose` applies
all of them to a model. Divergences are in nats.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.special import entr

from gptlab.model.gpt import GPT


@dataclass(frozen=True)
class LayerHeads:
    """The heads of one layer, on one text. Means are over all queries of all sequences.

    Attributes:
        entropy: (H,) mean entropy of where a head looks; 0 is a single token, log(t + 1) all of them alike.
        distance: (H,) mean number of tokens between a query and what it looks at.
        divergence: (H, H) Jensen-Shannon divergence between the maps of two heads, 0 to log 2.
        key_similarity: (H_kv, H_kv) `key_similarity` of the key projections.
        key_overlap: (H_kv, H_kv) mean squared `key_cosines`: of the directions that one key head reads, the share that
            the other reads too. Two random heads share D / C.
    """

    entropy: Tensor
    distance: Tensor
    divergence: Tensor
    key_similarity: Tensor
    key_overlap: Tensor


def diagnose(model: GPT, ids: Tensor) -> list[LayerHeads]:
    """Return what the heads of every layer do on a text.

    Args:
        model: in eval mode.
        ids: (B, T) int64 token ids, without padding.
    """
    return [_layer(model, ids, layer) for layer in range(model.config.n_layer)]


def _layer(model: GPT, ids: Tensor, layer: int) -> LayerHeads:
    entropies, distances, divergences = [], [], []
    for row in ids.split(1):  # one at a time: the maps of a sequence take 4 H T^2 bytes
        maps = model.attention_maps(row, layer)
        entropies.append(entropy(maps).mean((0, 2)))
        distances.append(distance(maps).mean((0, 2)))
        divergences.append(divergence(maps))
    keys = key_weights(model, layer)
    return LayerHeads(
        entropy=torch.stack(entropies).mean(0),
        distance=torch.stack(distances).mean(0),
        divergence=torch.stack(divergences).mean(0),
        key_similarity=key_similarity(keys),
        key_overlap=key_cosines(keys).square().mean(-1),
    )


def entropy(maps: Tensor) -> Tensor:
    """(B, H, T, T) attention maps -> (B, H, T) entropy of each query's distribution."""
    return entr(maps).sum(-1)


def distance(maps: Tensor) -> Tensor:
    """(B, H, T, T) attention maps -> (B, H, T) mean distance in tokens from each query to what it looks at."""
    places = torch.arange(maps.shape[-1], dtype=maps.dtype, device=maps.device)
    return places - maps @ places


def divergence(maps: Tensor) -> Tensor:
    """(B, H, T, T) attention maps -> (H, H) mean Jensen-Shannon divergence between the maps of two heads.

    Symmetric, 0 for equal maps, log 2 for heads that never look at the same token (Lin 1991).
    """
    own = entropy(maps)  # (B, H, T)
    n_head = maps.shape[1]
    divergences = maps.new_zeros(n_head, n_head)
    for h in range(n_head - 1):
        mixed = entropy((maps[:, h : h + 1] + maps[:, h + 1 :]) / 2)  # (B, H - h - 1, T)
        divergences[h, h + 1 :] = (mixed - (own[:, h : h + 1] + own[:, h + 1 :]) / 2).mean((0, 2))
    return (divergences + divergences.T).clamp(0.0, math.log(2))  # rounding may step outside by 1e-7


def key_weights(model: GPT, layer: int) -> Tensor:
    """Return how each key head of a layer reads the normalised residual stream: (H_kv, D, C) float32.

    The scale of the layer norm before it is part of the product. Its shift and the bias of the keys are not: they add
    the same to all keys, which the softmax does not see (as long as positions are learned).
    """
    config, block = model.config, model.blocks[layer]
    first = config.n_head * config.head_dim
    rows = block.attn.c_attn.weight[first : first + config.kv_heads * config.head_dim].detach().float()
    return (rows * block.ln_1.weight.detach().float()).unflatten(0, (config.kv_heads, config.head_dim))


def key_cosines(keys: Tensor) -> Tensor:
    """Return the cosines of the principal angles between the subspaces that two heads read.

    Args:
        keys: (H, D, C) key projections with D <= C.

    Returns:
        (H, H, D), descending, each 0 to 1: 1 for a direction that both see, 0 for one that is lost to the other.
    """
    bases = torch.linalg.qr(keys.mT).Q  # (H, C, D), orthonormal columns
    return torch.linalg.svdvals(bases.mT[:, None] @ bases[None]).clamp(max=1.0)


def key_similarity(keys: Tensor, covariance: Tensor | None = None) -> Tensor:
    """Return the linear CKA of the keys of two heads (Kornblith et al. 2019): (H, H), 0 to 1, symmetric.

    It does not change when a head's keys are rotated or scaled, which its queries can undo; unlike the overlap of
    subspaces it weighs directions by how strongly they are read.

    Args:
        keys: (H, D, C) key projections.
        covariance: (C, C) of what they read; by default uncorrelated channels of equal variance.
    """
    read = keys if covariance is None else keys @ covariance
    strength = (read[:, None] @ keys.mT[None]).square().sum((-2, -1))  # (H, H): |W_h S W_g^T|^2
    own = strength.diagonal().sqrt()
    return strength / (own[:, None] * own[None])
