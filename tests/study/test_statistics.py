"""Differences and effects against other ways to compute them."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from gptlab.evaluation.compare import paired_difference
from gptlab.evaluation.scoring import Result, Score
from gptlab.study.claims import CLAIMS, claims_of_results, claims_of_timings
from gptlab.study.results import Decode, Prefill, VariantTimings
from gptlab.study.statistics import (
    OVER_DOCUMENTS,
    OVER_SEEDS,
    contrast,
    documents_interval,
    effects,
    factorial,
    seeds_interval,
    t_distribution,
    t_quantile,
)

NAMES = ["rope", "gqa", "swa"]
CELLS = {"-".join(chosen) or "base": chosen for size in range(4) for chosen in itertools.combinations(NAMES, size)}


def result(nats: list[float], name: str = "x", tokens: int = 10) -> Result:
    scores = tuple(Score(loss * tokens, tokens, 1, 1) for loss in nats)
    data = {"sha256": "a", "ids_sha256": "b"}
    return Result("text", {}, {"name": name}, data, {"nats_per_token": sum(nats) / len(nats)}, scores, 0.0)


# Student's t, 97.5%, from any textbook's table.
@pytest.mark.parametrize(
    ("df", "t"), [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (5, 2.571), (9, 2.262), (10, 2.228), (30, 2.042)]
)
def test_quantiles_of_t(df: int, t: float) -> None:
    assert t_quantile(0.975, df) == pytest.approx(t, abs=6e-4)


@pytest.mark.parametrize("df", [1, 2, 5, 8])
def test_the_distribution_of_t_against_draws(df: int) -> None:
    draws = np.random.default_rng(0).standard_t(df, 200_000)
    for t in (0.0, 0.5, 2.0, 5.0):
        assert t_distribution(t, df) == pytest.approx((draws <= t).mean(), abs=4e-3)


def test_an_interval_over_seeds() -> None:
    # Gosset's own example (Student 1908): hours of sleep gained by ten patients, 1.58 +- 2.262 * 1.23 / sqrt(10).
    interval = seeds_interval([1.2, 2.4, 1.3, 1.3, 0.0, 1.0, 1.8, 0.8, 4.6, 1.4])
    assert interval.mean == pytest.approx(1.58)
    assert (interval.low, interval.high) == (pytest.approx(0.70, abs=5e-3), pytest.approx(2.46, abs=5e-3))
    assert (interval.n, interval.method) == (10, OVER_SEEDS)
    assert seeds_interval([0.5]).low is None
    twin = seeds_interval([0.0, 0.0, 0.0])
    assert (twin.low, twin.high) == (0.0, 0.0)


def test_an_interval_covers_the_truth_as_often_as_it_says() -> None:
    draw = np.random.default_rng(1)
    inside = 0
    for _ in range(2000):
        interval = seeds_interval(list(draw.normal(0.3, 1.0, 3)))
        assert interval.low is not None
        assert interval.high is not None
        inside += interval.low <= 0.3 <= interval.high
    assert inside / 2000 == pytest.approx(0.95, abs=0.015)


def test_one_seed_falls_back_on_documents_and_agrees_with_the_comparison_of_two() -> None:
    draw = np.random.default_rng(2)
    a, b = (result(list(draw.normal(4, 1, 30)), name) for name in "ab")
    expected = paired_difference(a, b)
    interval = contrast({"a": 1.0, "b": -1.0}, {"a": {0: a}, "b": {0: b}})
    assert interval is not None
    assert (interval.method, interval.n) == (OVER_DOCUMENTS, 30)
    assert interval.mean == pytest.approx(expected.mean, rel=1e-12)
    assert (interval.low, interval.high) == (pytest.approx(expected.low, rel=1e-12), pytest.approx(expected.high))


def test_a_contrast_takes_the_seeds_that_all_have() -> None:
    scored = {
        "a": {0: result([4.0]), 1: result([4.2]), 2: result([9.0])},
        "b": {0: result([3.0]), 1: result([3.1])},
        "c": {},
    }
    interval = contrast({"a": 1.0, "b": -1.0}, scored)
    assert interval is not None
    assert (interval.n, interval.method) == (2, OVER_SEEDS)
    assert interval.mean == pytest.approx(1.05)
    assert contrast({"a": 1.0, "c": -1.0}, scored) is None
    single = documents_interval({"a": result([4.0]), "b": result([3.0])}, {"a": 1.0, "b": -1.0})
    assert (single.mean, single.low, single.n) == (pytest.approx(1.0), None, 1)


def test_effects_against_a_regression() -> None:
    draw = np.random.default_rng(3)
    losses = {name: list(draw.normal(4, 0.1, 3)) for name in CELLS}
    estimated = effects(CELLS, {name: {i: result([x]) for i, x in enumerate(row)} for name, row in losses.items()})
    assert estimated is not None
    terms = [chosen for size in range(4) for chosen in itertools.combinations(NAMES, size)]
    # Coded -1 and +1, a coefficient is the effect of k factors divided by 2^k.
    design = [[math.prod(1 if f in CELLS[c] else -1 for f in term) for term in terms] for c in CELLS]
    fits = np.linalg.lstsq(np.array(design, float), np.array([losses[name] for name in CELLS]), rcond=None)[0]
    for term, fit in zip(terms, fits, strict=True):
        if term:
            one = (estimated.main if len(term) == 1 else estimated.interactions)[" x ".join(term)]
            assert one.mean == pytest.approx(fit.mean() * 2 ** len(term), abs=1e-12)
    assert list(estimated.main) == NAMES
    assert len(estimated.interactions) == 4


def test_what_is_no_factorial() -> None:
    assert factorial({"base": (), "rope": ("rope",)}) is None
    assert factorial({name: factors for name, factors in CELLS.items() if name != "gqa"}) is None
    assert factorial({**CELLS, "mqa": ("gqa",)}) is None
    two = factorial({"base": (), "a": ("a",), "b": ("b",), "ab": ("a", "b")})
    assert two == (
        {"a": {"base": -0.5, "a": 0.5, "b": -0.5, "ab": 0.5}, "b": {"base": -0.5, "a": -0.5, "b": 0.5, "ab": 0.5}},
        {"a x b": {"base": 1.0, "a": -1.0, "b": -1.0, "ab": 1.0}},
    )
    everyone = {name: {0: result([4.0, 3.0])} for name in CELLS}
    assert effects(CELLS, {**everyone, "swa": {}}) is None


# --- claims -------------------------------------------------------------------------------------------------------


def scored(**losses: float) -> dict[str, dict[int, Result]]:
    """Three seeds each, hardly any noise."""
    return {
        name.replace("_", "-"): {seed: result([loss + 1e-4 * seed * (i % 3)]) for seed in range(3)}
        for i, (name, loss) in enumerate(losses.items())
    }


def results_of(scores: dict[str, dict[int, Result]], curves: dict[str, Any] | None = None) -> Any:
    runs = {
        name: [SimpleNamespace(seed=s, status="done", curve=c) for s, c in enumerate(rows)]
        for name, rows in (curves or {}).items()
    }
    names = {*scores, *runs}
    return SimpleNamespace(variants={name: SimpleNamespace(runs=runs.get(name, [])) for name in names})


@pytest.mark.parametrize(
    ("losses", "holds"),
    [
        ({"base": 4.0, "gqa": 4.01, "mqa": 4.05}, True),
        ({"base": 4.0, "gqa": 4.04, "mqa": 4.05}, False),  # between, but closer to multi-query
        ({"base": 4.0, "gqa": 3.9, "mqa": 4.05}, False),
        ({"base": 4.0, "gqa": 4.00001, "mqa": 4.05}, None),  # the first gap is noise
        ({"base": 4.0, "gqa": 4.01}, None),
    ],
)
def test_grouped_queries_between(losses: dict[str, float], holds: bool | None) -> None:
    scores = scored(**losses)
    (claim,) = claims_of_results(["gqa-between"], results_of(scores), scores)
    assert claim.holds is holds
    assert (claim.ours == "not obtained") == ("mqa" not in losses)


@pytest.mark.parametrize(
    ("fixed", "falling", "holds"), [(4.0, 4.1, True), (3.8, 4.1, False), (4.0, 3.95, False), (3.90001, 4.1, None)]
)
def test_growing_windows(fixed: float, falling: float, holds: bool | None) -> None:
    scores = scored(swa=fixed, swa_increasing=3.9, swa_decreasing=falling)
    (claim,) = claims_of_results(["windows-grow"], results_of(scores), scores)
    assert claim.holds is holds


def test_the_loss_falls_faster() -> None:
    tokens = [1000 * (i + 1) for i in range(40)]
    base = [[[t, 6 - t / 1e4 + 0.01 * s] for t in tokens] for s in range(3)]
    rope = [[[t, max(6 - t / 5e3, 2.0) + 0.011 * s] for t in tokens] for s in range(3)]
    (claim,) = claims_of_results(["rope-falls-faster"], results_of({}, {"base": base, "rope": rope}), {})
    assert claim.holds is True
    mean = sum(t / 1e4 - min(t / 5e3, 4.0) for t in tokens) / 40
    assert f"{mean + 0.001:+.4f}" in claim.ours
    # The last ten points of the base have a mean of 6 - 3.55; the ten up to point i of the other, 6 - (i - 4.5) / 5.
    assert f"after {23 / 40:.0%} of the tokens" in claim.ours
    (claim,) = claims_of_results(["rope-falls-faster"], results_of({}, {"base": rope, "rope": base}), {})
    assert claim.holds is False
    (claim,) = claims_of_results(["rope-falls-faster"], results_of({}, {"base": base[:1], "rope": rope[:1]}), {})
    assert (claim.holds, claim.note) == (None, "a single seed")


def timing(prefill: dict[int, float], decode: dict[tuple[int, int], float], training: float | None) -> VariantTimings:
    return VariantTimings(
        training_tokens_per_second=training,
        training_memory_bytes=None,
        decoding_memory_bytes=None,
        prefill=[Prefill(context=c, batch=1, tokens_per_second=c / seconds) for c, seconds in prefill.items()],
        decode=[
            Decode(context=c, batch=b, milliseconds=ms, tokens_per_second=1e3 * b / ms) for (c, b), ms in decode.items()
        ],
    )


def test_claims_of_the_clock() -> None:
    lengths = [512, 1024, 2048, 4096, 8192]
    full, windowed = ({n: 1e-6 * n**e for n in lengths} for e in (1.8, 1.05))
    point = (8192, 8)
    variants = {
        "base": timing(full, {point: 30.0, (128, 1): 1.0}, 1000.0),
        "swa": timing(windowed, {}, None),
        "rope": timing({}, {}, 980.0),
        "gqa": timing({}, {point: 14.0}, None),
        "mqa": timing({}, {point: 8.0}, None),
    }
    names = [name for name, rule in CLAIMS.items() if rule.clock]
    both: Any = SimpleNamespace(variants=variants)
    claims = claims_of_timings(names, both, both)
    # One to three percent are less than the clock can tell.
    assert [claim.holds for claim in claims] == [None, True, True]
    assert claims[0].ours == "a step takes 1.02 times as long"
    assert "T^1.05 with windows, T^1.80 without" in claims[2].ours
    variants["rope"], variants["gqa"] = timing({}, {}, 800.0), timing({}, {point: 25.0}, None)
    variants["swa"] = timing(full, {}, None)
    claims = claims_of_timings(names, both, both)
    assert [claim.holds for claim in claims] == [False, False, False]
    variants["rope"], variants["mqa"] = timing({}, {}, None), timing({}, {point: 29.0}, None)
    variants["swa"] = timing({512: 1.0}, {}, None)
    claims = claims_of_timings(names, both, both)
    assert [claim.holds for claim in claims] == [None, None, None]
