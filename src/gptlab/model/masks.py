"""The only place that says which keys a query may see."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

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
    def _numbers(self) -> tuple[int | None, int | None, int | None]:
        """The last arguments of `_sees`."""
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
        return _sees(q, k, together, *self._numbers)

    def mask_mod(self, queries: Tokens, keys: Tokens) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
        """Return `visible` as FlexAttention asks for it: a function of the indices (b, h, q, k) of one pair.

        What it captures are tensors whose sizes do not depend on the number of tokens: the code that is compiled for
        one window, and one length, serves all others. Where a whole model is compiled, all is taken as it is.
        """
        own = keys is queries and queries.in_order  # then a token's index is its position
        numbers: Sequence[int | Tensor | None] = self._numbers
        if not torch.compiler.is_compiling():
            device = queries.positions.device
            numbers = [None if n is None else torch.full((), n, device=device) for n in self._numbers]
        q_positions, k_positions = (None if own else _fixed_size(t.positions) for t in (queries, keys))
        q_documents = k_documents = None
        if queries.documents is not None and keys.documents is not None:
            q_documents, k_documents = (_fixed_size(d) for d in (queries.documents, keys.documents))

        def seen(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            together = None
            if q_documents is not None and k_documents is not None:
                together = q_documents[b, q] == k_documents[b, k]
            if q_positions is not None and k_positions is not None:
                q, k = q_positions[b, q], k_positions[b, k]
            return _sees(q, k, together, *numbers)

        return seen

    def blocks(self, queries: Tokens, keys: Tokens, size: int) -> tuple[Tensor, Tensor]:
        """Divide queries and keys into blocks: where may any query see any key, and where does each see all?

        Told from the least and greatest position and document of each block. The first answer may be yes where no
        pair is visible, the second no where all are; never the other way round.

        Returns:
            Two (B, ceil(Tq / size), ceil(Tk / size)) bool.
        """
        far = torch.iinfo(torch.int64).max
        q, k = queries.positions, keys.positions
        q_low, q_high = (x[..., None] for x in _extremes(q, size))  # (B, nQ, 1)
        k_low, k_high = (x[:, None] for x in _extremes(k, size))  # (B, 1, nK)
        q_first = _extremes(q.masked_fill(q == PADDING, far), size)[0][..., None]  # the lowest that is no padding
        k_first = _extremes(k.masked_fill(k == PADDING, far), size)[0][:, None]
        some = k_first <= q_high
        every = (k_low != PADDING) & (k_high <= q_first)
        if self.span is not None:
            some &= (q_first - k_high < self.span) | (k_first < self.sinks)
            near = q_high - k_low < (self.span if self.dilation == 1 else 0)
            every &= near | (k_high < self.sinks)
        if queries.documents is not None and keys.documents is not None:
            q_from, q_to = (x[..., None] for x in _extremes(queries.documents, size))
            k_from, k_to = (x[:, None] for x in _extremes(keys.documents, size))
            some &= (q_from <= k_to) & (k_from <= q_to)
            every &= (q_from == k_to) & (k_from == q_to)
        for block, x in ((every, k), (every.mT, q)):  # a last block that is not whole is not full
            block &= torch.arange(1, block.shape[-1] + 1, device=x.device) * size <= x.shape[1]
        return some | (q_low == PADDING), every

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


def _sees(
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


def _extremes(x: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Least and greatest of each block: (B, T) -> twice (B, ceil(T / size)). The last token fills the last block up."""
    n = -(-x.shape[1] // size)
    index = torch.arange(n * size, device=x.device).clamp(max=x.shape[1] - 1)
    low, high = x[:, index].unflatten(1, (n, size)).aminmax(dim=-1)
    return low, high


def _fixed_size(x: Tensor) -> Tensor:
    """(B, T) -> (B, the next power of two), a size that compiled code may take as given."""
    if not torch.compiler.is_compiling():
        x = F.pad(x, (0, (1 << (x.shape[1] - 1).bit_length()) - x.shape[1]))
        torch._dynamo.mark_static(x)
    return x
