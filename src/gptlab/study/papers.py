"""Claims of papers that a study can examine: what they say, and which differences here decide them."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean

from gptlab.study.findings import NOTHING, Expect, Finding, Test, over, said
from gptlab.study.results import Results, Timings
from gptlab.study.statistics import Scored, Weights, at, contrast, over_seeds

SMOOTHED = 10
"""Points of a loss curve that are averaged before it is said to have reached a loss."""
TIE = 1.15
"""Ratios of times nearer to 1 than this are noise on a shared machine."""

GQA, LONGFORMER = "GQA (Ainslie et al. 2023)", "Longformer (Beltagy et al. 2020)"

Verdict = tuple[str, bool | None, str]
"""What the clock says, whether a claim holds, and a note."""


@dataclass(frozen=True)
class Rule:
    """A claim and how to judge it.

    Attributes:
        paper: that makes it.
        claim: in words.
        variants: that it is about, by name.
        judge: from results and scores, for claims about quality.
        clock: from timings, for claims about speed.
    """

    paper: str
    claim: str
    variants: tuple[str, ...]
    judge: Callable[[Results, Scored], Finding] | None = None
    clock: Callable[[Timings], Verdict] | None = None


def _rope_falls_faster(results: Results, scored: Scored) -> Finding:
    curves = {name: _curves(results, name) for name in ("base", "rope")}
    common = sorted(curves["base"].keys() & curves["rope"].keys())
    if not common:
        return NOTHING
    gaps, earlier = [], []
    for seed in common:
        base, rope = curves["base"][seed], curves["rope"][seed]
        gaps.append(fmean(r[1] - b[1] for r, b in zip(rope, base, strict=True)))
        reached = _reached(rope, fmean(loss for _, loss in base[-SMOOTHED:]))
        if reached is not None:
            earlier.append(reached / base[-1][0])
    estimate = over_seeds(gaps)
    ours = f"training loss over the whole run {said(estimate.interval)} with RoPE"
    if len(earlier) == len(common):
        ours += f"; it reached the last loss of learned positions after {fmean(earlier):.0%} of the tokens"
    return Finding(ours, (Test(estimate, "lower"),), over(estimate.interval))


def _grouped_between(results: Results, scored: Scored) -> Finding:
    near = ("grouped minus multi-head", {"gqa": 1.0, "base": -1.0})
    far = ("multi-query minus grouped", {"mqa": 1.0, "gqa": -1.0})
    closer = ("the second less the first", {"mqa": 1.0, "gqa": -2.0, "base": 1.0})
    return _all("higher", scored, "", near, far, closer)


def _windows_grow(results: Results, scored: Scored) -> Finding:
    fixed = ("fixed minus increasing", {"swa": 1, "swa-increasing": -1})
    falling = ("decreasing minus fixed", {"swa-decreasing": 1, "swa": -1})
    return _all("higher", scored, "equal mean window", fixed, falling)


def _all(side: Expect, scored: Scored, note: str, *pairs: tuple[str, Weights]) -> Finding:
    """Are all of these differences on one side of zero? Each has the words that stand before it."""
    words, weights = zip(*pairs, strict=True)
    estimates = [gap for one in weights if (gap := contrast(one, scored)) is not None]
    if len(estimates) < len(pairs):
        return NOTHING
    ours = "; ".join(f"{word} {said(gap.interval)}" for word, gap in zip(words, estimates, strict=True))
    notes = [note, over(estimates[0].interval)]
    return Finding(ours, tuple(Test(one, side) for one in estimates), "; ".join(filter(None, notes)))


def _last(results: Results, name: str) -> float:
    """The share at the end of a variant's uptraining; 0 where there was none, or it failed."""
    conversion = results.variants[name].conversion
    return conversion.checkpoints[-1].share if conversion and conversion.checkpoints else 0.0


def _pooling(uptrained: bool, results: Results, scored: Scored) -> Finding:
    share = _last(results, "mqa-mean") if uptrained else 0.0
    if uptrained and not share:
        return NOTHING
    mean, first, random = (at(name, share) for name in ("mqa-mean", "mqa-first", "mqa-random"))
    note = f"one key head, {f'uptrained for {share:.0%}' if uptrained else 'right after conversion'}"
    pairs = (("mean minus first", {mean: 1, first: -1}), ("first minus random", {first: 1, random: -1}))
    return _all("lower", scored, note, *pairs)


