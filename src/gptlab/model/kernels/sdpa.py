"""Attention through PyTorch's fused `scaled_dot_product_attention`."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from gptlab.model.masks import Tokens, Visibility


def sdpa(
    q: Tensor, k: Tensor, v: Tensor, visibility: Visibility, queries: Tokens, keys: Tokens, dropout: float = 0.0
) -> Tensor:
    """Return what `reference` returns; a mask is built only where the shape of the visibility is not known."""
    shape = visibility.shape(queries, keys)
    mask = visibility.visible(queries, keys)[:, None] if shape is None else None  # (B, 1, Tq, Tk)
    return F.scaled_dot_product_attention(
        q,
        k.to(q.dtype),
        v.to(q.dtype),
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=shape == "causal",
        enable_gqa=q.shape[1] != k.shape[1],
    )
