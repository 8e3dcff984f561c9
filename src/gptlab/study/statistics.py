"""Differences between variants, with intervals that say what they are over: training seeds, or documents.

Where variants were trained with several seeds, every loss is taken for the sum of a mean of its variant, one of its
seed, and noise (a two-way layout without replication, the seeds being blocks; Montgomery, *Design and Analysis of
Experiments*, 4.1). The noise has one variance, estimated from the residuals of all variants together: with 8 variants
and 3 seeds from 14 degrees of freedom, where the differences of two variants have 2.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from gptlab.evaluation.compare import COVERAGE, refuse_unlike, resampled_ratios
from gptlab.evaluation.scoring import Result
from gptlab.study.results import Effects, Interval, Residual, Unit
from gptlab.study.student import holm, t_distribution, t_quantile

UNIT = "nats per token"
OVER_SEEDS = "paired over seeds"
POOLED = "paired over seeds, residual variance of all variants"
OVER_DOCUMENTS = "paired bootstrap over documents"
OVER_PARTS = "paired bootstrap over parts of documents"
DEFINITION = (
    "A main effect is the mean change of the loss when the change is made, over all combinations of the others. An"
    " interaction of a and b is how much more a changes the loss with b than without it; one of three is how much more"
    " the interaction of two is with the third. Below 0 the loss is lower."
)

Weights = Mapping[str, float]
"""A contrast: what each variant's loss is multiplied by before the products are added up."""


@dataclass(frozen=True)
class Scored:
    """All scores on the held-out text.

    Attributes:
        results: by name and seed.
        pools: names whose noise is taken to be of one size: variants of one kind after as many tokens.
    """

    results: Mapping[str, Mapping[int, Result]]
    pools: Sequence[frozenset[str]] = ()

    def losses(self, name: str) -> dict[int, float]:
        """Return nats per token by seed."""
        return {seed: result.metrics["nats_per_token"] for seed, result in self.results.get(name, {}).items()}


@dataclass(frozen=True)
class Estimate:
    """A contrast with all that is known of its distribution.

    Attributes:
        interval: of 95%.
        error: standard error, where the interval is Student's; else None.
        draws: of the bootstrap, where it is one; else none.
    """

    interval: Interval
    error: float | None = None
    draws: np.ndarray = field(default_factory=lambda: np.empty(0))

    def below(self, value: float) -> float | None:
        """Return the one-sided p-value for the contrast being below a value: small where it surely is."""
        if self.error is not None and self.interval.df is not None:
            gap = self.interval.mean - value
            if self.error == 0:  # the same in all seeds
                return 0.0 if gap < 0 else 1.0
            return t_distribution(gap / self.error, self.interval.df)
        if len(self.draws):
            return float(1 + np.count_nonzero(self.draws >= value)) / (1 + len(self.draws))
        return None

    def above(self, value: float) -> float | None:
        """Return the one-sided p-value for the contrast being above a value."""
        mirrored = self.interval.model_copy(update={"mean": -self.interval.mean})
        return Estimate(mirrored, self.error, -self.draws).below(-value)


def at(name: str, share: float, *, own_context: bool = False) -> str:
    """Return what a converted variant's scores after a share of the pre-training are called among all scores."""
    return f"{name} at {share:g}" + (" in its own context" if own_context else "")


def at_age(name: str, tokens: int) -> str:
    """Return what a variant's scores after so many tokens of training are called among all scores."""
    return f"{name} at {tokens:,} tokens"


def contrast(weights: Weights, scored: Scored) -> Estimate | None:
    """Return a contrast of losses on the held-out text; None where no seed was trained to the end in every variant.

    The interval is over seeds where there are several, else over documents.
    """
    common = sorted(set.intersection(*(set(scored.results.get(name, ())) for name in weights)))
    if not common:
        return None
    if len(common) == 1:
        return over_documents({name: scored.results[name][common[0]] for name in weights}, weights)
    pool = next((pool for pool in scored.pools if weights.keys() <= pool), None)
    if pool is not None:
        fit = Fit({name: losses for name in sorted(pool) if (losses := scored.losses(name))})
        estimate = fit.contrast(weights, len(common))
        if estimate is not None:
            return estimate
    own = {name: scored.losses(name) for name in weights}
    return over_seeds([math.fsum(w * own[name][seed] for name, w in weights.items()) for seed in common])


