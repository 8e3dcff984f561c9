"""What a study finds about a claim: differences of losses, each with the side on which the claim expects it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from gptlab.study.results import Interval
from gptlab.study.statistics import Estimate

Expect = Literal["lower", "higher", "equal", "not higher"]


@dataclass(frozen=True)
class Test:
    """One difference that a claim is about.

    Attributes:
        estimate: of the difference.
        expect: ``lower`` or ``higher``: that it is below minus the margin, or above the margin; ``equal``: that it is
            nearer to 0 than the margin; ``not higher``: that it is below the margin.
        margin: nats per token.
    """

    __test__ = False  # none of pytest's

    estimate: Estimate
    expect: Expect
    margin: float = 0.0

    @property
    def agrees(self) -> bool:
        """Is the difference itself on the claim's side, whatever its noise?"""
        mean = self.estimate.interval.mean
        match self.expect:
            case "lower":
                return mean < -self.margin
            case "higher":
                return mean > self.margin
            case "equal":
                return abs(mean) < self.margin
            case "not higher":
                return mean < self.margin

    @property
    def p(self) -> float | None:
        """The p-value of what the difference says, which is that the claim holds or that it does not.

        A difference may fall on either side of a bound, so its p-value is two-sided. Equality within a margin is two
        one-sided tests (Schuirmann 1987), of which the larger p-value counts: as if the 90% interval lay within.
        """
        estimate, bound = self.estimate, -self.margin if self.expect == "lower" else self.margin
        if self.expect == "equal" and not self.agrees and estimate.interval.mean < 0:
            bound = -bound
        below, above = estimate.below(bound), estimate.above(bound)
        if below is None or above is None:
            return None
        if self.agrees and self.expect == "equal":
            return max(below, estimate.above(-bound) or 0.0)
        if self.agrees and self.expect == "not higher":
            return below
        return min(2 * min(below, above), 1.0)


@dataclass(frozen=True)
class Finding:
    """All that decides a claim.

    Attributes:
        ours: what was obtained, in words.
        tests: that must all agree for the claim to hold; none where nothing was obtained.
        note: what the verdict rests on.
    """

    ours: str
    tests: tuple[Test, ...]
    note: str

    @property
    def agrees(self) -> bool:
        """Do all differences point to the claim?"""
        return all(test.agrees for test in self.tests)

    @property
    def p(self) -> float | None:
        """The p-value of what the differences say together.

        That all are on the claim's side is as sure as the least sure of them (Berger 1982); that one is not, as the
        surest of those that are not, times the number of chances that it had.
        """
        values = [test.p for test in self.tests]
        known = [value for value in values if value is not None]
        if not known or len(known) < len(values):
            return None
        if self.agrees:
            return max(known)
        against = [value for test, value in zip(self.tests, known, strict=True) if not test.agrees]
        return min(len(known) * min(against), 1.0)


NOTHING = Finding("not obtained", (), "no seed was trained to the end in all")


def said(interval: Interval) -> str:
    """A difference with its interval."""
    ends = "" if interval.low is None else f" [{interval.low:+.4f}, {interval.high:+.4f}]"
    return f"{interval.mean:+.4f}{ends} {interval.unit}"


def over(interval: Interval) -> str:
    """What an interval is over, in words."""
    if interval.low is None:
        return "a single seed"
    freedom = f", {interval.df} degrees of freedom" if interval.df is not None else ""
    return f"95% interval {interval.method}, n = {interval.n}{freedom}"
