"""Claims about conversions: what is left right after them, and what a little training recovers."""

from __future__ import annotations

from gptlab.study.results import Results
from gptlab.study.statistics import Scored, Verdict, Weights, at, below, contrast, every, over, said

NOTHING: Verdict = ("not obtained", None, "no seed came to the end in all")


def _last(results: Results, name: str) -> float:
    """The share at the end of a variant's uptraining; 0 where there was none, or it failed."""
    conversion = results.variants[name].conversion
    return conversion.checkpoints[-1].share if conversion and conversion.checkpoints else 0.0


def _lower(scored: Scored, *pairs: tuple[str, Weights]) -> Verdict:
    """Are all of these differences below zero? Each has the words that stand before it."""
    differences = {words: contrast(weights, scored) for words, weights in pairs}
    there = {words: difference for words, difference in differences.items() if difference is not None}
    if len(there) < len(pairs):
        return NOTHING
    ours = "; ".join(f"{words} {said(difference)}" for words, difference in there.items())
    return ours, every(*map(below, there.values())), over(next(iter(there.values())))


def _pooling(results: Results, scored: Scored, share: float) -> Verdict:
    mean, first, random = (at(name, share) for name in ("mqa-mean", "mqa-first", "mqa-random"))
    return _lower(scored, ("mean minus first", {mean: 1, first: -1}), ("first minus random", {first: 1, random: -1}))


def pooling_before(results: Results, scored: Scored) -> Verdict:
    """Right after conversion, is the mean of the heads better than the first, and this than random ones?"""
    ours, holds, note = _pooling(results, scored, 0.0)
    return ours, holds, f"one key head, right after conversion; {note}"


def pooling_after(results: Results, scored: Scored) -> Verdict:
    """The same at the end of the uptraining."""
    share = _last(results, "mqa-mean")
    if not share:
        return NOTHING
    ours, holds, note = _pooling(results, scored, share)
    return ours, holds, f"one key head, uptrained for {share:.0%}; {note}"


def usable(results: Results, scored: Scored) -> Verdict:
    """Usable is called what loses less than half of what heads at random lose."""
    base, random = at(results.study.base, 0.0), at("mqa-random", 0.0)
    several, single = at("gqa-mean", 0.0), at("mqa-mean", 0.0)
    lost = {name: contrast({name: 1, base: -1}, scored) for name in (several, single, random)}
    near = contrast({several: 1, base: -0.5, random: -0.5}, scored)
    far = contrast({base: 0.5, random: 0.5, single: -1}, scored)
    if near is None or far is None or not all(lost.values()):
        return NOTHING
    words = [f"{difference.mean:+.4f}" for difference in lost.values() if difference is not None]
    ours = f"loss added: {words[0]} with several key heads, {words[1]} with one, {words[2]} with heads at random"
    note = f"usable: less than half of what heads at random lose; mean of the heads; {over(near)}"
    return ours, every(below(near), below(far)), note


def recovers(results: Results, scored: Scored) -> Verdict:
    """Does uptraining recover more than half of what was lost, against the continued base?"""
    general, base = results.study.conversion, at(results.study.base, 0.0)
    share = min(_last(results, name) for name in ("gqa-mean", "mqa-mean"))
    if general is None or general.reference is None or not share:
        return NOTHING
    pairs = []
    for name, words in (("gqa-mean", "several key heads"), ("mqa-mean", "one key head")):
        left = {at(name, share): 1.0, at(general.reference, share): -1.0}
        pairs.append((f"{words}: what is left less half of what was lost", {**left, at(name, 0.0): -0.5, base: 0.5}))
    ours, holds, note = _lower(scored, *pairs)
    return ours, holds, f"uptrained for {share:.0%}, against the base after the same training; {note}"


def _copied(results: Results, scored: Scored, share: float) -> Verdict:
    pair = {at("context-copied", share, own_context=True): 1, at("context-random", share, own_context=True): -1}
    ours, holds, note = _lower(scored, ("copied minus random positions", pair))
    return ours, holds, f"text read in windows of the longer context; {note}"


def copied_before(results: Results, scored: Scored) -> Verdict:
    """Right after conversion, are copied positions better than random ones?"""
    return _copied(results, scored, 0.0)


def copied_after(results: Results, scored: Scored) -> Verdict:
    """The same at the end of the uptraining."""
    share = _last(results, "context-copied")
    if not share:
        return NOTHING
    ours, holds, note = _copied(results, scored, share)
    return ours, holds, f"uptrained for {share:.0%}; {note}"
