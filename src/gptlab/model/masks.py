"""The only place that says which keys a query may see."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

PADDING = -1
"""The position of a token that is not there: padding of a ragged batch, or an empty slot of a cache."""


@dataclass(frozen=True, eq=False)
class Tokens:
    """Where the tokens of a batch stand.

    Attributes:
        positions: (B, T) int64, the index of each token in its own sequence; `PADDING` where there is none.
        documents: (B, T) int64 or None. Tokens of different documents do not see each other.
        plain: True when it is known without looking at the tensors that every row counts up by one, with
            neither padding nor documents. It opens shortcuts; it never changes a result.
    """

    positions: Tensor
    documents: Tensor | None = None
    plain: bool = False


@dataclass(frozen=True)
class Visibility:
    """Which keys a query may see: those of its own document, at its own position or before.

    Kernels and caches derive what they need from this class; none restates it.
    """

    def visible(self, queries: Tokens, keys: Tokens) -> Tensor:
        """Return (B, Tq, Tk) bool: may this query see this key?

        A query that is padding sees everything: nothing reads its output, and a softmax over no key at
        all would be NaN, which spreads.
        """
        q, k = queries.positions[:, :, None], keys.positions[:, None, :]  # (B, Tq, 1), (B, 1, Tk)
        seen = (k != PADDING) & (k <= q)
        if queries.documents is not None and keys.documents is not None:
            seen &= queries.documents[:, :, None] == keys.documents[:, None, :]
        return seen | (q == PADDING)

    def shape(self, queries: Tokens, keys: Tokens) -> Literal["causal", "everything"] | None:
        """Name the shape of `visible` when it is known without looking at the tensors, else None.

        ``causal`` is the lower triangle of a square; ``everything`` is what one new token sees of a cache
        that ends with itself.
        """
        if not (queries.plain and keys.plain):
            return None
        if keys is queries:
            return "causal"
        return "everything" if queries.positions.shape[1] == 1 else None

    def capacity(self, length: int) -> int:
        """Return how many slots a cache needs to serve a sequence of ``length`` tokens."""
        return length
