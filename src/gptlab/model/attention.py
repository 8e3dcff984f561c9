"""Multi-head causal self-attention (Vaswani et al. 2017, section 3.2; Radford et al. 2019)."""

from __future__ import annotations

from torch import Tensor, nn

from gptlab.config import ModelConfig
from gptlab.model import kernels
from gptlab.model.cache import Full
from gptlab.model.linear import Linear
from gptlab.model.masks import Tokens, Visibility


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visibility: Visibility,
    tokens: Tokens,
    cache: Full | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Let each query gather the values of the keys that it may see.

    Args:
        q: (B, H, T, D) queries of the new tokens.
        k: (B, H_kv, T, D) their keys.
        v: (B, H_kv, T, D) their values.
        visibility: which keys a query may see.
        tokens: where the new tokens stand.
        cache: keys and values of earlier tokens; the new ones are added to it.
        dropout: probability with which an attention weight is dropped.

    Returns:
        (B, H, T, D) in q's dtype.
    """
    keys = tokens
    if cache is not None:
        k, v, keys = cache.append(k, v, tokens)
    return kernels.select()(q, k, v, visibility, tokens, keys, dropout)


class CausalSelfAttention(nn.Module):
    """Project to queries, keys and values; attend in each head; project back.

    ``c_attn`` is one product for all three: its (H + 2 * H_kv) * D rows are q, then k, then v, and within
    each, head h owns rows h * D to (h + 1) * D.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.n_head, self.n_kv_head, self.head_dim = config.n_head, config.kv_heads, config.head_dim
        self.visibility = Visibility()
        self.dropout = config.dropout
        rows = (self.n_head + 2 * self.n_kv_head) * self.head_dim
        self.c_attn = Linear(config.n_embd, rows, bias=config.bias)
        self.c_proj = Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, T, C) -> q (B, H, T, D), k (B, H_kv, T, D), v (B, H_kv, T, D)."""
        heads = self.c_attn(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, H + 2 H_kv, T, D)
        q, k, v = heads.split([self.n_head, self.n_kv_head, self.n_kv_head], dim=1)
        return q, k, v

    def forward(self, x: Tensor, tokens: Tokens, cache: Full | None = None) -> Tensor:  # (B, T, C) -> (B, T, C)
        q, k, v = self.project(x)
        dropout = self.dropout if self.training else 0.0
        y = attend(q, k, v, self.visibility, tokens, cache, dropout)  # (B, H, T, D)
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).flatten(2)))
