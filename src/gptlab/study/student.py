"""Student's t distribution and Holm's correction, from their definitions."""

from __future__ import annotations

import math
from collections.abc import Sequence


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
    """Return the probability of a value up to ``t`` (Abramowitz and Stegun 1964, 26.7.3 and 26.7.4)."""
    if t < 0:
        return 1 - t_distribution(-t, df)
    angle = math.atan(t / math.sqrt(df))
    cosine, sine = math.cos(angle), math.sin(angle)
    term, total = (cosine, 0.0) if df % 2 else (1.0, 0.0)
    for k in range(2 + df % 2, df + 1, 2):
        total += term
        term *= cosine**2 * (k - 1) / k
    inside = 2 / math.pi * (angle + sine * total) if df % 2 else sine * total
    return min(0.5 + inside / 2, 1.0)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return the p-values of a family, adjusted so that all verdicts together are wrong as seldom as one would be.

    Holm's step-down method (1979): the smallest is multiplied by the size of the family, the next by one less, and so
    on; none comes out smaller than one before it. It assumes nothing about how the tests depend on each other.
    """
    adjusted, least = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        least = max(least, min((len(p_values) - rank) * p_values[i], 1.0))
        adjusted[i] = least
    return adjusted
