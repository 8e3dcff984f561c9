"""Choosing the next token from its logits."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gptlab.errors import GptlabError


@dataclass(frozen=True)
class Sampling:
    """How to choose: temperature, then top-k, then top-p.

    Attributes:
        temperature: divides the logits; 0 is greedy.
        top_k: only the k best tokens; those that tie with the k-th stay. None: all.
        top_p: only the smallest set of best tokens whose probabilities reach p (Holtzman et al. 2020). The
            token that crosses p stays, as in Hugging Face's library; OpenAI's GPT-2 code drops it. None: all.
        seed: the same seed gives the same text.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise GptlabError(f"temperature must be 0 (greedy) or a positive number, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise GptlabError(f"top_k must be at least 1, got {self.top_k}; leave it out to allow every token")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise GptlabError(
                f"top_p must be above 0 and at most 1, got {self.top_p}; leave it out to allow every token"
            )
        if not 0 <= self.seed < 2**63:
            raise GptlabError(f"seed must be a whole number of at least 0, got {self.seed}")


def probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """Return the distribution to draw from: (..., V) logits -> (..., V) float64 that sums to 1.

    Temperature 0 puts everything on the largest logit, the first of them if several are equal.
    """
    logits = logits.double()
    if sampling.temperature == 0:
        return torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
    # Against the largest, so that a tiny temperature cannot overflow.
    logits = (logits - logits.amax(-1, keepdim=True)) / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        kth = logits.topk(sampling.top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < kth, -math.inf)
    weights = torch.softmax(logits, dim=-1)
    if sampling.top_p is not None and sampling.top_p < 1:
        ordered, order = weights.sort(dim=-1, descending=True, stable=True)
        better = ordered.cumsum(-1) - ordered  # probability of all better tokens
        dropped = torch.empty_like(order, dtype=torch.bool).scatter_(-1, order, better >= sampling.top_p)
        weights = weights.masked_fill(dropped, 0.0)
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