def over_seeds(differences: Sequence[float]) -> Estimate:
    """Return the mean of paired differences, one for each seed, with Student's t interval (none for a single seed)."""
    n = len(differences)
    mean = math.fsum(differences) / n
    if n < 2:
        return Estimate(Interval(mean=mean, low=None, high=None, n=n, unit=UNIT, method=OVER_SEEDS))
    deviation = math.sqrt(math.fsum((d - mean) ** 2 for d in differences) / (n - 1))
    return _student(mean, deviation / math.sqrt(n), n - 1, n, OVER_SEEDS)


def _student(mean: float, error: float, df: int, n: int, method: str) -> Estimate:
    half = t_quantile(1 - (1 - COVERAGE) / 2, df) * error
    interval = Interval(mean=mean, low=mean - half, high=mean + half, n=n, unit=UNIT, method=method, df=df)
    return _with_p(Estimate(interval, error))


def _with_p(estimate: Estimate) -> Estimate:
    below, above = estimate.below(0.0), estimate.above(0.0)
    p = None if below is None or above is None else min(2 * min(below, above), 1.0)
    return Estimate(estimate.interval.model_copy(update={"p": p}), estimate.error, estimate.draws)


class Fit:
    """Losses as the sum of a mean of each variant, one of each seed, and noise, by least squares.

    Variants that are the same model by the same recipe have the same losses and count once.

    Args:
        losses: by variant and seed; seeds may be missing.

    Attributes:
        residuals: of every run, by variant.
        df: degrees of freedom of the residuals.
    """

    def __init__(self, losses: Mapping[str, Mapping[int, float]]) -> None:
        first: dict[tuple[tuple[int, float], ...], str] = {}
        self._same = {name: first.setdefault(tuple(sorted(row.items())), name) for name, row in losses.items()}
        self._names = list(dict.fromkeys(self._same.values()))
        seeds = sorted({seed for row in losses.values() for seed in row})
        runs = [(name, seed) for name in self._names for seed in sorted(losses[name])]
        design = np.zeros((len(runs), len(self._names) + len(seeds)))
        for i, (name, seed) in enumerate(runs):
            design[i, self._names.index(name)] = design[i, len(self._names) + seeds.index(seed)] = 1.0
        observed = np.array([losses[name][seed] for name, seed in runs])
        self._inverse = np.linalg.pinv(design.T @ design)
        self._projection = self._inverse @ (design.T @ design)  # onto what can be estimated
        self._means = self._inverse @ (design.T @ observed)
        rest = observed - design @ self._means
        self.df = len(runs) - int(np.linalg.matrix_rank(design))
        self.variance = float(rest @ rest) / self.df if self.df else math.nan
        self.residuals: dict[str, list[float]] = {name: [] for name in self._names}
        for (name, _), value in zip(runs, rest.tolist(), strict=True):
            self.residuals[name].append(value)

    def contrast(self, weights: Weights, n: int) -> Estimate | None:
        """Return a contrast of the variants' means; None where it cannot be estimated.

        Args:
            weights: that add up to 0, so that the seeds' means cancel.
            n: seeds that all of its variants have.
        """
        vector = np.zeros(len(self._means))
        for name, weight in weights.items():
            if name not in self._same:
                return None
            vector[self._names.index(self._same[name])] += weight
        if not self.df or not np.allclose(vector @ self._projection, vector, atol=1e-9):
            return None
        error = math.sqrt(self.variance * max(float(vector @ self._inverse @ vector), 0.0))
        return _student(float(vector @ self._means), error if vector.any() else 0.0, self.df, n, POOLED)


def residual(names: Sequence[str], scored: Scored, called: Mapping[str, str] | None = None) -> Residual | None:
    """Return what is left of the losses of these variants beside their means and those of the seeds.

    Args:
        names: of the variants among all scores.
        scored: all scores.
        called: what to call them in the result, where that is another name.
    """
    losses = {name: row for name in names if (row := scored.losses(name))}
    fit = Fit(losses) if losses else None
    if fit is None or not fit.df:
        return None
    spread = {name: math.sqrt(math.fsum(r * r for r in rest) / len(rest)) for name, rest in fit.residuals.items()}
    named = {(called or {}).get(name, name): value for name, value in spread.items()}
    return Residual(deviation=math.sqrt(fit.variance), df=fit.df, by_variant=named)


