"""What every kernel is given."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from gptlab.model.masks import Tokens, Visibility


class Inputs(NamedTuple):
    """The attention to compute.

    Attributes:
        q: (B, H, Tq, D).
        k: (B, H_kv, Tk, D); query head h reads key head h // (H / H_kv).
        v: (B, H_kv, Tk, D).
        visibility: which keys a query may see.
        queries: where the queries stand.
        keys: where the keys stand.
        dropout: probability with which a weight is dropped.
        q_sinks: (B, H, Tq, D), the queries as the sinks see them; None when they see them as the others do.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    visibility: Visibility
    queries: Tokens
    keys: Tokens
    dropout: float = 0.0
    q_sinks: Tensor | None = None

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Queries, keys, values and, where they differ, the queries of the sinks."""
        return (self.q, self.k, self.v) if self.q_sinks is None else (self.q, self.k, self.v, self.q_sinks)