def _copied(uptrained: bool, results: Results, scored: Scored) -> Finding:
    share = _last(results, "context-copied") if uptrained else 0.0
    if uptrained and not share:
        return NOTHING
    copied, random = (at(name, share, own_context=True) for name in ("context-copied", "context-random"))
    note = f"{f'uptrained for {share:.0%}; ' if uptrained else ''}text read in windows of the longer context"
    return _all("lower", scored, note, ("copied minus random positions", {copied: 1, random: -1}))


def _usable(results: Results, scored: Scored) -> Finding:
    """Usable is called what loses less than half of what heads at random lose."""
    base, random = at(results.study.base, 0.0), at("mqa-random", 0.0)
    several, single = at("gqa-mean", 0.0), at("mqa-mean", 0.0)
    lost = {name: contrast({name: 1, base: -1}, scored) for name in (several, single, random)}
    near = contrast({several: 1, base: -0.5, random: -0.5}, scored)
    far = contrast({base: 0.5, random: 0.5, single: -1}, scored)
    if near is None or far is None or not all(lost.values()):
        return NOTHING
    words = [f"{difference.interval.mean:+.4f}" for difference in lost.values() if difference is not None]
    ours = f"loss added: {words[0]} with several key heads, {words[1]} with one, {words[2]} with heads at random"
    note = f"usable: less than half of what heads at random lose; mean of the heads; {over(near.interval)}"
    return Finding(ours, (Test(near, "lower"), Test(far, "lower")), note)


def _recovers(results: Results, scored: Scored) -> Finding:
    """Does uptraining recover more than half of what was lost, against the continued base?"""
    general, base = results.study.conversion, at(results.study.base, 0.0)
    share = min(_last(results, name) for name in ("gqa-mean", "mqa-mean"))
    if general is None or general.reference is None or not share:
        return NOTHING
    pairs = []
    for name, words in (("gqa-mean", "several key heads"), ("mqa-mean", "one key head")):
        left = {at(name, share): 1.0, at(general.reference, share): -1.0}
        pairs.append((f"{words}: what is left less half of what was lost", {**left, at(name, 0.0): -0.5, base: 0.5}))
    note = f"uptrained for {share:.0%}, against the base after the same training"
    return _all("lower", scored, note, *pairs)


def _windows_linear(timings: Timings) -> Verdict:
    growth = {name: _growth(timings, name) for name in ("base", "swa")}
    if growth["base"] is None or growth["swa"] is None:
        return "not obtained", None, "fewer than two lengths were timed"
    (first, last, full), (_, _, windowed) = growth["base"], growth["swa"]
    span = f"from {first:,} to {last:,} tokens"
    ours = f"{span} the time of reading grows as T^{windowed:.2f} with windows, T^{full:.2f} without"
    note = (
        "forward passes with everything around attention, which is linear in any case; PyTorch's fused attention keeps"
        " memory linear without windows too, and windows keep the cache constant"
    )
    return ours, windowed < TIE and full > windowed + 0.2, note


def _grouped_time(timings: Timings) -> Verdict:
    points = [
        {(row.context, row.batch): row.milliseconds for row in timings.variants[name].decode}
        for name in ("base", "gqa", "mqa")
    ]
    common = set.intersection(*map(set, points))
    if not common:
        return "not obtained", None, "no point was timed"
    context, batch = point = max(common, key=lambda p: (p[0] * p[1], p[0]))
    full, grouped, single = (times[point] for times in points)
    ours = (
        f"{full:.1f} ms multi-head, {grouped:.1f} grouped, {single:.1f} multi-query for a token in each of {batch}"
        f" sequences with {context:,} tokens in the cache"
    )
    if full < TIE * single:
        return ours, None, "the times are too near to each other to tell"
    return ours, grouped - single < full - grouped, "one decoding step, median of alternating rounds"