def over_documents(results: Mapping[str, Result], weights: Weights, resamples: int = 10_000) -> Estimate:
    """Return a contrast of several models' losses on the same documents, with a bootstrap interval over these.

    As `gptlab.evaluation.compare.paired_difference`, for more than two models. It says how much the text matters, not
    how much another seed of the training would.

    Raises:
        GptlabError: models that were not asked the very same.
    """
    first = results[next(iter(weights))]
    for name in weights:
        refuse_unlike(results[name], first)
    tokens = np.array([score.tokens for score in first.scores], dtype=np.float64)
    gaps = np.zeros(len(tokens))
    for name, weight in weights.items():
        gaps += weight * np.array([score.nats for score in results[name].scores])
    gaps, tokens = gaps[tokens > 0], tokens[tokens > 0]
    mean, n = float(gaps.sum() / tokens.sum()), len(tokens)
    method = OVER_PARTS if unit_of(first) == "part of a document" else OVER_DOCUMENTS
    interval = Interval(mean=mean, low=None, high=None, n=n, unit=UNIT, method=method)
    if n < 2:
        return Estimate(interval)
    if not gaps.any():  # the same model, of whose difference nothing is uncertain
        return Estimate(interval.model_copy(update={"low": 0.0, "high": 0.0, "p": 1.0}))
    tail, draws = (1 - COVERAGE) / 2, resampled_ratios(gaps, tokens, 0, resamples)
    low, high = np.quantile(draws, [tail, 1 - tail])
    return _with_p(Estimate(interval.model_copy(update={"low": float(low), "high": float(high)}), draws=draws))


def unit_of(result: Result) -> Unit | None:
    """Return what the scores of a result are of; None where it was made before that was kept."""
    unit: Unit | None = result.data.get("unit")
    return unit


def corrected(intervals: Mapping[str, Interval]) -> dict[str, Interval]:
    """Return the intervals of a family with their p-values adjusted for each other by Holm's method."""
    names = [name for name, interval in intervals.items() if interval.p is not None]
    adjusted = dict(zip(names, holm([intervals[name].p or 0.0 for name in names]), strict=True))
    return {n: one.model_copy(update={"adjusted": adjusted.get(n)}) for n, one in intervals.items()}


def factorial(factors: Mapping[str, Sequence[str]]) -> tuple[dict[str, Weights], dict[str, Weights]] | None:
    """Return the contrasts of main effects and interactions, or None unless there is one variant of every combination.

    Args:
        factors: the factors of each variant, by its name.
    """
    names = list(dict.fromkeys(factor for chosen in factors.values() for factor in chosen))
    cells = {frozenset(chosen): variant for variant, chosen in factors.items()}
    if len(names) < 2 or len(cells) < len(factors) or len(cells) < 2 ** len(names):
        return None
    main: dict[str, Weights] = {}
    interactions: dict[str, Weights] = {}
    for size in range(1, len(names) + 1):
        for term in itertools.combinations(names, size):
            # Averaged over the combinations of the factors that the term leaves out.
            scale = 2.0 ** (size - len(names))
            signs = {v: scale * (-1) ** len(set(term) - chosen) for chosen, v in cells.items()}
            (main if size == 1 else interactions)[" x ".join(term)] = signs
    return main, interactions


def effects(factors: Mapping[str, Sequence[str]], scored: Scored) -> Effects | None:
    """Return the effects of a factorial with their intervals; None where the variants form none, or one has no run."""
    contrasts = factorial(factors)
    if contrasts is None:
        return None
    main, interactions = contrasts
    estimates = {name: contrast(weights, scored) for name, weights in (main | interactions).items()}
    terms = corrected({name: one.interval for name, one in estimates.items() if one is not None})
    if len(terms) < len(estimates):
        return None
    return Effects(
        definition=DEFINITION,
        main={name: terms[name] for name in main},
        interactions={name: terms[name] for name in interactions},
    )
