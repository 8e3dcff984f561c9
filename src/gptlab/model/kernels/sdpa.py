"""Attention through PyTorch's fused `scaled_dot_product_attention`."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from gptlab.model.kernels.inputs import Inputs
from gptlab.model.linear import fast_bfloat16
from gptlab.model.masks import Tokens, Visibility


def sdpa(inputs: Inputs) -> Tensor:
    """Return what `reference` returns; a mask is built only where the shape of the visibility is not known."""
    q, k, v, visibility, queries, keys, dropout, q_sinks = inputs
    shape = visibility.shape(queries, keys)
    mask = visibility.visible(queries, keys)[:, None] if shape is None else None  # (B, 1, Tq, Tk)
    dtype = q.dtype
    if k.dtype == torch.bfloat16 and q.shape[2] > 1 and q.device.type == "cpu" and fast_bfloat16():
        q = q.bfloat16()  # a prompt is read in the precision of its cache, which is twice as fast
        q_sinks = None if q_sinks is None else q_sinks.bfloat16()
    scale, k, v = 1 / math.sqrt(q.shape[-1]), k.to(q.dtype), v.to(q.dtype)
    if q_sinks is not None:
        q, k = two_kinds_of_scores(q, q_sinks, k, visibility, keys)
    batch, n_head, n_queries, _ = q.shape
    n_kv_head = k.shape[1]
    if n_queries == 1 and n_head != n_kv_head:
        # Decoding: a group's queries become rows that share one key head, so that K and V are read once.
        q = q.view(batch, n_kv_head, n_head // n_kv_head, -1)
    y = F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=shape == "causal" and n_queries > 1,
        scale=scale,
        enable_gqa=q.shape[1] != n_kv_head,
    )
    return y.reshape(batch, n_head, n_queries, -1).to(dtype)


def two_kinds_of_scores(
    q: Tensor, q_sinks: Tensor, k: Tensor, visibility: Visibility, keys: Tokens
) -> tuple[Tensor, Tensor]:
    """Return q (B, H, Tq, 2D) and k (B, H_kv, Tk, 2D), whose product is q_sinks k^T for sinks and q k^T for other keys.

    Sinks meet the second half of a query, all other keys the first.
    """
    is_sink = ((keys.positions >= 0) & (keys.positions < visibility.sinks))[:, None, :, None]  # (B, 1, Tk, 1)
    k = torch.cat([k.masked_fill(is_sink, 0.0), k.masked_fill(~is_sink, 0.0)], dim=-1)
    return torch.cat([q, q_sinks], dim=-1), k