def _rope_cost(timings: Timings) -> Verdict:
    rates = [timings.variants[name].training_tokens_per_second for name in ("base", "rope")]
    if not rates[0] or not rates[1]:
        return "not obtained", None, "training was not timed"
    ratio = rates[0] / rates[1]
    note = f"factors below {TIE} either way are within the noise of a shared machine"
    return f"a step takes {ratio:.2f} times as long", None if 1 / TIE < ratio < TIE else False, note


CLAIMS = {
    "rope-falls-faster": Rule(
        "RoFormer (Su et al. 2021)",
        "with rotary positions the training loss falls faster than with learned ones",
        ("base", "rope"),
        judge=_rope_falls_faster,
    ),
    "rope-cost": Rule(
        "Rotary embeddings (EleutherAI 2021)",
        "rotary positions cost 1 to 3% of the time of a step",
        ("base", "rope"),
        clock=_rope_cost,
    ),
    "gqa-between": Rule(
        GQA,
        "quality lies between multi-head and multi-query attention, closer to multi-head",
        ("base", "gqa", "mqa"),
        judge=_grouped_between,
    ),
    "gqa-time": Rule(
        GQA,
        "the time of inference is closer to multi-query than to multi-head attention",
        ("base", "gqa", "mqa"),
        clock=_grouped_time,
    ),
    "windows-linear": Rule(
        LONGFORMER,
        "time and memory are linear in the length, where full attention is quadratic",
        ("base", "swa"),
        clock=_windows_linear,
    ),
    "windows-grow": Rule(
        LONGFORMER,
        "windows that grow from layer to layer are better than fixed ones, and fixed ones better than shrinking ones",
        ("swa", "swa-increasing", "swa-decreasing"),
        judge=_windows_grow,
    ),
    "uptraining-pooling-before": Rule(
        GQA,
        "right after conversion, averaged heads are better than the first head, and the first than new ones",
        ("mqa-mean", "mqa-first", "mqa-random"),
        judge=functools.partial(_pooling, False),
    ),
    "uptraining-pooling": Rule(
        GQA,
        "after uptraining too, averaged heads are better than the first head, and the first than new ones",
        ("mqa-mean", "mqa-first", "mqa-random"),
        judge=functools.partial(_pooling, True),
    ),
    "uptraining-usable": Rule(
        GQA,
        "grouped queries are usable right after conversion, where multi-query attention is not",
        ("gqa-mean", "mqa-mean", "mqa-random"),
        judge=_usable,
    ),
    "uptraining-recovers": Rule(
        GQA,
        "uptraining for 5% of the pre-training recovers most of what the conversion loses",
        ("gqa-mean", "mqa-mean"),
        judge=_recovers,
    ),
    "positions-copied-before": Rule(
        LONGFORMER,
        "a longer context that starts from copied positions is better right away than one from random ones",
        ("context-copied", "context-random"),
        judge=functools.partial(_copied, False),
    ),
    "positions-copied": Rule(
        LONGFORMER,
        "a longer context that starts from copied positions is better after training, too",
        ("context-copied", "context-random"),
        judge=functools.partial(_copied, True),
    ),
}
"""Claims by the names that study files use."""


def _curves(results: Results, name: str) -> dict[int, list[tuple[int, float]]]:
    return {run.seed: run.curve for run in results.variants[name].runs if run.status == "done"}


def _reached(curve: list[tuple[int, float]], loss: float) -> float | None:
    """Return the tokens after which the smoothed curve is at ``loss``, or None."""
    for end in range(SMOOTHED, len(curve) + 1):
        if fmean(value for _, value in curve[end - SMOOTHED : end]) <= loss:
            return curve[end - 1][0]
    return None


def _growth(timings: Timings, name: str) -> tuple[int, int, float] | None:
    """Return the exponent with which the time of reading grows over the upper half of the lengths."""
    rows = sorted((row.context, row.context / row.tokens_per_second) for row in timings.variants[name].prefill)
    rows = rows[len(rows) // 2 - 1 :] if len(rows) > 3 else rows
    if len(rows) < 2:
        return None
    (first, short), (last, long) = rows[0], rows[-1]
    return first, last, math.log(long / short) / math.log(last / first)
