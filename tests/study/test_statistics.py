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
from gptlab.study.claims import claims_of_results, claims_of_timings
from gptlab.study.findings import Finding, Test
from gptlab.study.papers import CLAIMS
from gptlab.study.results import Decode, Interval, Prefill, VariantTimings
from gptlab.study.settings import ClaimSettings
from gptlab.study.statistics import (
    OVER_DOCUMENTS,
    OVER_SEEDS,
    POOLED,
    Estimate,
    Scored,
    Weights,
    contrast,
    effects,
    factorial,
    over_documents,
    over_seeds,
    residual,
)
from gptlab.study.student import holm, t_distribution, t_quantile

NAMES = ["rope", "gqa", "swa"]
CELLS = {"-".join(chosen) or "base": chosen for size in range(4) for chosen in itertools.combinations(NAMES, size)}


def result(nats: list[float], name: str = "x", tokens: int = 10) -> Result:
    scores = tuple(Score(loss * tokens, tokens, 1, 1) for loss in nats)
    data = {"sha256": "a", "ids_sha256": "b"}
    return Result("text", {}, {"name": name}, data, {"nats_per_token": sum(nats) / len(nats)}, scores, 0.0)


def at_seeds(losses: dict[str, list[float | None]] | dict[str, list[float]], *, pooled: bool = True) -> Scored:
    """Losses by variant and seed; None is a run that failed."""
    results = {n: {i: result([x]) for i, x in enumerate(row) if x is not None} for n, row in losses.items()}
    return Scored(results, [frozenset(losses)] if pooled else [])


def estimated(weights: Weights, scores: Scored) -> Interval:
    estimate = contrast(weights, scores)
    assert estimate is not None
    return estimate.interval


# Student's t, 97.5%, from any textbook's table.
@pytest.mark.parametrize(
    ("df", "t"), [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (5, 2.571), (9, 2.262), (10, 2.228), (30, 2.042)]
)
def test_quantiles_of_t(df: int, t: float) -> None:
    assert t_quantile(0.975, df) == pytest.approx(t, abs=6e-4)


# At -4, -1.3, 0.4 and 6, from scipy 1.17.1 (`stats.t.cdf`).
@pytest.mark.parametrize(
    ("df", "shares"),
    [
        (1, [0.07797913037736932, 0.20871440016015272, 0.6211189415908434, 0.9474315432887466]),
        (2, [0.028595479208968315, 0.16162351590802015, 0.6360827634879543, 0.9866642633922876]),
        (14, [0.0006580245969349131, 0.1072987962809679, 0.6524034940691438, 0.9999837261206087]),
        (29, [0.00020003197282624587, 0.1019195918310149, 0.6539561364111421, 0.9999992036045787]),
    ],
)
def test_the_distribution_of_t(df: int, shares: list[float]) -> None:
    assert [t_distribution(t, df) for t in (-4.0, -1.3, 0.4, 6.0)] == pytest.approx(shares, abs=1e-14)


@pytest.mark.parametrize("seed", range(20))
def test_holm_is_closed_testing_by_bonferroni(seed: int) -> None:
    """Marcus, Peritz and Gabriel 1976: a hypothesis falls when every set of them that it is in falls."""
    values = (np.random.default_rng(seed).random(5) ** 4).tolist()
    sets = [s for size in range(1, 6) for s in itertools.combinations(range(5), size)]
    closed = [max(min(len(s) * min(values[j] for j in s), 1.0) for s in sets if i in s) for i in range(5)]
    assert holm(values) == pytest.approx(closed, abs=1e-15)
    assert holm([]) == []


