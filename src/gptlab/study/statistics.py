"""Differences between variants, with intervals that say what they are over: training seeds, or documents."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np

from gptlab.evaluation.compare import COVERAGE, refuse_unlike, resampled_ratios
from gptlab.evaluation.scoring import Result
from gptlab.study.results import Effects, Interval

UNIT = "nats per token"
OVER_SEEDS = "paired over seeds"
OVER_DOCUMENTS = "paired bootstrap over documents"
DEFINITION = (
    "A main effect is the mean change of the loss when the change is made, over all combinations of the others. An"
    " interaction of a and b is how much more a changes the loss with b than without it; one of three is how much more"
    " the interaction of two is with the third. Below 0 the loss is lower."
)

Weights = Mapping[str, float]
"""A contrast: what each variant's loss is multiplied by before the products are added up."""
Verdict = tuple[str, bool | None, str]
"""What was obtained, whether a claim holds, and a note."""
Scored = Mapping[str, Mapping[int, Result]]
"""The held-out text's score by variant and seed."""


def at(name: str, share: float, *, own_context: bool = False) -> str:
    """Return what a converted variant's scores after a share of the pre-training are called among all scores."""
    return f"{name} at {share:g}" + (" in its own context" if own_context else "")


def seeds_interval(differences: Sequence[float]) -> Interval:
    """Return the mean of paired differences, one for each seed, with Student's t interval (none for a single seed)."""
    n = len(differences)
    mean = math.fsum(differences) / n
    if n < 2:
        return Interval(mean=mean, low=None, high=None, n=n, unit=UNIT, method=OVER_SEEDS)
    deviation = math.sqrt(math.fsum((d - mean) ** 2 for d in differences) / (n - 1))
    half = t_quantile(1 - (1 - COVERAGE) / 2, n - 1) * deviation / math.sqrt(n)
    return Interval(mean=mean, low=mean - half, high=mean + half, n=n, unit=UNIT, method=OVER_SEEDS)


def documents_interval(results: Mapping[str, Result], weights: Weights, resamples: int = 10_000) -> Interval:
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
    if n < 2:
        return Interval(mean=mean, low=None, high=None, n=n, unit=UNIT, method=OVER_DOCUMENTS)
    tail = (1 - COVERAGE) / 2
    low, high = np.quantile(resampled_ratios(gaps, tokens, 0, resamples), [tail, 1 - tail])
    return Interval(mean=mean, low=float(low), high=float(high), n=n, unit=UNIT, method=OVER_DOCUMENTS)


def contrast(weights: Weights, results: Scored) -> Interval | None:
    """Return a contrast of losses on the held-out text; None where no seed was trained to the end in every variant.

    The interval is over seeds where there are several, else over documents.
    """
    common = sorted(set.intersection(*(set(results.get(name, ())) for name in weights)))
    if not common:
        return None
    if len(common) == 1:
        return documents_interval({name: results[name][common[0]] for name in weights}, weights)
    gaps = []
    for seed in common:
        losses = {name: results[name][seed].metrics["nats_per_token"] for name in weights}
        gaps.append(math.fsum(weight * losses[name] for name, weight in weights.items()))
    return seeds_interval(gaps)


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


def effects(factors: Mapping[str, Sequence[str]], results: Scored) -> Effects | None:
    """Return the effects of a factorial with their intervals; None where the variants form none, or one has no run."""
    contrasts = factorial(factors)
    if contrasts is None:
        return None
    main, interactions = ({name: contrast(w, results) for name, w in part.items()} for part in contrasts)
    terms = {name: interval for name, interval in (main | interactions).items() if interval is not None}
    if len(terms) < len(main | interactions):
        return None
    return Effects(
        definition=DEFINITION,
        main={name: terms[name] for name in main},
        interactions={name: terms[name] for name in interactions},
    )


def below(interval: Interval) -> bool | None:
    """Is the difference below zero, beyond its interval?"""
    if interval.low is None or interval.high is None:
        return None
    return True if interval.high < 0 else False if interval.low > 0 else None


def above(interval: Interval) -> bool | None:
    """Is the difference above zero, beyond its interval?"""
    verdict = below(interval)
    return None if verdict is None else not verdict


def every(*verdicts: bool | None) -> bool | None:
    """Are all true? None where one cannot be told and none is false."""
    return False if False in verdicts else None if None in verdicts else True


def said(interval: Interval) -> str:
    """A difference with its interval."""
    ends = "" if interval.low is None else f" [{interval.low:+.4f}, {interval.high:+.4f}]"
    return f"{interval.mean:+.4f}{ends} {interval.unit}"


def over(interval: Interval) -> str:
    """What an interval is over, in words."""
    return f"95% interval {interval.method}, n = {interval.n}" if interval.low is not None else "a single seed"


def t_quantile(share: float, df: int) -> float:
    """Return the quantile of Student's t distribution with ``df`` degrees of freedom, for 0.5 < ``share`` < 1."""
    low, high = 0.0, 1.0
    while t_distribution(high, df) < share:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if t_distribution(middle, df) < share else (low, middle)
    return (low + high) / 2


def t_distribution(t: float, df: int) -> float:
    """Return the probability of a value up to ``t`` >= 0 (Abramowitz and Stegun 1964, 26.7.3 and 26.7.4)."""
    angle = math.atan(t / math.sqrt(df))
    cosine, sine = math.cos(angle), math.sin(angle)
    term, total = (cosine, 0.0) if df % 2 else (1.0, 0.0)
    for k in range(2 + df % 2, df + 1, 2):
        total += term
        term *= cosine**2 * (k - 1) / k
    inside = 2 / math.pi * (angle + sine * total) if df % 2 else sine * total
    return 0.5 + inside / 2
