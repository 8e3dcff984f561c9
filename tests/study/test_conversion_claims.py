"""The verdicts on claims about conversions, from numbers that nobody measured."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from test_statistics import scored

from gptlab.study.claims import claims_of_results
from gptlab.study.papers import CLAIMS
from gptlab.study.results import Claim
from gptlab.study.statistics import Scored, at


def judged(claim: str, losses: dict[tuple[str, float], float], whole: bool = False) -> Claim:
    """The verdict on a claim from losses by variant and share, three seeds each."""
    names = {name for name, _ in losses}
    scores = scored(**{f"v{i}": loss for i, loss in enumerate(losses.values())})
    long = {name for name in names if name.startswith("context")} if whole else set()
    keys = [at(name, share, own_context=name in long) for name, share in losses]
    record = SimpleNamespace  # with no more than the rules ask for
    variants = {}
    for name in names:
        points = [record(share=share) for n, share in losses if n == name]
        variants[name] = record(factors=(), conversion=record(checkpoints=points))
    about = record(base="base", conversion=record(reference="longer"))
    results: Any = record(study=about, variants=variants)
    renamed = Scored(dict(zip(keys, scores.results.values(), strict=True)), [frozenset(keys)])
    (one,) = claims_of_results([claim], [], results, renamed)
    return one


@pytest.mark.parametrize(("share", "claim"), [(0.0, "uptraining-pooling-before"), (0.05, "uptraining-pooling")])
def test_pooling(share: float, claim: str) -> None:
    names = ("mqa-mean", "mqa-first", "mqa-random")
    for losses, holds in (((4.5, 4.6, 4.9), True), ((4.6, 4.5, 4.9), False), ((4.5, 4.50001, 4.9), None)):
        verdict = judged(claim, {(name, share): loss for name, loss in zip(names, losses, strict=True)})
        assert verdict.holds is holds
    assert judged("uptraining-pooling", {(name, 0.0): 4.0 for name in names}).ours == "not obtained"


def test_usable_right_after_conversion() -> None:
    for several, single, holds in ((4.5, 5.8, True), (5.5, 5.8, False), (4.5, 4.8, False), (4.9999, 5.8, None)):
        losses = {("base", 0.0): 4.0, ("gqa-mean", 0.0): several, ("mqa-mean", 0.0): single, ("mqa-random", 0.0): 6.0}
        verdict = judged("uptraining-usable", losses)
        assert verdict.holds is holds, several
        assert f"loss added: {several - 4:+.3f}"[:-1] in verdict.ours


def test_uptraining_recovers() -> None:
    for several, single, holds in ((4.0, 4.1, True), (4.0, 4.6, False)):
        losses = {("base", 0.0): 4.0, ("gqa-mean", 0.0): 4.2, ("mqa-mean", 0.0): 4.9, ("longer", 0.05): 3.95}
        losses |= {("gqa-mean", 0.05): several, ("mqa-mean", 0.05): single}
        assert judged("uptraining-recovers", losses).holds is holds


def test_copied_positions() -> None:
    for share, claim in ((0.0, "positions-copied-before"), (0.05, "positions-copied")):
        losses = {("context-copied", share): 4.2, ("context-random", share): 5.0}
        assert judged(claim, losses, whole=True).holds is True
        assert judged(claim, losses).ours == "not obtained"  # read in short windows, it says nothing
    assert {rule.paper.split(" ")[0] for name, rule in CLAIMS.items() if name.startswith("uptraining")} == {"GQA"}
