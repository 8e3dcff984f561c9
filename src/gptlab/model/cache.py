"""The key/value cache: what lets a model read each token once.

A worked example, one row, four slots. After the prompt "a b" and the new token "c":

    slot        0  1  2  3
    key of      a  b  c  .
    position    0  1  2 -1

A batch of prompts of different lengths is padded; padding is not stored where a later token would have to
step around it. Row 1 below was the prompt ". a" (one token of padding, then "a"): its padding went behind the
real token, marked empty, and "c" overwrites it.

    position, row 0   0  1  2 -1
    position, row 1   0  1 -1 -1

A layer with a sliding window forgets what no query can see any more, so its cache is a ring. With window 3, one
sink and chunks of one token there are four slots: the sink's own, and three that are written in turn. After
six tokens "a" ... "f":

    slot        0  1  2  3
    key of      a  e  f  d
    position    0  4  5  3

What a query may see follows from the positions, never from the slot numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from gptlab.errors import GptlabError
from gptlab.model.masks import PADDING, Tokens, Visibility


class Full:
    """The keys and values of one layer that sees the whole past.

    Args:
        capacity: slots that a row may have.
        reserve: slots that it has from the start; more come as they are needed, each time twice as many. None: all.

    Attributes:
        k, v: (B, H_kv, S, D), S being the slots so far.
        positions: (B, S) int64, `PADDING` for an empty slot.
        counts: (B,) int64, the real tokens read in each row.
        used: a number of slots that no row exceeds.
    """

    def __init__(
        self,
        batch: int,
        n_kv_head: int,
        capacity: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        reserve: int | None = None,
    ) -> None:
        slots = capacity if reserve is None else min(max(reserve, 1), capacity)
        self.capacity = capacity
        self.k = torch.zeros(batch, n_kv_head, slots, head_dim, dtype=dtype, device=device)
        self.v = torch.zeros_like(self.k)
        self.positions = torch.full((batch, slots), PADDING, device=device)
        self.counts = torch.zeros(batch, dtype=torch.int64, device=device)
        self.seen = 0
        self.plain = True

    @property
    def used(self) -> int:
        """A number of slots, from the first on, that holds all that is stored."""
        return min(self.seen, self.capacity)

    def append(self, k: Tensor, v: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor, Tokens]:
        """Store the keys and values (B, H_kv, T, D) of new tokens; return all that a query may look at.

        Raises:
            GptlabError: more tokens than there is room for, or tokens that belong to documents.
        """
        if tokens.documents is not None:
            raise GptlabError("documents= and cache= cannot be combined: a cache continues one document a row")
        first, n_new = self.seen, k.shape[2]
        self.check_room(n_new)
        self.make_room(n_new)
        self.seen += n_new
        self.plain &= tokens.plain
        k, v = k.to(self.k.dtype), v.to(self.v.dtype)
        if self.plain:
            slots = self._slots(torch.arange(first, self.seen, device=k.device))
            self.k.index_copy_(2, slots, k)
            self.v.index_copy_(2, slots, v)
            self.positions.index_copy_(1, slots, tokens.positions.expand(k.shape[0], -1))
            self.counts += n_new
            if first == 0:  # nothing older to look at
                return k, v, tokens
        else:
            self._append_ragged(k, v, tokens.positions)
        keys = Tokens(self.positions[:, : self.used], plain=self.plain)
        return self.k[:, :, : self.used], self.v[:, :, : self.used], keys

    def check_room(self, n: int) -> None:
        """Raise a `GptlabError` when ``n`` more tokens do not fit."""
        if self.seen + n > self.capacity:
            raise GptlabError(
                f"the cache has {self.capacity} slots and {self.seen} are used: no room for {n} more tokens;"
                " make it with a larger length"
            )

    def missing(self, n: int) -> int:
        """Return how many slots will be added before ``n`` more tokens are stored: 0, or enough to double them."""
        slots, needed = self.k.shape[2], min(self.seen + n, self.capacity)
        return 0 if needed <= slots else min(max(needed, 2 * slots), self.capacity) - slots

    def make_room(self, n: int) -> None:
        """Add the slots that are `missing`. Until all are there a ring has not come round: no token moves."""
        if more := self.missing(n):
            self.k, self.v = (F.pad(x, (0, 0, 0, more)) for x in (self.k, self.v))
            self.positions = F.pad(self.positions, (0, more), value=PADDING)

    def _slots(self, numbers: Tensor) -> Tensor:
        """Where the tokens of these running numbers live."""
        return numbers

    def _append_ragged(self, k: Tensor, v: Tensor, positions: Tensor) -> None:
        real = positions != PADDING  # (B, T)
        n_real = real.sum(1, keepdim=True)
        # Real tokens take the next slots of their row, padding the slots behind them.
        order = torch.where(real, real.cumsum(1), n_real + (~real).cumsum(1)) - 1
        slots = self._slots(self.counts[:, None] + order)
        rows = torch.arange(k.shape[0], device=k.device)[:, None]
        self.k[rows, :, slots] = k.transpose(1, 2)
        self.v[rows, :, slots] = v.transpose(1, 2)
        self.positions[rows, slots] = positions
        self.counts += n_real[:, 0]

    def truncate(self, n: int) -> None:
        """Forget the last ``n`` real tokens of every row (all of them, where there are fewer).

        Raises:
            GptlabError: a negative number, or a ring that no longer holds what earlier tokens need to see.
        """
        self.check_truncate(n)
        numbers = self.counts[:, None] - 1 - torch.arange(n, device=self.counts.device)  # (B, n)
        self.positions.scatter_(1, self._slots(numbers.clamp(min=0)), PADDING)
        self.counts = (self.counts - n).clamp(min=0)
        self.seen = max(self.seen - n, 0)

    def check_truncate(self, n: int) -> None:
        """Raise a `GptlabError` when the last ``n`` tokens cannot be forgotten."""
        if n < 0:
            raise GptlabError(f"a cache can be truncated by 0 or more tokens, not by {n}")

    def keep(self, rows: list[int]) -> None:
        """Go on with some rows of the batch only."""
        self.k, self.v = self.k[rows], self.v[rows]
        self.positions, self.counts = self.positions[rows], self.counts[rows]
        self.seen = int(self.counts.max())

    def join(self, others: Sequence[Full]) -> None:
        """Take up the rows of other caches of this layer, of the same capacity, behind one's own."""
        layers = [self, *others]
        assert all(type(layer) is type(self) and layer.capacity == self.capacity for layer in others)
        slots = max(layer.k.shape[2] for layer in layers)
        more = [slots - layer.k.shape[2] for layer in layers]
        # One after the other, so that only one of them is there twice.
        self.k = torch.cat([F.pad(layer.k, (0, 0, 0, n)) for layer, n in zip(layers, more, strict=True)])
        self.v = torch.cat([F.pad(layer.v, (0, 0, 0, n)) for layer, n in zip(layers, more, strict=True)])
        positions = [F.pad(layer.positions, (0, n), value=PADDING) for layer, n in zip(layers, more, strict=True)]
        self.positions, self.counts = torch.cat(positions), torch.cat([layer.counts for layer in layers])
        self.plain = all(layer.plain and layer.seen == self.seen for layer in layers)
        self.seen = max(layer.seen for layer in layers)


