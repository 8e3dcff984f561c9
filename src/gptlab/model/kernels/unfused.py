"""Attention as separate products and a softmax, in blocks of queries, whose weights are kept for the backward pass.

Fused operators compute the weights again in the backward pass, to save memory. On a CPU they also multiply bfloat16 far
below the processor's rate, which plain products reach: for short sequences this is the fastest training there is.
Memory is that of all weights that are not zero, O(T * W) and without a window O(T^2 / 2), in the dtype of the queries.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gptlab.errors import GptlabError
from gptlab.model.kernels.banded import applies, blocks, fold, unfold
from gptlab.model.kernels.inputs import Inputs


def unfused(inputs: Inputs) -> Tensor:
    """Return what `reference` returns, for whole sequences; scores and softmax are float32.

    Raises:
        GptlabError: forced where `applies` says no.
    """
    if not applies(inputs):
        raise GptlabError("the unfused kernel needs whole sequences without padding or cache, and no dropout")
    q, to_sinks = inputs.q, inputs.q if inputs.q_sinks is None else inputs.q_sinks
    k, v = inputs.k.to(q.dtype), inputs.v.to(q.dtype)
    group, scale = q.shape[1] // k.shape[1], 1 / math.sqrt(q.shape[-1])
    y = torch.empty_like(q)
    for pieces in blocks(inputs.visibility, inputs.queries):
        scores = []
        for piece, queries in zip(pieces, (q, to_sinks), strict=False):
            product = fold(queries, piece.rows, group) @ k[:, :, piece.keys].mT
            scores.append(product.float().mul_(scale).add_(piece.mask_for(group)))
        weights = torch.softmax(scores[0] if len(scores) == 1 else torch.cat(scores, -1), -1).to(v.dtype)
        shares = weights.split([score.shape[-1] for score in scores], -1)
        out = sum(share @ v[:, :, piece.keys] for share, piece in zip(shares, pieces, strict=True))
        unfold(y, pieces[0].rows, group)[:] = out.unflatten(2, (group, -1))
    return y
