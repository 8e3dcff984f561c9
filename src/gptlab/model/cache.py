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

What a query may see follows from the positions, never from the slot numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gptlab.errors import GptlabError
from gptlab.model.masks import PADDING, Tokens, Visibility


class Full:
    """The keys and values of one layer that sees the whole past.

    Attributes:
        k, v: (B, H_kv, capacity, D).
        positions: (B, capacity) int64, `PADDING` for an empty slot.
        counts: (B,) int64, the real tokens stored in each row.
        used: a number of slots that no row exceeds.
    """

    def __init__(
        self, batch: int, n_kv_head: int, capacity: int, head_dim: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.k = torch.zeros(batch, n_kv_head, capacity, head_dim, dtype=dtype, device=device)
        self.v = torch.zeros_like(self.k)
        self.positions = torch.full((batch, capacity), PADDING, device=device)
        self.counts = torch.zeros(batch, dtype=torch.int64, device=device)
        self.used = 0
        self.plain = True

    @property
    def capacity(self) -> int:
        """How many tokens a row can hold."""
        return self.k.shape[2]

    def check_room(self, n: int) -> None:
        """Raise a `GptlabError` when ``n`` more tokens do not fit."""
        if self.used + n > self.capacity:
            raise GptlabError(
                f"the cache has {self.capacity} slots and {self.used} are used: no room for {n} more tokens;"
                " make it with a larger length"
            )

    def append(self, k: Tensor, v: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor, Tokens]:
        """Store the keys and values (B, H_kv, T, D) of new tokens; return all that a query may look at.

        Raises:
            GptlabError: more tokens than there are slots, or tokens that belong to documents.
        """
        if tokens.documents is not None:
            raise GptlabError("documents= and cache= cannot be combined: a cache continues one document a row")
        first, n_new = self.used, k.shape[2]
        self.check_room(n_new)
        self.used += n_new
        self.plain &= tokens.plain
        if self.plain:
            self.k[:, :, first : self.used] = k
            self.v[:, :, first : self.used] = v
            self.positions[:, first : self.used] = tokens.positions
            self.counts += n_new
            if first == 0:  # nothing older to look at
                return self.k[:, :, :n_new], self.v[:, :, :n_new], tokens
        else:
            self._append_ragged(k, v, tokens.positions)
        keys = Tokens(self.positions[:, : self.used], plain=self.plain)
        return self.k[:, :, : self.used], self.v[:, :, : self.used], keys

    def _append_ragged(self, k: Tensor, v: Tensor, positions: Tensor) -> None:
        real = positions != PADDING  # (B, T)
        n_real = real.sum(1, keepdim=True)
        # Real tokens take the next slots of their row, padding the slots behind them.
        order = torch.where(real, real.cumsum(1), n_real + (~real).cumsum(1)) - 1
        slots = self.counts[:, None] + order
        rows = torch.arange(k.shape[0], device=k.device)[:, None]
        self.k[rows, :, slots] = k.transpose(1, 2).to(self.k.dtype)
        self.v[rows, :, slots] = v.transpose(1, 2).to(self.v.dtype)
        self.positions[rows, slots] = positions
        self.counts += n_real[:, 0]

    def truncate(self, n: int) -> None:
        """Forget the last ``n`` real tokens of every row (all of them, where there are fewer)."""
        if n < 0:
            raise GptlabError(f"a cache can be truncated by 0 or more tokens, not by {n}")
        self.counts = (self.counts - n).clamp(min=0)
        self.used = max(self.used - n, 0)
        slots = torch.arange(self.capacity, device=self.positions.device)
        self.positions.masked_fill_(slots >= self.counts[:, None], PADDING)

    def keep(self, rows: list[int]) -> None:
        """Go on with some rows of the batch only."""
        self.k, self.v = self.k[rows], self.v[rows]
        self.positions, self.counts = self.positions[rows], self.counts[rows]
        self.used = int(self.counts.max())


class Cache:
    """The caches of all layers of one model, for one batch of sequences.

    Attributes:
        layers: one `Full` per block.
    """

    def __init__(
        self,
        visibilities: list[Visibility],
        *,
        batch: int,
        length: int,
        n_kv_head: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.layers = [
            Full(batch, n_kv_head, visibility.capacity(length), head_dim, dtype, device) for visibility in visibilities
        ]

    def describe(self, ids: Tensor, documents: Tensor | None = None) -> Tokens:
        """Say where new ``ids`` (B, T) stand when every row simply goes on.

        Raises:
            GptlabError: they do not fit; said here, before a position is looked up that does not exist.
        """
        first = self.layers[0]
        first.check_room(ids.shape[1])
        offsets = torch.arange(ids.shape[1], device=ids.device)
        return Tokens(first.counts[:, None] + offsets, documents, plain=first.plain and documents is None)

    def truncate(self, n: int) -> None:
        """Forget the last ``n`` tokens of every row, in every layer."""
        for layer in self.layers:
            layer.truncate(n)

    def keep(self, rows: list[int]) -> None:
        """Go on with some rows of the batch only, in every layer."""
        for layer in self.layers:
            layer.keep(rows)

    @property
    def nbytes(self) -> int:
        """Bytes held by keys and values."""
        return sum(layer.k.nbytes + layer.v.nbytes for layer in self.layers)
