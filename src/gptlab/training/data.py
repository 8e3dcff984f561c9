"""The batches that a step number names, and the validation stream in order."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gptlab.errors import GptlabError
from gptlab.text.shards import Split
from gptlab.training.loss import IGNORED


@dataclass(frozen=True)
class Batch:
    """Rows of tokens with what to predict.

    Attributes:
        ids: (B, T) int64.
        targets: (B, T) int64, the next tokens; `IGNORED` where there is none to predict.
        documents: (B, T) int64, which document each token is in, or None: one document a row.
        origins: (B,) int64, where each row begins in the stream, or which item it is; to name a batch in messages.
    """

    ids: Tensor
    targets: Tensor
    documents: Tensor | None
    origins: Tensor

    def rows(self, where: slice) -> Batch:
        """Return some of the rows."""
        documents = None if self.documents is None else self.documents[where]
        return Batch(self.ids[where], self.targets[where], documents, self.origins[where])

    def to(self, device: torch.device) -> Batch:
        """Return the batch on another device."""
        documents = None if self.documents is None else self.documents.to(device, non_blocking=True)
        ids, targets = (x.to(device, non_blocking=True) for x in (self.ids, self.targets))
        return Batch(ids, targets, documents, self.origins)

    @property
    def n_targets(self) -> int:
        """How many tokens are predicted."""
        return int((self.targets != IGNORED).sum())


class Windows:
    """Stretches of a token stream, side by side; each predicts its own tokens but the first and the one after it.

    Args:
        split: the stream.
        length: tokens of a window that are predicted, T.
        documents: tell which document each token is in, so that attention can stay inside. The mark before a
            document's text is its first token: what generation and evaluation begin with is seen in training.

    Raises:
        GptlabError: documents asked for where the data does not say where they end.
    """

    def __init__(self, split: Split, length: int, documents: bool = False) -> None:
        self.split, self.length = split, length
        self.documents = documents
        if documents and split.document_ends is None:
            raise GptlabError(
                "the data does not say where its documents end, so data.documents has no effect;"
                " prepare it with gptlab prepare, or leave the setting out"
            )

    def __len__(self) -> int:
        """How many whole windows there are."""
        return max(self.split.n_tokens - 1, 0) // self.length

    @property
    def n_targets(self) -> int:
        """Tokens that `in_order` predicts."""
        return max(self.split.n_tokens - 1, 0)

    def take(self, which: np.ndarray) -> Batch:
        """Return the windows of these numbers, (B,) int64."""
        return self._batch(which * self.length, self.length)

    def in_order(self, batch_size: int, n_tokens: int | None = None) -> Iterator[Batch]:
        """Yield batches that together predict every token but the first, once.

        The last batch may have fewer rows, and the very last window fewer tokens.

        Args:
            batch_size: most windows of a batch.
            n_tokens: of the stream's beginning; None is all of it.
        """
        n_tokens = self.split.n_tokens if n_tokens is None else min(n_tokens, self.split.n_tokens)
        n_full, rest = divmod(max(n_tokens - 1, 0), self.length)
        for first in range(0, n_full, batch_size):
            yield self.take(np.arange(first, min(first + batch_size, n_full)))
        if rest:
            yield self._batch(np.array([n_full * self.length]), rest)

    def _batch(self, starts: np.ndarray, length: int) -> Batch:
        rows = np.stack([self.split.read(int(start), int(start) + length + 1) for start in starts])
        tokens = torch.from_numpy(rows.astype(np.int64))
        documents = None
        if self.documents:
            documents = torch.from_numpy(self.split.owners(starts[:, None] + np.arange(length)))
        return Batch(tokens[:, :-1], tokens[:, 1:], documents, torch.from_numpy(starts.astype(np.int64)))


class Items:
    """One short document a row: the token that begins a text, the item, the one that ends it, and padding that counts
    nothing.

    Args:
        split: the items, each followed by the end of text.
        length: tokens of a row, T; the longest item with its end must fit.
        start: the token that begins each row; None where nothing ends an item.

    Raises:
        GptlabError: an item that is too long, or a tokenizer without an end of text.
    """

    def __init__(self, split: Split, length: int, start: int | None) -> None:
        if split.document_ends is None or start is None:
            raise GptlabError(
                "data.items needs data whose items end with <|endoftext|>; prepare it with gptlab prepare --per-line"
                " and a tokenizer that has this token"
            )
        self.split, self.length, self.start = split, length, start
        after = np.asarray(split.document_ends)
        self.starts = np.concatenate([[split.first], after[:-1]])
        self.ends = after - max(split.marks - 1, 0)  # the token that opens the next item is none of this one's
        sizes = self.ends - self.starts
        if len(sizes) and sizes.max() > length:
            raise GptlabError(
                f"item {int(sizes.argmax()) + 1} has {sizes.max()} tokens with its end, the context is {length};"
                f" leave long items out, or give a new model model.context_length={sizes.max()}"
            )

    def __len__(self) -> int:
        """How many items there are."""
        return len(self.ends)

    @property
    def n_targets(self) -> int:
        """Tokens that `in_order` predicts: those of every item and its end."""
        return int((self.ends - self.starts[: len(self.ends)]).sum())

    def take(self, which: np.ndarray) -> Batch:
        """Return the items of these numbers, (B,) int64."""
        ids = torch.full((len(which), self.length), self.start)
        targets = torch.full((len(which), self.length), IGNORED)
        for row, item in enumerate(which):
            tokens = torch.from_numpy(self.split.read(int(self.starts[item]), int(self.ends[item])).astype(np.int64))
            targets[row, : len(tokens)] = tokens
            ids[row, 1 : len(tokens)] = tokens[:-1]
        return Batch(ids, targets, None, torch.from_numpy(which.astype(np.int64)))

    def in_order(self, batch_size: int, n_tokens: int | None = None) -> Iterator[Batch]:
        """Yield every item once; with ``n_tokens``, only those that begin before that many tokens."""
        n = len(self) if n_tokens is None else int(np.searchsorted(self.starts, n_tokens))
        for first in range(0, n, batch_size):
            yield self.take(np.arange(first, min(first + batch_size, n)))


class Batches:
    """Each row seen once an epoch, in a random order. Batch ``step`` is a function of the seed and the step alone.

    Args:
        rows: `Windows` or `Items` of the training split.
        size: rows of a batch.
        seed: of the order.

    Raises:
        GptlabError: fewer rows than a batch has.
    """

    def __init__(self, rows: Windows | Items, size: int, seed: int) -> None:
        self.rows, self.size, self.seed = rows, size, seed
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)
        if len(rows) < size:
            if isinstance(rows, Items):
                raise GptlabError(
                    f"the training data has {len(rows):,} items, too few for one batch of {size}; add some, or lower"
                    " batch.size"
                )
            raise GptlabError(
                f"the training data has {rows.split.n_tokens:,} tokens, which give {len(rows):,} windows of"
                f" {rows.length} tokens, too few for one batch of {size}; add text, or lower"
                " batch.size or batch.length"
            )

    def __getitem__(self, step: int) -> Batch:
        """Return batch ``step``, counted from 0."""
        numbers = np.arange(step * self.size, (step + 1) * self.size)
        epochs = numbers // len(self.rows)
        parts = [self.order(int(e))[numbers[epochs == e] % len(self.rows)] for e in np.unique(epochs)]
        return self.rows.take(np.concatenate(parts))

    def order(self, epoch: int) -> np.ndarray:
        """Return the numbers of all rows in the order in which an epoch has them, int64."""
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = np.random.default_rng([self.seed, epoch]).permutation(len(self.rows))
        return self._order
