"""Attention as the formula says it: slow, obvious, and the judge of every other kernel."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from gptlab.model.kernels.inputs import Inputs
from gptlab.model.masks import Tokens, Visibility


def attention_weights(
    q: Tensor, k: Tensor, visibility: Visibility, queries: Tokens, keys: Tokens, q_sinks: Tensor | None = None
) -> Tensor:
    """Return softmax(q k^T / sqrt(D)) over the visible keys: (B, H, Tq, Tk) float32; rows sum to 1.

    Args:
        q: (B, H, Tq, D).
        k: (B, H_kv, Tk, D); query head h reads key head h // (H / H_kv).
        visibility: which keys a query may see.
        queries: where the queries stand.
        keys: where the keys stand.
        q_sinks: (B, H, Tq, D), the queries as the sinks see them; None when they see them as the others do.
    """
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = q.float() @ k.float().transpose(-2, -1) / math.sqrt(q.shape[-1])  # (B, H, Tq, Tk)
    if q_sinks is not None:
        is_sink = ((keys.positions >= 0) & (keys.positions < visibility.sinks))[:, None, None, :]  # (B, 1, 1, Tk)
        scores = torch.where(is_sink, q_sinks.float() @ k.float().transpose(-2, -1) / math.sqrt(q.shape[-1]), scores)
    visible = visibility.visible(queries, keys)[:, None]  # (B, 1, Tq, Tk)
    return torch.softmax(scores.masked_fill(~visible, -math.inf), dim=-1)


def reference(inputs: Inputs) -> Tensor:
    """Return the weighted sum of the values, (B, H, Tq, D) in q's dtype."""
    q, k, v, visibility, queries, keys, dropout, q_sinks = inputs
    weights = F.dropout(attention_weights(q, k, visibility, queries, keys, q_sinks), dropout)
    v = v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)
    return (weights @ v.float()).to(q.dtype)