class Ring(Full):
    """The keys and values of one layer with a sliding window: constant memory, for ever.

    Args:
        sinks: the first slots, which are never overwritten.
        chunk: most tokens that `append` may be given at once.
    """

    def __init__(
        self,
        batch: int,
        n_kv_head: int,
        capacity: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        reserve: int | None = None,
        *,
        sinks: int,
        chunk: int,
    ) -> None:
        super().__init__(batch, n_kv_head, capacity, head_dim, dtype, device, reserve)
        self.sinks, self.chunk = sinks, chunk
        self.written = torch.zeros_like(self.counts)  # tokens that ever took a slot, padding and forgotten ones too

    def check_room(self, n: int) -> None:
        if n > self.chunk:
            raise GptlabError(
                f"{n} tokens at once do not fit this cache's chunks of {self.chunk}; split them, or make the"
                " cache with a larger chunk"
            )

    def _slots(self, numbers: Tensor) -> Tensor:
        ring = self.sinks + (numbers - self.sinks) % (self.capacity - self.sinks)
        return torch.where(numbers < self.sinks, numbers, ring)

    def _append_ragged(self, k: Tensor, v: Tensor, positions: Tensor) -> None:
        self.written = torch.maximum(self.written, self.counts + k.shape[2])
        super()._append_ragged(k, v, positions)

    def check_truncate(self, n: int) -> None:
        super().check_truncate(n)
        written = torch.maximum(self.written, self.counts)
        back = written - (self.counts - n).clamp(min=0)
        if ((written > self.capacity) & (back > self.chunk)).any():
            raise GptlabError(
                f"this cache can take back its last {self.chunk} tokens, in one step or several, not {int(back.max())}:"
                " what earlier ones need to see is gone"
            )

    def truncate(self, n: int) -> None:
        self.check_truncate(n)
        self.written = torch.maximum(self.written, self.counts)
        super().truncate(n)

    def keep(self, rows: list[int]) -> None:
        super().keep(rows)
        self.written = self.written[rows]

    def join(self, others: Sequence[Full]) -> None:
        super().join(others)
        self.written = torch.cat([self.written, *(layer.written for layer in others if isinstance(layer, Ring))])


