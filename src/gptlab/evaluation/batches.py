"""Batches of token ids through a model, and from each only what is asked for.

Only the positions whose targets are asked for go through the output head, a few hundred at a time: the logits of all
positions of GPT-2 at once would be 200 KB per token. Rows are sorted by length, so that batches are nearly free of
padding; padding stands on the right, where causal attention needs no mask against it.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from gptlab.devices import BITS
from gptlab.errors import GptlabError, nearest
from gptlab.model.gpt import GPT
from gptlab.model.linear import Linear
from gptlab.model.quantised import bits_of, matrix, quantise_model

Progress = Callable[[int, int], None]
"""Called with the tokens computed so far and the tokens in all."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PRECISIONS = (*DTYPES, *BITS)
BATCH_TOKENS = 1024
"""Tokens of a batch on a CPU, padding included: with more, products are no faster and activations leave the cache."""
BATCH_TOKENS_GPU = 16_384
"""The same on a GPU, which needs more to do at once; 200 MB for the widest activation of GPT-2 124M."""
HEAD_ROWS = 256
"""Positions that go through the output head at once: 50 MB of logits with GPT-2's vocabulary."""


@dataclass(frozen=True)
class Row:
    """One line of a batch: what goes in, and the places whose successors are asked for."""

    owner: int
    ids: np.ndarray  # (n + 1,): inputs are ids[:-1], targets ids[1:]
    first: int  # the targets from here on are scored


def score_rows(
    model: GPT,
    rows: Sequence[Row],
    batch_tokens: int | None,
    dtype: str,
    progress: Progress | None = None,
    *,
    best: bool = False,
    never: Tensor | None = None,
) -> list[tuple[Tensor, Tensor]]:
    """Return for each row the log-probability of each scored target, (n,) float32, and the likeliest tokens.

    Args:
        model: as in `gptlab.evaluation.scoring.token_logprobs`, and so for the next three.
        rows: what to read and what to score of it.
        batch_tokens: tokens to compute at once, padding included; None is `BATCH_TOKENS` or `BATCH_TOKENS_GPU`.
        dtype: one of `PRECISIONS`.
        progress: told after every batch how far it is.
        best: look for the likeliest token in each place, (n,) int64; otherwise those tensors are empty.
        never: (V,) bool, tokens that are not to be the likeliest.
    """
    scored: list[Any] = [None] * len(rows)
    total, done = sum(len(row.ids) - 1 for row in rows), 0
    with _ready(model, dtype) as model, torch.inference_mode():
        device = model.wte.weight.device
        weight = matrix(model.lm_head)
        batch_tokens = batch_tokens or (BATCH_TOKENS if device.type == "cpu" else BATCH_TOKENS_GPU)
        for batch in _batches(rows, batch_tokens):
            longest = len(rows[batch[0]].ids) - 1
            ids = torch.zeros(len(batch), longest, dtype=torch.int64)
            places = []
            for line, i in enumerate(batch):
                inputs = rows[i].ids[:-1]
                ids[line, : len(inputs)] = torch.from_numpy(inputs)
                places.append(torch.arange(rows[i].first, len(inputs)) + line * longest)
            targets = np.concatenate([rows[i].ids[1 + rows[i].first :] for i in batch])
            head = Head(weight, torch.cat(places).to(device), torch.from_numpy(targets).to(device), best, never)
            logprobs, likeliest = (out.cpu() for out in model(ids.to(device), head=head))
            end = 0
            for i, place in zip(batch, places, strict=True):
                part = slice(end, end := end + len(place))
                scored[i] = (logprobs[part], likeliest[part])
                done += len(rows[i].ids) - 1
            if progress is not None:
                progress(done, total)
    return scored


@dataclass(frozen=True)
class Head:
    """A head for `GPT.forward`: scores of given targets at given places of the flattened batch.

    Attributes:
        weight: (V, C) float32, of the output projection.
        places: (N,) int64, line * T + position.
        targets: (N,) int64.
        best: find the likeliest token in each place as well.
        never: (V,) bool or None, tokens that are not to be the likeliest.
    """

    weight: Tensor
    places: Tensor
    targets: Tensor
    best: bool
    never: Tensor | None

    def __call__(self, hidden: Tensor, lm_head: Linear) -> tuple[Tensor, Tensor]:
        """(B, T, C) -> log-probabilities (N,) float32, and likeliest tokens (N,) or (0,) int64."""
        rows = hidden.flatten(0, 1)[self.places]  # (N, C)
        logprobs = torch.empty(len(rows), device=rows.device)
        best = self.targets.new_empty(len(rows) if self.best else 0)
        for start in range(0, len(rows), HEAD_ROWS):
            part = slice(start, start + HEAD_ROWS)
            logits = F.linear(rows[part].float(), self.weight)  # (n, V)
            logprobs[part] = logits.gather(1, self.targets[part, None])[:, 0] - logits.logsumexp(1)
            if self.best:
                if self.never is not None:
                    logits.masked_fill_(self.never.to(logits.device), -math.inf)
                best[part] = logits.argmax(1)
        return logprobs, best


def _batches(rows: Sequence[Row], batch_tokens: int) -> Iterator[list[int]]:
    """Yield indices of rows, longest first, so that a batch that does not fit into memory fails at once."""
    batch: list[int] = []
    for i in sorted(range(len(rows)), key=lambda i: len(rows[i].ids), reverse=True):
        if batch and (len(batch) + 1) * (len(rows[batch[0]].ids) - 1) > batch_tokens:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


@contextlib.contextmanager
def _ready(model: GPT, dtype: str) -> Iterator[GPT]:
    """Give the model in the dtype asked for, a copy where it is in another, with dropout off."""
    if dtype not in PRECISIONS:
        raise GptlabError(f"dtype must be one of {', '.join(PRECISIONS)}, got {dtype!r}{nearest(dtype, PRECISIONS)}")
    bits = bits_of(model)
    if bits != BITS.get(dtype):
        if bits is not None:
            raise GptlabError(f"this model's weights have {bits} bits; evaluate it in int{bits}, or load it in {dtype}")
        model = copy.deepcopy(model)
        quantise_model(model, BITS[dtype])
    elif bits is None and model.wte.weight.dtype != DTYPES[dtype]:
        model = copy.deepcopy(model).to(DTYPES[dtype])
    training = model.training
    model.eval()
    try:
        yield model
    finally:
        model.train(training)
