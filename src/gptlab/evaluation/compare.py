"""Is one model better than another, or did the text favour it? Paired comparison on the same tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from gptlab.errors import GptlabError, nearest
from gptlab.evaluation.scoring import Result

Measure = Literal["nats_per_token", "accuracy"]

COVERAGE = 0.95
AT_ONCE = 4_000_000
"""Documents drawn at once, over all resamples: 32 MB of indices."""


@dataclass(frozen=True)
class Difference:
    """A difference between two models, the first minus the second.

    Attributes:
        measure: of what: ``nats_per_token`` (below 0 the first model is better) or ``accuracy`` (above 0 it is).
        mean: over all documents together.
        low: lower end of the 95% interval; nan where there is none.
        high: its upper end.
        n_documents: documents, or parts of documents, that were resampled. Fewer than two give no interval; with fewer
            than about 20 it is too narrow.
    """

    measure: Measure
    mean: float
    low: float
    high: float
    n_documents: int

    def __str__(self) -> str:
        said = f"{self.mean:+.4f} {self.measure.replace('_', ' ')}"
        if math.isnan(self.low):
            return f"{said} (no interval: a single document cannot be resampled; use a text of several)"
        return f"{said} (95% interval {self.low:+.4f} to {self.high:+.4f}, {self.n_documents:,} documents or parts)"


def paired_difference(
    a: Result, b: Result, *, measure: Measure = "nats_per_token", seed: int = 0, resamples: int = 10_000
) -> Difference:
    """Return how much two models differ on the same documents, with a 95% interval.

    The percentile bootstrap over documents (Efron 1979): documents are drawn again with replacement, each with both
    models' scores, since what makes a document hard makes it hard for both. The tokens of a document are not
    independent, so they are never drawn singly. A loss is a ratio of sums: all nats over all tokens of a resample.

    Args:
        a: the one model's result.
        b: the other's, by the same protocol on the same data.
        measure: ``nats_per_token``, or ``accuracy`` where the protocol asks for answers.
        seed: of the resampling; the same gives the same interval.
        resamples: how many times the documents are drawn.

    Raises:
        GptlabError: results that cannot be compared, with the reason; a protocol without answers.
    """
    if measure not in get_args(Measure):
        raise GptlabError(f"measure must be one of {', '.join(get_args(Measure))}{nearest(measure, get_args(Measure))}")
    if resamples < 1:
        raise GptlabError(f"resamples must be at least 1, got {resamples}")
    refuse_unlike(a, b)
    weights = _weights(a, measure)
    if not np.array_equal(weights, _weights(b, measure)):
        raise GptlabError(f"{_names(a, b)} were scored on different numbers of tokens; evaluate both again")
    gaps = _sums(a, measure) - _sums(b, measure)
    gaps, weights = gaps[weights > 0], weights[weights > 0]
    if not len(gaps):
        raise GptlabError("there is nothing to compare: no token was scored")
    mean = float(gaps.sum() / weights.sum())
    if len(gaps) == 1:
        return Difference(measure, mean, math.nan, math.nan, 1)
    tail = (1 - COVERAGE) / 2
    low, high = np.quantile(resampled_ratios(gaps, weights, seed, resamples), [tail, 1 - tail])
    return Difference(measure, mean, float(low), float(high), len(gaps))


def resampled_ratios(sums: np.ndarray, weights: np.ndarray, seed: int, resamples: int) -> np.ndarray:
    """Return sum of ``sums`` over sum of ``weights`` for each resample of the documents: (resamples,) float64.

    Args:
        sums: (n,) one for each document.
        weights: (n,) positive.
        seed: of the draws.
        resamples: how many.
    """
    draw, n = np.random.default_rng(seed), len(sums)
    ratios = np.empty(resamples)
    step = max(1, AT_ONCE // n)
    for start in range(0, resamples, step):
        part = ratios[start : start + step]
        picked = draw.integers(n, size=(len(part), n))
        part[:] = sums[picked].sum(1) / weights[picked].sum(1)
    return ratios


def refuse_unlike(a: Result, b: Result) -> None:
    """Raise `GptlabError` unless both results answer the very same questions. The dtype may differ."""
    if a.protocol != b.protocol:
        raise GptlabError(f"{a.protocol} and {b.protocol} are different protocols, whose numbers do not compare")
    for name in sorted((a.settings.keys() | b.settings.keys()) - {"dtype"}):
        one, other = a.settings.get(name), b.settings.get(name)
        if one != other:
            raise GptlabError(
                f"{_names(a, b)} were evaluated with different settings ({name} {one} and {other}); give both the same"
            )
    if a.data["sha256"] != b.data["sha256"]:
        raise GptlabError(f"{_names(a, b)} were evaluated on different texts; evaluate both on the same")
    if a.data["ids_sha256"] != b.data["ids_sha256"] or len(a.scores) != len(b.scores):
        raise GptlabError(
            f"{_names(a, b)} have different tokenizers, so the losses of their tokens do not compare; compare bits"
            " per byte"
        )


def _names(a: Result, b: Result) -> str:
    return f"{a.model['name']} and {b.model['name']}"


def _weights(result: Result, measure: Measure) -> np.ndarray:
    """(n,) what the sum over a document is divided by."""
    return np.array([score.tokens if measure == "nats_per_token" else 1 for score in result.scores], dtype=np.float64)


def _sums(result: Result, measure: Measure) -> np.ndarray:
    """(n,) the sum over each document."""
    if measure == "nats_per_token":
        return np.array([score.nats for score in result.scores], dtype=np.float64)
    correct = [score.correct for score in result.scores if score.correct is not None]
    if len(correct) < len(result.scores):
        raise GptlabError(f"{result.protocol} asks for no answers, so it has no accuracy; compare nats_per_token")
    return np.array(correct, dtype=np.float64)