def test_an_interval_over_seeds() -> None:
    # Gosset's own example (Student 1908): hours of sleep gained by ten patients, 1.58 +- 2.262 * 1.23 / sqrt(10).
    interval = over_seeds([1.2, 2.4, 1.3, 1.3, 0.0, 1.0, 1.8, 0.8, 4.6, 1.4]).interval
    assert interval.mean == pytest.approx(1.58)
    assert (interval.low, interval.high) == (pytest.approx(0.70, abs=5e-3), pytest.approx(2.46, abs=5e-3))
    assert (interval.n, interval.df, interval.method) == (10, 9, OVER_SEEDS)
    assert interval.p == pytest.approx(0.0028, abs=5e-5)
    alone = over_seeds([0.5]).interval
    assert (alone.low, alone.p) == (None, None)
    twin = over_seeds([0.0, 0.0, 0.0]).interval
    assert (twin.low, twin.high, twin.p) == (0.0, 0.0, 1.0)


def test_pooled_intervals_cover_the_truth_as_often_as_they_say_and_are_narrower() -> None:
    draw = np.random.default_rng(1)
    truth, seeds = draw.normal(4, 0.2, 8), draw.normal(0, 0.3, 3)
    inside, widths, alone = 0, [], []
    for _ in range(400):
        table = truth[:, None] + seeds + draw.normal(0, 0.05, (8, 3))
        losses = dict(zip(CELLS, table.tolist(), strict=True))
        interval = estimated({"rope": 1.0, "base": -1.0}, at_seeds(losses))
        assert interval.low is not None
        assert interval.high is not None
        inside += interval.low <= truth[1] - truth[0] <= interval.high
        widths.append(interval.high - interval.low)
        own = estimated({"rope": 1.0, "base": -1.0}, at_seeds(losses, pooled=False))
        alone.append((own.high or 0) - (own.low or 0))
    assert inside / 400 == pytest.approx(0.95, abs=0.035)
    assert np.mean(widths) < 0.6 * np.mean(alone)  # 2.14 against 4.30 standard errors


def test_one_seed_falls_back_on_documents_and_agrees_with_the_comparison_of_two() -> None:
    draw = np.random.default_rng(2)
    a, b = (result(list(draw.normal(4, 1, 30)), name) for name in "ab")
    expected = paired_difference(a, b)
    interval = estimated({"a": 1.0, "b": -1.0}, Scored({"a": {0: a}, "b": {0: b}}))
    assert (interval.method, interval.n) == (OVER_DOCUMENTS, 30)
    assert interval.mean == pytest.approx(expected.mean, rel=1e-12)
    assert (interval.low, interval.high) == (pytest.approx(expected.low, rel=1e-12), pytest.approx(expected.high))


def test_a_bootstrap_has_p_values_too() -> None:
    draw = np.random.default_rng(3)
    for shift, sure in ((0.0, False), (0.5, True)):
        a, b = result(list(draw.normal(4, 0.5, 40) + shift), "a"), result(list(draw.normal(4, 0.5, 40)), "b")
        estimate = over_documents({"a": a, "b": b}, {"a": 1.0, "b": -1.0})
        interval = estimate.interval
        assert interval.p is not None
        assert interval.low is not None
        assert interval.high is not None
        assert (interval.p < 0.05) is sure is not (interval.low <= 0 <= interval.high)
        assert estimate.above(interval.low) == pytest.approx(0.025, abs=1e-3)
        assert estimate.below(interval.high) == pytest.approx(0.025, abs=1e-3)


def test_a_contrast_takes_the_seeds_that_all_have() -> None:
    scores = at_seeds({"a": [4.0, 4.2, 9.0], "b": [3.0, 3.1], "c": []})
    for one in (scores, Scored(scores.results)):
        interval = estimated({"a": 1.0, "b": -1.0}, one)
        assert (interval.n, interval.df) == (2, 1)
        assert interval.mean == pytest.approx(1.05)
        assert contrast({"a": 1.0, "c": -1.0}, one) is None
    single = over_documents({"a": result([4.0]), "b": result([3.0])}, {"a": 1.0, "b": -1.0}).interval
    assert (single.mean, single.low, single.n) == (pytest.approx(1.0), None, 1)