class Cache:
    """The caches of all layers of one model, for one batch of sequences.

    Args:
        visibilities: what each layer's queries may see; it decides between `Full` and `Ring`.
        batch: number of sequences, B.
        length: longest sequence, in tokens.
        chunk: most tokens at once, for layers with a window.
        n_kv_head: key/value heads.
        head_dim: their width, D.
        dtype: of keys and values.
        device: where they live.
        scales: those of a model between learned and rotary positions, as its keys are rotated by them.
        reserve: tokens to make room for at once; the rest of ``length`` when it is needed. None: all of it.

    Attributes:
        layers: one `Full` or `Ring` per block.
    """

    def __init__(
        self,
        visibilities: list[Visibility],
        *,
        batch: int,
        length: int,
        chunk: int,
        n_kv_head: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        scales: Mapping[str, Tensor] = {},
        reserve: int | None = None,
    ) -> None:
        self.layers: list[Full] = []
        self.scales = {name: scale.clone() for name, scale in scales.items()}
        for visibility in visibilities:
            capacity = visibility.capacity(length, chunk)
            shape = (batch, n_kv_head, capacity, head_dim, dtype, device, reserve)
            ring = capacity < length
            self.layers.append(Ring(*shape, sinks=visibility.sinks, chunk=chunk) if ring else Full(*shape))

    def describe(self, ids: Tensor, documents: Tensor | None = None) -> Tokens:
        """Say where new ``ids`` (B, T) stand when every row simply goes on.

        Raises:
            GptlabError: they do not fit; said here, before a position is looked up that does not exist.
        """
        self.check_room(ids.shape[1])
        first = self.layers[0]
        offsets = torch.arange(ids.shape[1], device=ids.device)
        plain = first.plain and documents is None
        return Tokens(first.counts[:, None] + offsets, documents, plain=plain, in_order=plain and first.seen == 0)

    def check_scales(self, scales: Mapping[str, Tensor]) -> None:
        """Raise a `GptlabError` unless these are the scales that the cache was made at."""
        same = scales.keys() == self.scales.keys()
        if not same or not all(torch.equal(scale, self.scales[name]) for name, scale in scales.items()):
            raise GptlabError(
                "this cache was made when the model's rope_scale and wpe_scale had other values: its keys are rotated"
                " otherwise; make a new one"
            )

    def check_room(self, n: int) -> None:
        """Raise a `GptlabError` when ``n`` more tokens do not fit, before any layer has taken them."""
        for layer in self.layers:
            layer.check_room(n)

    def make_room(self, n: int) -> None:
        """Add the slots that ``n`` more tokens need, in every layer."""
        for layer in self.layers:
            layer.make_room(n)

    def advance(self, n: int) -> None:
        """Count ``n`` tokens in every row that a decoder has stored in the slots itself."""
        for layer in self.layers:
            layer.seen += n
            layer.counts += n

    def growth(self, n: int) -> int:
        """Return the bytes that must be free before ``n`` more tokens can be stored: mostly 0."""
        added, copied = 0, 0
        for layer in self.layers:
            if missing := layer.missing(n):
                held = layer.k.nbytes + layer.v.nbytes
                added += held // layer.k.shape[2] * missing
                copied = max(copied, held)  # one layer after the other is there twice, for a moment
        return added + copied

    def truncate(self, n: int) -> None:
        """Forget the last ``n`` tokens of every row, in every layer or, when one refuses, in none."""
        for layer in self.layers:
            layer.check_truncate(n)
        for layer in self.layers:
            layer.truncate(n)

    def keep(self, rows: list[int]) -> None:
        """Go on with some rows of the batch only, in every layer."""
        for layer in self.layers:
            layer.keep(rows)

    def join(self, others: Sequence[Cache]) -> None:
        """Take up the rows of other caches behind one's own, in every layer.

        Args:
            others: of the same model, made for the same ``length`` and ``chunk``; they must not be used afterwards.
        """
        for i, layer in enumerate(self.layers):
            layer.join([other.layers[i] for other in others])

    @property
    def nbytes(self) -> int:
        """Bytes held by keys and values so far."""
        return sum(layer.k.nbytes + layer.v.nbytes for layer in self.layers)
