"""Causal self-attention, with its three switches.

Multi-head attention (Vaswani et al. 2017, section 3.2) as GPT-2 has it, and per configuration:

- grouped queries (Ainslie et al. 2023, *GQA*): H / H_kv query heads share each key/value head;
- sliding windows (Beltagy et al. 2020, *Longformer*): a query sees the last W keys only;
- rotary positions (Su et al. 2021, *RoFormer*): queries and keys are rotated by their positions.
"""

from __future__ import annotations

from torch import Tensor, nn

from gptlab.config import ModelConfig
from gptlab.model import kernels
from gptlab.model.cache import Full
from gptlab.model.linear import Linear
from gptlab.model.masks import Tokens, Visibility
from gptlab.model.rope import Rotary


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visibility: Visibility,
    tokens: Tokens,
    cache: Full | None = None,
    dropout: float = 0.0,
    q_sinks: Tensor | None = None,
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
        q_sinks: (B, H, T, D) queries as the sinks see them, where that differs.

    Returns:
        (B, H, T, D) in q's dtype.
    """
    keys = tokens
    if cache is not None:
        k, v, keys = cache.append(k, v, tokens)
    inputs = kernels.Inputs(q, k, v, visibility, tokens, keys, dropout, q_sinks)
    return kernels.select(inputs)(inputs)


class CausalSelfAttention(nn.Module):
    """Project to queries, keys and values; attend in each head; project back.

    ``c_attn`` is one product for all three: its (H + 2 * H_kv) * D rows are q, then k, then v, and within
    each, head h owns rows h * D to (h + 1) * D. Query head h reads key/value head h // (H / H_kv).

    Args:
        config: the architecture.
        layer: index of the block, from 0; windows may differ from layer to layer.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.n_head, self.n_kv_head, self.head_dim = config.n_head, config.kv_heads, config.head_dim
        self.visibility = Visibility(config.windows[layer], config.sinks, config.dilations[layer])
        self.dropout, self.score_factor = config.dropout, config.score_factors[layer]
        self.c_attn = Linear(config.n_embd, (self.n_head + 2 * self.n_kv_head) * self.head_dim, bias=config.bias)
        self.c_proj = Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)

    @property
    def sinks_at_most(self) -> int | None:
        """The position beyond which sinks see a query as if it stood there, or None where all keys see it alike."""
        return self.visibility.farthest_sink if self.visibility.sinks else None

    def project(self, x: Tensor, rotary: Rotary | None) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """(B, T, C) -> q (B, H, T, D), k (B, H_kv, T, D), v (B, H_kv, T, D), and q as the sinks see it or None."""
        heads = self.c_attn(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, H + 2 H_kv, T, D)
        q, k, v = heads.split([self.n_head, self.n_kv_head, self.n_kv_head], dim=1)
        if self.score_factor != 1.0:  # kernels divide scores by sqrt(D) and by nothing else
            q = q * self.score_factor
        if rotary is None:
            return q, k, v, None
        q_sinks = None if self.sinks_at_most is None else rotary.rotate(q, at_most=self.sinks_at_most)
        return rotary.rotate(q), rotary.rotate(k), v, q_sinks

    def weights(self, x: Tensor, tokens: Tokens, rotary: Rotary | None = None) -> Tensor:
        """Return the weights that `forward` gives the values, (B, H, T, T) float32, without a cache or dropout."""
        q, k, _, q_sinks = self.project(x, rotary)
        return kernels.attention_weights(q, k, self.visibility, tokens, tokens, q_sinks)

    def forward(
        self, x: Tensor, tokens: Tokens, rotary: Rotary | None = None, cache: Full | None = None
    ) -> Tensor:  # (B, T, C) -> (B, T, C)
        q, k, v, q_sinks = self.project(x, rotary)
        y = attend(q, k, v, self.visibility, tokens, cache, self.dropout * self.training, q_sinks)  # (B, H, T, D)
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).flatten(2)))
