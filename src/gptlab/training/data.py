"""Token streams and the batches that a step number names."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from gptlab.errors import GptlabError
from gptlab.text.corpora import Corpus
from gptlab.text.tokenizers import Tokenizer


def tokenize(corpus: Corpus, tokenizer: Tokenizer) -> np.ndarray:
    """Return all documents as one stream of ids, each followed by the end of text where there is one."""
    end = [] if tokenizer.end_of_text is None else [tokenizer.end_of_text]
    dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
    parts = [np.array(ids + end, dtype=dtype) for ids in tokenizer.encode_batch(corpus.documents)]
    return np.concatenate(parts)


class Batches:
    """Windows of a token stream, each seen once an epoch in a random order.

    Batch ``step`` is a function of the seed and the step alone, so any step can be reached at once.

    Args:
        stream: token ids, one dimension.
        length: tokens of a window that are predicted, T.
        batch_size: windows of a batch, B.
        seed: of the order.

    Raises:
        GptlabError: a stream too short for one batch.
    """

    def __init__(self, stream: np.ndarray, length: int, batch_size: int, seed: int) -> None:
        self.stream, self.length, self.batch_size, self.seed = stream, length, batch_size, seed
        self.n_windows = (len(stream) - 1) // length
        if self.n_windows < batch_size:
            raise GptlabError(
                f"the corpus gives {len(stream):,} training tokens, too few for one batch of {batch_size} x {length};"
                " add text, or lower train.batch_size or model.context_length"
            )

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        """Return (ids, targets) of batch ``step``, each (B, T) int64; targets are the next tokens."""
        picks = []
        for k in range(step * self.batch_size, (step + 1) * self.batch_size):
            epoch, i = divmod(k, self.n_windows)
            picks.append(int(self._order(epoch)[i]) * self.length)
        rows = np.stack([self.stream[start : start + self.length + 1] for start in picks])
        tokens = torch.from_numpy(rows.astype(np.int64))
        return tokens[:, :-1], tokens[:, 1:]

    def _order(self, epoch: int) -> np.ndarray:
        if getattr(self, "_epoch", None) != epoch:
            self._epoch = epoch
            self._permutation = np.random.default_rng([self.seed, epoch]).permutation(self.n_windows)
        return self._permutation


def windows(stream: np.ndarray, length: int, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (ids, targets), each (B, T) int64, that together predict every token but the first, once.

    The last batch may have fewer rows, and the very last window fewer tokens.
    """
    n_full = (len(stream) - 1) // length
    for first in range(0, n_full, batch_size):
        n = min(batch_size, n_full - first)
        span = torch.from_numpy(stream[first * length : (first + n) * length + 1].astype(np.int64))
        yield span[:-1].view(n, length), span[1:].view(n, length)
    if (len(stream) - 1) % length:
        rest = torch.from_numpy(stream[n_full * length :].astype(np.int64))
        yield rest[None, :-1], rest[None, 1:]
