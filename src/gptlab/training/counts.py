"""The count trigram of what a run has read."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from gptlab.evaluation.trigram import Trigram, count
from gptlab.text.shards import Dataset
from gptlab.training.data import Batches, Items, Windows


def count_read(dataset: Dataset, rows: Windows | Items, n_tokens: int | None, seed: int) -> Trigram:
    """Count the rows that a run of a seed reads first, each once, whatever the number of epochs.

    Args:
        dataset: whose training split the rows are of.
        rows: of the run.
        n_tokens: that are predicted in these rows, at least; None is all of an epoch.
        seed: of the run.
    """
    return count(_read(rows, n_tokens, seed), dataset.tokenizer.vocab_size)


def _read(rows: Windows | Items, n_tokens: int | None, seed: int) -> Iterator[np.ndarray]:
    done = 0
    for i in Batches(rows, 1, seed).order(0).tolist():
        if n_tokens is not None and done >= n_tokens:
            return
        if isinstance(rows, Items):
            row = rows.split.read(int(rows.starts[i]) - rows.split.first, int(rows.ends[i]))
        else:
            row = rows.split.read(i * rows.length, (i + 1) * rows.length + 1)
        done += len(row) - 1
        yield row
