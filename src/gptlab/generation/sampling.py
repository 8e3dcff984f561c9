"""Choosing the next token from its logits."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from gptlab.errors import GptlabError

CANDIDATES = 511
"""Tokens among which those of top-p are looked for first."""


@dataclass(frozen=True)
class Sampling:
    """How to choose: repetition penalty, temperature, top-k, top-p, min-p, in this order, as transformers has it.

    Attributes:
        temperature: divides the logits; 0 is greedy.
        top_k: only the k best tokens; those that tie with the k-th stay. None or 0: all.
        top_p: only the smallest set of best tokens whose probabilities reach p (Holtzman et al. 2020). The
            token that crosses p stays, as in Hugging Face's library; OpenAI's GPT-2 code drops it. None: all.
        seed: the same seed gives the same text.
        min_p: only tokens with at least p times the probability of the best (Nguyen et al. 2024). None or 0: all.
        repetition_penalty: positive logits of tokens that the prompt or the new text has already are divided by it,
            negative ones multiplied (Keskar et al. 2019, *CTRL*); greedy choices are penalised too. 1: none.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0
    min_p: float | None = None
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if not (_is_number(self.temperature) and self.temperature >= 0):
            raise GptlabError(f"temperature must be 0 (greedy) or a positive number, got {self.temperature!r}")
        if self.top_k is not None and not (_is_whole(self.top_k) and self.top_k >= 0):
            raise GptlabError(f"top_k must be a whole number, 0 to allow every token, got {self.top_k!r}")
        if self.top_p is not None and not (_is_number(self.top_p) and 0 < self.top_p <= 1):
            raise GptlabError(
                f"top_p must be above 0 and at most 1, got {self.top_p!r}; leave it out to allow every token"
            )
        if self.min_p is not None and not (_is_number(self.min_p) and 0 <= self.min_p <= 1):
            raise GptlabError(f"min_p must be 0 to 1, 0 to allow every token, got {self.min_p!r}")
        if not (_is_number(self.repetition_penalty) and self.repetition_penalty > 0):
            raise GptlabError(f"repetition_penalty must be above 0, 1 for none, got {self.repetition_penalty!r}")
        if not (_is_whole(self.seed) and 0 <= self.seed < 2**63):
            raise GptlabError(f"seed must be a whole number of at least 0 and below 2**63, got {self.seed!r}")


def _is_number(x: Any) -> bool:
    return isinstance(x, Real) and not isinstance(x, bool) and math.isfinite(x)


def _is_whole(x: Any) -> bool:
    return isinstance(x, Integral) and not isinstance(x, bool)


def penalised(logits: Tensor, present: Tensor, penalty: float) -> Tensor:
    """Make tokens that are there already less likely, or more likely with a penalty below 1.

    Args:
        logits: (B, V).
        present: (B, V) bool, the tokens of the prompt and of the new text.
        penalty: as `Sampling.repetition_penalty`.

    Returns:
        (B, V) in the dtype of the logits.
    """
    return torch.where(present, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """Return the distribution to draw from: (..., V) logits -> (..., V) float64 that sums to 1.

    Temperature 0 puts everything on the largest logit, the first of them if several are equal.
    """
    logits = logits.double()
    if sampling.temperature == 0:
        return torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
    # Against the largest, so that a tiny temperature cannot overflow.
    logits = (logits - logits.amax(-1, keepdim=True)) / sampling.temperature
    if sampling.top_k and sampling.top_k < logits.shape[-1]:
        kth = logits.topk(sampling.top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < kth, -math.inf)
    weights = torch.softmax(logits, dim=-1)
    if sampling.top_p is not None and sampling.top_p < 1:
        ordered, order = weights.sort(dim=-1, descending=True, stable=True)
        better = ordered.cumsum(-1) - ordered  # probability of all better tokens
        dropped = torch.empty_like(order, dtype=torch.bool).scatter_(-1, order, better >= sampling.top_p)
        weights = weights.masked_fill(dropped, 0.0)
        weights = weights / weights.sum(-1, keepdim=True)
    if sampling.min_p:
        weights = weights.masked_fill(weights < sampling.min_p * weights.amax(-1, keepdim=True), 0.0)
        weights = weights / weights.sum(-1, keepdim=True)
    return weights


def draw(weights: Tensor, uniforms: Tensor) -> Tensor:
    """Turn one uniform number per row into one token per row.

    Args:
        weights: (B, V) float64, as `probabilities` returns.
        uniforms: (B,) float64 in [0, 1).

    Returns:
        (B,) int64: the first token at which the cumulative probability exceeds the number.
    """
    cumulative = weights.cumsum(-1)
    chosen = torch.searchsorted(cumulative, uniforms[:, None] * cumulative[:, -1:], right=True)
    return chosen[:, 0].clamp(max=weights.shape[-1] - 1)


def choose(logits: Tensor, sampling: Sampling, uniforms: Tensor) -> Tensor:
    """Return what `draw` makes of `probabilities`, sooner: (B, V) logits and (B,) uniform numbers -> (B,) int64.

    Where only few tokens can be drawn, only these are put in order. A row's token does not depend on the other rows.
    """
    if sampling.temperature == 0:
        return logits.argmax(-1)
    k = sampling.top_k or (CANDIDATES if (sampling.top_p or 1) < 1 else 0)
    if not 0 < k < logits.shape[-1]:
        # A few rows at a time, whose float64 stays in the processor's cache.
        n = 4 if logits.device.type == "cpu" else len(logits)
        parts = zip(logits.split(n), uniforms.split(n), strict=True)
        return torch.cat([draw(probabilities(part, sampling), numbers) for part, numbers in parts])
    best, ids = logits.topk(k + 1, dim=-1)
    # In the order of the vocabulary: `draw` adds up in it, and `probabilities` prefers the first of equals.
    if sampling.top_k:
        unsure = best[:, k] == best[:, k - 1]  # those that tie with the k-th stay as well
        ids, order = ids[:, :k].sort(dim=-1)
        weights = probabilities(best.gather(-1, order), replace(sampling, top_k=None))
    else:
        weights, unsure = _nucleus(best, logits, sampling, sampling.top_p or 1)
        ids, order = ids.sort(dim=-1)
        weights = weights.gather(-1, order)
    chosen = ids.gather(-1, draw(weights, uniforms)[:, None])[:, 0]
    for row in unsure.nonzero()[:, 0].tolist():
        one = slice(row, row + 1)
        chosen[one] = draw(probabilities(logits[one], sampling), uniforms[one])
    return chosen


def _nucleus(best: Tensor, logits: Tensor, sampling: Sampling, top_p: float) -> tuple[Tensor, Tensor]:
    """Apply top-p, and min-p, to the best logits (B, K) of all.

    Returns:
        (B, K) float64 weights, and (B,) bool: the best may not be all that can be drawn.
    """
    top = best[:, :1].double()
    total = ((logits.double() - top) / sampling.temperature).exp_().sum(-1, keepdim=True)
    weights = ((best.double() - top) / sampling.temperature).exp() / total
    kept = weights.cumsum(-1) - weights < top_p
    # Which of two equals is the last to stay, only the order of all tells.
    unsure = kept[:, -1] | (kept[:, :-1] & ~kept[:, 1:] & (weights[:, :-1] == weights[:, 1:])).any(-1)
    if sampling.min_p:
        kept = kept & (weights >= sampling.min_p * weights[:, :1])
    return weights.masked_fill(~kept, 0.0), unsure
