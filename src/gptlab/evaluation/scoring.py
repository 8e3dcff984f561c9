"""The one place that turns a model and token ids into log-probabilities."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gptlab.errors import GptlabError
from gptlab.evaluation.batches import Progress, Row, score_rows
from gptlab.model.gpt import GPT

Ids = np.ndarray | Sequence[int]


class Completion(NamedTuple):
    """What a model makes of a given continuation of a given context.

    Attributes:
        logprobs: (n,) float32, natural log-probability of each token of the continuation.
        best: (n,) int64, the likeliest token at each of its places, given the true ones before it.
        ids: (n,) int64, the continuation itself.
    """

    logprobs: Tensor
    best: Tensor
    ids: Tensor

    @property
    def greedy(self) -> bool:
        """Would greedy decoding have produced exactly this continuation?"""
        return torch.equal(self.best, self.ids)


@dataclass(frozen=True)
class Score:
    """What one document contributed to a result.

    Attributes:
        nats: minus the sum of the log-probabilities of its scored tokens.
        tokens: how many were scored.
        words: words of the original text that they stand for.
        bytes: its UTF-8 bytes.
        correct: 1 or 0 where the protocol asks for an answer, else None.
    """

    nats: float
    tokens: int
    words: int
    bytes: int
    correct: int | None = None


@dataclass(frozen=True)
class Result:
    """Numbers, and all that they depend on.

    Attributes:
        protocol: a name of `gptlab.evaluation.tasks.TASKS`, as ``wikitext:word``.
        settings: ``stride``, ``context``, ``dtype``, ``limit`` and whatever else changes the numbers.
        model: ``name``, ``parameters``, ``sha256`` of the weights.
        data: ``name``, ``sha256`` of the text and ``ids_sha256`` of the token ids: where these are equal, two models
            were asked the very same.
        metrics: the numbers by name.
        scores: one for each document, in the order of the data.
        seconds: wall time.
    """

    protocol: str
    settings: dict[str, Any]
    model: dict[str, Any]
    data: dict[str, Any]
    metrics: dict[str, float]
    scores: tuple[Score, ...]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Return what JSON can hold; the scores as columns."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        columns = {field.name: [getattr(score, field.name) for score in self.scores] for field in fields(Score)}
        return {**values, "scores": columns}


def token_logprobs(
    model: GPT,
    sequences: Sequence[Ids],
    *,
    stride: int | None = None,
    context: int | None = None,
    full_last: bool = False,
    batch_tokens: int | None = None,
    dtype: str = "float32",
    progress: Progress | None = None,
) -> list[Tensor]:
    """Return the log-probability of every token but the first, given those before it.

    A sequence longer than ``context`` is read in windows of ``context`` tokens that begin 0, ``stride``, 2 ``stride``
    and so on tokens into it. Each token is scored once, by the first window that predicts it: after 1 to ``context``
    tokens where windows do not overlap, and after at least ``context - stride + 1`` (beyond the first window) where
    they do.

    Args:
        model: its weights stay as they are; dropout is off meanwhile.
        sequences: token ids of each.
        stride: tokens between the starts of two windows; by default ``context``: no overlap.
        context: tokens of a window; by default the model's ``context_length``. Only a model without learned positions
            takes more.
        full_last: let the last window end where the sequence ends and reach back as far as it can, as EleutherAI's
            harness does, in place of beginning where its turn is and being short.
        batch_tokens: tokens to compute at once, by default what suits the device; a longer window goes alone.
        dtype: ``float32`` or ``bfloat16``, of the blocks' products. The output head is computed in float32 in any case:
            GPT-2's logits are around -100, where bfloat16 has steps of 0.5.
        progress: told after every batch how far it is.

    Returns:
        For each sequence of n ids, (n - 1,) float32 natural logarithms on the CPU, in the order given.

    Raises:
        GptlabError: an empty sequence, ids that the model does not have, an impossible stride, context or dtype.
    """
    length = window_length(model, context)
    stride = check_stride(stride, length)
    arrays = [as_ids(model, ids) for ids in sequences]
    rows = [row for owner, ids in enumerate(arrays) for row in _windows(owner, ids, length, stride, full_last)]
    out = [torch.empty(len(ids) - 1) for ids in arrays]
    filled = [0] * len(arrays)
    # Windows of a sequence are in order, so each goes on where the one before it ended.
    for row, (logprobs, _) in zip(rows, score_rows(model, rows, batch_tokens, dtype, progress), strict=True):
        out[row.owner][filled[row.owner] : filled[row.owner] + len(logprobs)] = logprobs
        filled[row.owner] += len(logprobs)
    assert filled == [len(scores) for scores in out]
    return out


def completion_logprobs(
    model: GPT,
    pairs: Sequence[tuple[Ids, Ids]],
    *,
    context: int | None = None,
    batch_tokens: int | None = None,
    dtype: str = "float32",
    never: Tensor | None = None,
    progress: Progress | None = None,
) -> list[Completion]:
    """Score continuations, each after its own context; only their positions go through the output head.

    Args:
        model: as in `token_logprobs`.
        pairs: (context ids, continuation ids), neither empty. Of a context that is too long, the last tokens count.
        context: tokens of a window; as in `token_logprobs`.
        batch_tokens: as in `token_logprobs`.
        dtype: as in `token_logprobs`.
        never: (V,) bool, tokens that `Completion.best` passes over; log-probabilities do not change.
        progress: as in `token_logprobs`.

    Returns:
        One `Completion` for each pair, in the order given, on the CPU.

    Raises:
        GptlabError: an empty context or continuation, a continuation that is longer than the window.
    """
    length = window_length(model, context)
    rows = []
    for owner, (before, after) in enumerate(pairs):
        ids = completion_window(model, before, after, length)
        rows.append(Row(owner, ids, len(ids) - 1 - len(after)))
    scores = score_rows(model, rows, batch_tokens, dtype, progress, best=True, never=never)
    return [
        Completion(logprobs, best, torch.from_numpy(row.ids[1 + row.first :].copy()))
        for row, (logprobs, best) in zip(rows, scores, strict=True)
    ]


def completion_window(model: GPT, before: Ids, after: Ids, length: int) -> np.ndarray:
    """Return a context and its continuation as (n,) int64, at most ``length + 1``: the last tokens of the context.

    Raises:
        GptlabError: an empty context or continuation, a continuation that is longer than the window.
    """
    head, tail = as_ids(model, before, "a context"), as_ids(model, after, "a continuation")
    if len(tail) > length:
        raise GptlabError(f"a continuation has {len(tail)} tokens, the window holds {length}; shorten it")
    return np.concatenate([head, tail])[-length - 1 :]


def window_length(model: GPT, context: int | None) -> int:
    """Return how many tokens a window holds.

    Raises:
        GptlabError: less than one, or more than there are learned positions.
    """
    most = model.config.context_length
    if context is None:
        return most
    if context < 1:
        raise GptlabError(f"context must be at least 1, got {context}")
    if model.config.has_table and context > most:
        raise GptlabError(
            f"context {context} exceeds the {most} learned positions of this model; only models without learned"
            " positions read further"
        )
    return context


def check_stride(stride: int | None, length: int) -> int:
    """Return the stride, by default the whole window.

    Raises:
        GptlabError: below one, or so large that tokens would be left out.
    """
    if stride is None:
        return length
    if not 1 <= stride <= length:
        raise GptlabError(
            f"stride must be 1 to {length}, the tokens of a window (a larger one would leave tokens out), got {stride}"
        )
    return stride


def as_ids(model: GPT, ids: Ids, what: str = "a sequence") -> np.ndarray:
    """Return token ids as (n,) int64.

    Raises:
        GptlabError: none at all, or ids that the model does not have.
    """
    array = np.asarray(ids, dtype=np.int64)
    if array.ndim != 1 or not len(array):
        raise GptlabError(f"{what} to be scored is empty; give at least one token")
    if array.min() < 0 or array.max() >= model.config.vocab_size:
        raise GptlabError(
            f"the tokenizer gives ids from {array.min()} to {array.max()}, the model has {model.config.vocab_size}:"
            " they do not fit; use the tokenizer that the model was trained with"
        )
    return array


def _windows(owner: int, ids: np.ndarray, length: int, stride: int, full_last: bool) -> Iterator[Row]:
    """Yield the windows of one sequence; together they score every token but the first, once."""
    begin = done = 0
    last = len(ids) - 1
    while done < last:
        if full_last and begin + length > last:
            begin = max(0, last - length)
        end = min(begin + length, last)
        yield Row(owner, ids[begin : end + 1], done - begin)
        begin, done = begin + stride, end
