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
        in_order: True when it is known that every row counts 0, 1, 2, ... without padding; documents may divide it.
    """

    positions: Tensor
    documents: Tensor | None = None
    plain: bool = False
    in_order: bool = False

    def first_row(self) -> Tokens:
        """Return the first row alone."""
        documents = None if self.documents is None else self.documents[:1]
        return Tokens(self.positions[:1], documents, self.plain, self.in_order)

    def at(self, where: slice) -> Tokens:
        """Return a part of every row."""
        documents = None if self.documents is None else self.documents[:, where]
        return Tokens(self.positions[:, where], documents)


@dataclass(frozen=True)
class Visibility:
    """Which keys a query may see: those of its own document, at its own position or before, within the window.

    Kernels and caches derive what they need from this class; none restates it.

    Attributes:
        window: a query at position i sees keys at i, i - dilation, ..., ``window`` of them, its own included
            (transformers' convention; FlashAttention's ``window_size`` is one less). None: all.
        sinks: keys at positions below this stay visible for ever (Xiao et al. 2023, *StreamingLLM*).
        dilation: distance between the keys of a window (Beltagy et al. 2020, *Longformer*).
    """

    window: int | None = None
    sinks: int = 0
    dilation: int = 1

    @property
    def span(self) -> int | None:
        """Positions from the oldest key of a window to the query, both included."""
        return None if self.window is None else (self.window - 1) * self.dilation + 1

    @property
    def farthest_sink(self) -> int | None:
        """The largest distance at which a sink is seen: as if it stood right before the window."""
        return None if self.span is None else self.span + self.sinks - 1

    @property
    def numbers(self) -> tuple[int | None, int | None, int | None]:
        """The last arguments of `sees`."""
        return self.span, self.sinks or None, self.dilation if self.dilation > 1 else None

    def visible(self, queries: Tokens, keys: Tokens) -> Tensor:
        """Return (B, Tq, Tk) bool: may this query see this key?

        A query that is padding sees everything: nothing reads its output, and a softmax over no key at
        all would be NaN, which spreads.
        """
        q, k = queries.positions[:, :, None], keys.positions[:, None, :]  # (B, Tq, 1), (B, 1, Tk)
        together = None
        if queries.documents is not None and keys.documents is not None:
            together = queries.documents[:, :, None] == keys.documents[:, None, :]
        return sees(q, k, together, *self.numbers)

    @property
    def left_right(self) -> tuple[int, int] | None:
        """FlashAttention's ``window_size``: keys before the query's own, and after it. None: it cannot say this."""
        if self.window is None:
            return -1, 0
        return None if self.sinks or self.dilation > 1 else (self.window - 1, 0)

    def shape(self, queries: Tokens, keys: Tokens) -> Literal["causal", "everything"] | None:
        """Name the shape of `visible` when it is known without looking at the tensors, else None.

        ``causal`` is the lower triangle of a square; ``everything`` is what one new token sees of a cache
        that ends with itself.
        """
        if not (queries.plain and keys.plain):
            return None
        n_queries, n_keys = queries.positions.shape[1], keys.positions.shape[1]
        if self.span is not None and (n_keys > self.span or self.dilation > 1):
            return None
        if keys is queries:
            return "causal"
        return "everything" if n_queries == 1 else None

    def capacity(self, length: int, chunk: int) -> int:
        """Return how many slots a cache needs for a sequence of ``length`` tokens, ``chunk`` at most at a time.

        The first query of a chunk still needs the keys of its whole window when the chunk's last key is stored.
        """
        return length if self.span is None else min(length, self.span + chunk - 1 + self.sinks)


def sees(
    q: Tensor,
    k: Tensor,
    together: Tensor | None,
    span: int | Tensor | None,
    sinks: int | Tensor | None,
    dilation: int | Tensor | None,
) -> Tensor:
    """May a query at position q see a key at position k? ``together``: are both of one document?"""
    seen = (k != PADDING) & (k <= q)
    if span is not None:
        near = q - k < span
        if dilation is not None:
            near = near & ((q - k) % dilation == 0)
        seen = seen & (near if sinks is None else near | (k < sinks))
    if together is not None:
        seen = seen & together
    return seen | (q == PADDING)
