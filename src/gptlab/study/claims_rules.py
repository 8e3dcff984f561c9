"""How a paper's claim is looked at: a rule, and what intervals say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from gptlab.study.results import Interval, Results, Timings
from gptlab.study.statistics import Scored

Verdict = tuple[str, bool | None, str]
"""What was obtained, whether the claim holds, and a note."""


@dataclass(frozen=True)
class Rule:
    """A claim and how to look at it.

    Attributes:
        paper: who says it.
        claim: what they say.
        variants: names of the variants that it is about.
        judge: from results and scores, for claims about quality.
        clock: from results and timings, for claims about speed.
    """

    paper: str
    claim: str
    variants: tuple[str, ...]
    judge: Callable[[Results, Scored], Verdict] | None = None
    clock: Callable[[Timings], Verdict] | None = None


def below(interval: Interval) -> bool | None:
    """Is the difference below zero, beyond its interval?"""
    if interval.low is None or interval.high is None:
        return None
    return True if interval.high < 0 else False if interval.low > 0 else None


def above(interval: Interval) -> bool | None:
    """Is the difference above zero, beyond its interval?"""
    found = below(interval)
    return None if found is None else not found


def every(*found: bool | None) -> bool | None:
    """Are all true? None where one cannot be told and none is false."""
    return False if False in found else None if None in found else True


def said(interval: Interval) -> str:
    """A difference with its interval."""
    ends = "" if interval["low"] is None else f" [{interval['low']:+.4f}, {interval['high']:+.4f}]"
    return f"{interval['mean']:+.4f}{ends} {interval['unit']}"


def over(interval: Interval) -> str:
    """What an interval is over."""
    return f"95% interval {interval['method']}, n = {interval['n']}" if interval["low"] is not None else "a single seed"