# Three losses of each cell, made up; what they come to is from statsmodels 0.15.0:
# ols("y ~ rope * gqa * swa + C(seed)") with factors coded -1 and +1, coefficients times 2 ** factors.
LOSSES: dict[str, list[float]] = {
    "base": [4.52, 4.53, 4.49],
    "rope": [4.41, 4.44, 4.40],
    "gqa": [4.55, 4.58, 4.53],
    "swa": [4.50, 4.52, 4.51],
    "rope-gqa": [4.46, 4.47, 4.45],
    "rope-swa": [4.37, 4.41, 4.36],
    "gqa-swa": [4.53, 4.58, 4.55],
    "rope-gqa-swa": [4.40, 4.45, 4.42],
}
THEIRS = {
    "rope": (-0.11250000, -0.12258803, -0.10241197, 9.39477228e-13, 6.576340592811944e-12),
    "gqa": (0.04250000, 0.03241197, 0.05258803, 3.22983044e-07, 1.9378982647507373e-06),
    "swa": (-0.01916667, -0.02925469, -0.00907864, 1.13637250e-03, 0.005681862511109698),
    "rope x gqa": (0.00166667, -0.01850939, 0.02184272, 8.61910506e-01, 1.0),
    "rope x swa": (-0.03500000, -0.05517606, -0.01482394, 2.28222195e-03, 0.009128887789772803),
    "gqa x swa": (0.00166667, -0.01850939, 0.02184272, 8.61910506e-01, 1.0),
    "rope x gqa x swa": (-0.00333333, -0.04368544, 0.03701878, 8.61910506e-01, 1.0),
}


def test_effects_against_statsmodels() -> None:
    made = effects(CELLS, at_seeds(LOSSES))
    assert made is not None
    assert list(made.main) == NAMES
    assert len(made.interactions) == 4
    for term, (mean, low, high, p, adjusted) in THEIRS.items():
        one = (made.main if term in NAMES else made.interactions)[term]
        assert (one.mean, one.low, one.high) == pytest.approx((mean, low, high), abs=1e-8)
        assert one.p == pytest.approx(p, rel=1e-3)
        assert one.adjusted == pytest.approx(adjusted, rel=1e-3)  # multipletests(method="holm")
        assert (one.n, one.df, one.method) == (3, 14, POOLED)
    noise = residual(list(LOSSES), at_seeds(LOSSES))
    assert noise is not None
    assert (noise.deviation, noise.df) == (pytest.approx(0.01152120198755722, rel=1e-9), 14)
    total = sum(3 * spread**2 for spread in noise.by_variant.values())
    assert math.sqrt(total / 14) == pytest.approx(noise.deviation, rel=1e-9)


def test_failed_runs_against_statsmodels() -> None:
    """ols("y ~ C(variant) + C(seed)") without two of the runs."""
    losses: dict[str, list[float | None]] = {name: [*row] for name, row in LOSSES.items()}
    losses["gqa"][1] = losses["swa"][2] = None
    for weights, mean, low, high, p in (
        ({"gqa": 1.0, "base": -1.0}, 0.03740171, 0.01442445, 0.06037897, 0.004021656343921191),
        ({"swa": 1.0, "base": -1.0}, -0.0102906, -0.03326786, 0.01268666, 0.3484235882253328),
    ):
        one = estimated(weights, at_seeds(losses))
        assert (one.mean, one.low, one.high) == pytest.approx((mean, low, high), abs=1e-8)
        assert (one.p, one.df) == (pytest.approx(p, rel=1e-6), 12)


def test_a_twin_differs_by_nothing_and_adds_no_freedom() -> None:
    scores = at_seeds({**LOSSES, "twin": LOSSES["base"]})
    twin = estimated({"twin": 1.0, "base": -1.0}, scores)
    assert (twin.mean, twin.low, twin.high, twin.p) == (0.0, 0.0, 0.0, 1.0)
    rope = estimated({"rope": 1.0, "twin": -1.0}, scores)
    assert (rope.low, rope.high, rope.df) == (pytest.approx(-0.11684272), pytest.approx(-0.07649061), 14)


