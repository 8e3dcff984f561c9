"""Claims about conversions: what is left right after them, and what a little training recovers."""

from __future__ import annotations

from gptlab.study.assemble_conversion import at
from gptlab.study.claims_rules import Rule, Verdict, below, every, over, said
from gptlab.study.results import Results
from gptlab.study.statistics import Scored, Weights, contrast

GQA = "GQA (Ainslie et al. 2023)"
LONGFORMER = "Longformer (Beltagy et al. 2020)"
NOTHING: Verdict = ("not obtained", None, "no seed came to the end in all")


def _last(results: Results, name: str) -> float:
    """The share at the end of a variant's uptraining; 0 where there was none, or it failed."""
    about = results["variants"][name].get("conversion")
    return about["checkpoints"][-1]["share"] if about and about["checkpoints"] else 0.0


def _yardstick(results: Results) -> str | None:
    about = results["study"].get("conversion")
    return None if about is None else about["reference"]


def _lower(scored: Scored, *pairs: tuple[str, Weights]) -> Verdict:
    """Are all of these differences below zero? Each has the words that stand before it."""
    found = [(words, contrast(weights, scored)) for words, weights in pairs]
    there = [(words, one) for words, one in found if one is not None]
    if len(there) < len(found):
        return NOTHING
    ours = "; ".join(f"{words} {said(one)}" for words, one in there)
    return ours, every(*(below(one) for _, one in there)), over(there[0][1])


def _pooling(results: Results, scored: Scored, share: float) -> Verdict:
    mean, first, random = (at(name, share) for name in ("mqa-mean", "mqa-first", "mqa-random"))
    return _lower(scored, ("mean minus first", {mean: 1, first: -1}), ("first minus random", {first: 1, random: -1}))


def _pooling_before(results: Results, scored: Scored) -> Verdict:
    ours, holds, note = _pooling(results, scored, 0.0)
    return ours, holds, f"one key head, right after conversion; {note}"


def _pooling_after(results: Results, scored: Scored) -> Verdict:
    share = _last(results, "mqa-mean")
    if not share:
        return NOTHING
    ours, holds, note = _pooling(results, scored, share)
    return ours, holds, f"one key head, trained on for {share:.0%}; {note}"


def _usable(results: Results, scored: Scored) -> Verdict:
    """Usable is called what loses less than half of what heads at random lose."""
    base, random = at(results["study"]["base"], 0.0), at("mqa-random", 0.0)
    several, single = at("gqa-mean", 0.0), at("mqa-mean", 0.0)
    lost = {name: contrast({name: 1, base: -1}, scored) for name in (several, single, random)}
    near = contrast({several: 1, base: -0.5, random: -0.5}, scored)
    far = contrast({base: 0.5, random: 0.5, single: -1}, scored)
    if near is None or far is None or not all(lost.values()):
        return NOTHING
    words = [f"{one['mean']:+.4f}" for one in lost.values() if one is not None]
    ours = f"loss added: {words[0]} with several key heads, {words[1]} with one, {words[2]} with heads at random"
    note = f"usable: less than half of what heads at random lose; mean of the heads; {over(near)}"
    return ours, every(below(near), below(far)), note


def _recovers(results: Results, scored: Scored) -> Verdict:
    yardstick, base = _yardstick(results), at(results["study"]["base"], 0.0)
    share = min(_last(results, name) for name in ("gqa-mean", "mqa-mean"))
    if yardstick is None or not share:
        return NOTHING
    pairs = []
    for name, words in (("gqa-mean", "several key heads"), ("mqa-mean", "one key head")):
        left = {at(name, share): 1.0, at(yardstick, share): -1.0}
        pairs.append((f"{words}: what is left less half of what was lost", {**left, at(name, 0.0): -0.5, base: 0.5}))
    ours, holds, note = _lower(scored, *pairs)
    return ours, holds, f"trained on for {share:.0%}, against the base trained on as long; {note}"


def _copied(results: Results, scored: Scored, share: float) -> Verdict:
    pair = {at("context-copied", share, whole=True): 1, at("context-random", share, whole=True): -1}
    ours, holds, note = _lower(scored, ("copied minus random positions", pair))
    return ours, holds, f"text read in windows of the longer context; {note}"


def _copied_before(results: Results, scored: Scored) -> Verdict:
    return _copied(results, scored, 0.0)


def _copied_after(results: Results, scored: Scored) -> Verdict:
    share = _last(results, "context-copied")
    if not share:
        return NOTHING
    ours, holds, note = _copied(results, scored, share)
    return ours, holds, f"trained on for {share:.0%}; {note}"


CONVERSION = {
    "uptraining-pooling-before": Rule(
        GQA,
        "right after conversion the mean of the heads is better than the first of them, and this than new ones",
        ("mqa-mean", "mqa-first", "mqa-random"),
        judge=_pooling_before,
    ),
    "uptraining-pooling": Rule(
        GQA,
        "after uptraining, too, the mean of the heads is better than the first of them, and this than new ones",
        ("mqa-mean", "mqa-first", "mqa-random"),
        judge=_pooling_after,
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
        "a longer context that begins with copies of the positions is better than with random ones right away",
        ("context-copied", "context-random"),
        judge=_copied_before,
    ),
    "positions-copied": Rule(
        LONGFORMER,
        "a longer context that begins with copies of the positions is better than with random ones after training, too",
        ("context-copied", "context-random"),
        judge=_copied_after,
    ),
}
"""Claims by the names that study files use; the study ``convert`` has the variants."""