def test_what_is_no_factorial() -> None:
    assert factorial({"base": (), "rope": ("rope",)}) is None
    assert factorial({name: factors for name, factors in CELLS.items() if name != "gqa"}) is None
    assert factorial({**CELLS, "mqa": ("gqa",)}) is None
    two = factorial({"base": (), "a": ("a",), "b": ("b",), "ab": ("a", "b")})
    assert two == (
        {"a": {"base": -0.5, "a": 0.5, "b": -0.5, "ab": 0.5}, "b": {"base": -0.5, "a": -0.5, "b": 0.5, "ab": 0.5}},
        {"a x b": {"base": 1.0, "a": -1.0, "b": -1.0, "ab": 1.0}},
    )
    assert effects(CELLS, at_seeds({**LOSSES, "swa": []})) is None


# --- tests --------------------------------------------------------------------------------------------------------

PAIRED = [0.01, -0.005, 0.02, -0.005]


# From statsmodels 0.15.0: ttost_paired within 0.02 and 0.005; from scipy 1.17.1: ttest_1samp, two-sided and "less".
@pytest.mark.parametrize(
    ("expect", "margin", "agrees", "p"),
    [
        ("equal", 0.02, True, 0.045860556655783084),
        ("not higher", 0.02, True, 0.045860556655783084),
        ("higher", 0.0, True, 0.47402138849506376),
        ("lower", 0.0, False, 0.47402138849506376),
        ("equal", 0.001, False, None),
    ],
)
def test_a_test_of_a_margin(expect: Any, margin: float, agrees: bool, p: float | None) -> None:
    test = Test(over_seeds(PAIRED), expect, margin)
    assert test.agrees is agrees
    if p is not None:
        assert test.p == pytest.approx(p, rel=1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_equality_is_the_inclusion_of_the_90_percent_interval(seed: int) -> None:
    draw = np.random.default_rng(seed)
    for _ in range(20):
        estimate = over_seeds(draw.normal(draw.normal(0, 0.02), 0.01, 4).tolist())
        mean = estimate.interval.mean
        half = t_quantile(0.95, 3) * (estimate.error or 0.0)
        test = Test(estimate, "equal", 0.03)
        assert test.p is not None
        assert (test.agrees and test.p < 0.05) is (mean - half > -0.03 and mean + half < 0.03)
        # On the other side the 95% interval lies beyond the margin.
        outer = (abs(mean) - 0.03) / (estimate.error or 1.0) > t_quantile(0.975, 3)
        assert (not test.agrees and test.p < 0.05) is outer


def test_several_differences_are_as_sure_as_the_least_sure() -> None:
    sure, unsure = over_seeds([0.1, 0.11, 0.105]), over_seeds([0.1, -0.02, 0.05])
    tests = [Test(sure, "higher"), Test(unsure, "higher")]
    assert Finding("", tuple(tests), "").p == tests[1].p
    against = Finding("", (Test(sure, "lower"), *tests), "")
    assert not against.agrees
    assert against.p == pytest.approx(3 * (tests[0].p or 0))
    assert Finding("", (Test(Estimate(over_seeds([0.5]).interval), "lower"),), "").p is None


# --- claims -------------------------------------------------------------------------------------------------------


def scored(**losses: float) -> Scored:
    """Three seeds each, hardly any noise."""
    rows = {
        name.replace("_", "-"): [loss + 1e-4 * seed * (i % 3) for seed in range(3)]
        for i, (name, loss) in enumerate(losses.items())
    }
    return at_seeds(rows)


def results_of(scores: Scored, curves: dict[str, Any] | None = None) -> Any:
    runs = {
        name: [SimpleNamespace(seed=s, status="done", curve=c) for s, c in enumerate(rows)]
        for name, rows in (curves or {}).items()
    }
    factors = dict.fromkeys((*scores.results, *runs), ()) | CELLS
    names = dict.fromkeys([*scores.results, *runs])
    return SimpleNamespace(
        variants={name: SimpleNamespace(runs=runs.get(name, []), factors=factors[name]) for name in names}
    )


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
    (claim,) = claims_of_results(["gqa-between"], [], results_of(scores), scores)
    assert claim.holds is holds
    assert (claim.ours == "not obtained") == ("mqa" not in losses)


@pytest.mark.parametrize(
    ("fixed", "falling", "holds"), [(4.0, 4.1, True), (3.8, 4.1, False), (4.0, 3.95, False), (3.90001, 4.1, None)]
)
def test_growing_windows(fixed: float, falling: float, holds: bool | None) -> None:
    scores = scored(swa=fixed, swa_increasing=3.9, swa_decreasing=falling)
    (claim,) = claims_of_results(["windows-grow"], [], results_of(scores), scores)
    assert claim.holds is holds


def test_the_loss_falls_faster() -> None:
    tokens = [1000 * (i + 1) for i in range(40)]
    base = [[[t, 6 - t / 1e4 + 0.01 * s] for t in tokens] for s in range(3)]
    rope = [[[t, max(6 - t / 5e3, 2.0) + 0.011 * s] for t in tokens] for s in range(3)]
    (claim,) = claims_of_results(
        ["rope-falls-faster"], [], results_of(Scored({}), {"base": base, "rope": rope}), Scored({})
    )
    assert claim.holds is True
    mean = sum(t / 1e4 - min(t / 5e3, 4.0) for t in tokens) / 40
    assert f"{mean + 0.001:+.4f}" in claim.ours
    # The last ten points of the base have a mean of 6 - 3.55; the ten up to point i of the other, 6 - (i - 4.5) / 5.
    assert f"after {23 / 40:.0%} of the tokens" in claim.ours
    (claim,) = claims_of_results(
        ["rope-falls-faster"], [], results_of(Scored({}), {"base": rope, "rope": base}), Scored({})
    )
    assert claim.holds is False
    (claim,) = claims_of_results(
        ["rope-falls-faster"], [], results_of(Scored({}), {"base": base[:1], "rope": rope[:1]}), Scored({})
    )
    assert (claim.holds, claim.note) == (None, "a single seed")


def test_claims_of_a_study_are_one_family() -> None:
    scores = at_seeds(LOSSES)
    asked = [
        {"claim": "rotary positions lower the loss", "effect": "rope", "expect": "lower", "margin": 0.05},
        {"claim": "they need windows", "effect": "rope x swa", "expect": "lower"},
        {"claim": "windows cost nothing", "of": {"swa": 1, "base": -1}, "expect": "not higher", "margin": 0.02},
        {"claim": "grouping changes nothing", "of": {"gqa": 1, "base": -1}, "expect": "equal", "margin": 0.005},
        {"claim": "beyond the trigram", "of": {"base": 1, "trigram": -1}, "expect": "lower", "margin": 0.3},
    ]
    own = [ClaimSettings(**values) for values in asked]  # type: ignore[arg-type]
    claims = claims_of_results(["windows-grow"], own, results_of(scores), scores)
    assert [claim.paper for claim in claims] == ["Longformer (Beltagy et al. 2020)", *[""] * 5]
    values = [claim.p for claim in claims]
    assert (values[0], values[5]) == (None, None)
    assert (claims[0].ours, claims[5].ours) == ("not obtained", "not obtained")
    assert values[2] == pytest.approx(THEIRS["rope x swa"][3], rel=1e-3)
    adjusted = holm([1.0 if p is None else p for p in values])
    assert [claim.adjusted for claim in claims] == [None, *adjusted[1:5], None]
    assert [claim.holds for claim in claims] == [None, True, True, True, False, None]
    assert claims[3].interval == estimated({"swa": 1.0, "base": -1.0}, scores)
    assert "expected below 0.02; 95% interval paired over seeds" in claims[3].note
    # The same evidence among many claims says less.
    crowd = claims_of_results([], [*own, *[own[-1]] * 30], results_of(scores), scores)
    assert [claim.holds for claim in crowd[:4]] == [True, None, None, None]


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
