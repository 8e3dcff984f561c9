"""The head of the report: what was found in brief, the table of variants, the effects and the curves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from gptlab.formatting import count, listed, memory, percent, times
from gptlab.report import pictures as pictures
from gptlab.report.blocks import (
    Block,
    Bullets,
    Column,
    Paragraph,
    Picture,
    Pictures,
    Section,
    Table,
    in_noise,
    literal,
    nats,
    span,
    verdict,
)
from gptlab.report.end import claim_words
from gptlab.report.view import NAMES, Study, tokens
from gptlab.study.claims import TIE
from gptlab.study.results import Effects, Interval


def in_brief(study: Study) -> Section:
    """What each change did, in a sentence or two each, and what failed."""
    items = [item for change in NAMES for item in _finding(study, change)]
    every = _best_first(study, [n for n in study.variants if len(study.kinds[n] & set(NAMES)) == 3])
    if every and "other" not in study.kinds[every[0]]:
        converted = study.variants[every[0]].source == "converted"
        name = study.made(every[0]) if converted else "All three together"  # there are several ways to convert
        items += [f"**{name}.** {_sentences(study, every[0])}"]
    items += [f"**Claims.** {claim_words(study)}."] if study.claims else []
    blocks: list[Block] = [Bullets(items)] if items else []
    blocks += [Paragraph(note, "note") for note in caveats(study)]
    if study.failures:
        runs = sum(len(v.runs) for v in study.variants.values())
        failed = f"**{len(study.failures)} of {runs} runs failed**"
        text = f"{failed} and count in no figure: {'; '.join(study.failures)}."
        blocks.append(Paragraph(text, "warning"))
    return Section("in-brief", "In brief", blocks)


def _finding(study: Study, change: str) -> list[str]:
    return [
        f"**{study.made(name)}.** {_sentences(study, name)}" for name in _best_first(study, study.alone(change))[:3]
    ]


def _best_first(study: Study, names: Sequence[str]) -> list[str]:
    """Where there are many ways to one change, those that were trained on, by their loss; else as they are."""
    if any(study.variants[name].source != "converted" for name in names):
        return list(names)
    names = [name for name in names if not study.as_converted(name)]
    return sorted(names, key=lambda name: loss if (loss := study.loss(name)) is not None else math.inf)


def _sentences(study: Study, name: str) -> str:
    """Quality, cache and speed of one variant against the base."""
    parts, gap = [], study.variants[name].difference
    if gap is not None:
        parts.append(f"Loss {verdict(gap)}.")
    elif study.untrained(name):
        parts.append("Quality unknown: every run failed.")
    if study.contexts:
        context = study.contexts[-1]
        own, before = study.cache(name, context), study.cache(study.base_name, context)
        if own and before:
            words = ", as in the base" if own == before else f" instead of {memory(before)}"
            parts.append(f"Cache at {tokens(context)}: {memory(own)}{words}.")
    points = study.decode(name).keys() & study.decode(study.base_name).keys()
    if points:
        parts.append(f"Decoding: {speed_words(study, name, max(points, key=weight))}.")
    return " ".join(parts)


def weight(at: tuple[int, int]) -> tuple[int, int]:
    """Order (context, batch) by the tokens that are held in the cache."""
    return at[0] * at[1], at[0]


def speed_words(study: Study, name: str, at: tuple[int, int]) -> str:
    """A measured ratio in words: a tie where it is within the noise of a shared machine."""
    ratio = study.decode(name)[at] / study.decode(study.base_name)[at]
    return f"{compared(ratio)} ({tokens(at[0])}, batch {at[1]})"


def compared(ratio: float) -> str:
    """A ratio of speeds in words: a tie where it is within the noise of a shared machine."""
    tie = ", a tie" if 1 / TIE < ratio < TIE else ""
    return f"{times(ratio)} the base's speed{tie}"


def caveats(study: Study) -> list[str]:
    """What the reader must know before believing the figures."""
    notes: list[str] = []
    intervals = [v.difference for v in study.variants.values() if v.difference is not None]
    for method in sorted({one.method for one in intervals}):
        ns = sorted({one.n for one in intervals if one.method == method})
        notes.append(f"Intervals are 95%, {literal(method)} (n = {', '.join(map(str, ns))}).")
        if "documents" in method:
            notes.append("They say how much the text matters; how much another training seed would is not in them.")
    if any(in_noise(one) for one in intervals):
        notes.append("A difference whose interval covers zero is called inside the noise.")
    if study.timings:
        notes.append(f"Speeds that differ by less than a factor of {TIE} are called a tie.")
    return [" ".join(notes)] if notes else []


def summary(study: Study) -> Section:
    """The table of all variants, and quality against cache."""
    contexts = study.contexts
    long = contexts[-1] if contexts else 0
    speeds = common_point(study, "decode")
    columns = [Column("variant", "text"), Column("parameters")]
    if contexts:
        columns += [Column("cache a token"), Column(f"cache, {count(long)} tokens")]
    if speeds:
        columns += [Column("tokens/s")]
    has_loss = any(study.loss(n) is not None for n in study.variants)
    has_gap = any(study.variants[n].difference for n in study.variants)
    if has_loss:
        columns += [Column("loss")]
    if has_gap:
        columns += [Column("difference"), Column("95% interval"), Column("", "range")]
    rows = []
    for name in study.variants:
        row: list[object] = [f"**{study.label(name)}**", count(study.variants[name].parameters["total"])]
        if contexts:
            row += [memory(study.per_token(name)), memory(study.cache(name, long) or 0)]
        if speeds:
            value = study.decode(name).get(speeds)
            row += [count(value) if value else "-"]
        loss, gap = study.loss(name), study.variants[name].difference
        if has_loss:
            row += [f"{loss:.3f}" if loss is not None else "-"]
        if has_gap:
            row += [
                nats(gap) if gap else ("base" if name == study.base_name else "-"),
                span(gap) if gap else "",
                gap,
            ]
        rows.append(row)
    dtypes = sorted({entry.dtype for entry in study.base.cache})
    note = f"Cache of one sequence in {listed(dtypes)}." if dtypes else ""
    if has_loss:
        base = study.label(study.base_name)
        note += f" Loss in nats a token on {study.text}; differences to {base}, below zero is better."
        trained_on = {study.reference(name) for name in study.variants} - {study.base_name}
        if trained_on:
            other = study.label(trained_on.pop())
            note += f" What was converted and trained on is compared with {other}, which saw as many tokens."
    if speeds:
        note += f" Decoding measured at {tokens(speeds[0])} of context, batch {speeds[1]}, {study.dtype}."
    if any(config.window for config in study.configs.values()) and contexts:
        note += " A window's cache takes so much for each token until the window is full, and no more after."
    table = Table("Variants", study.setting, columns, rows, note.strip())
    return Section("summary", "Summary", [table, *_row(pictures.pareto(study) + pictures.cache(study))])


def common_point(study: Study, what: Literal["decode", "prefill"]) -> tuple[int, int] | None:
    """The heaviest (context, batch) at which ``decode`` or ``prefill`` was measured in all timed variants."""
    timed = [set(study.rates(n, what)) for n in study.variants if study.timed(n)]
    common = set.intersection(*timed) if timed else set()
    return max(common, key=weight) if common else None


def _row(found: list[Picture]) -> list[Block]:
    return [Pictures(found)] if found else []


def quality(study: Study) -> Section:
    """Effects and interactions where there is a factorial, the ladder, and the curves."""
    blocks: list[Block] = []
    found = study.results.effects
    if found:
        rows = [_effect(term, one, "lower loss", "higher loss") for term, one in found.main.items()]
        rows += [_effect(term, one, "better together", "worse together") for term, one in found.interactions.items()]
        columns = [Column("effect", "text"), Column("nats a token"), Column("95% interval"), Column("", "text")]
        table = Table("Effects", study.setting, columns, rows, literal(found.definition))
        blocks += [Paragraph(_interactions(found)), table, *_row(pictures.effects(study))]
    ladder = _ladder(study)
    if ladder:
        blocks.append(ladder)
    trained = {n: v for n, v in study.variants.items() if v.source != "converted"}
    runs = {n: (pictures.name_of(study, n), v.runs) for n, v in trained.items()}
    blocks += _row(pictures.losses(runs, study.base_name, pictures.looks(study)))
    return Section("quality", "Quality, and how the changes go together" if found else "Quality", blocks)


def _effect(term: str, one: Interval, below: str, above: str) -> list[str]:
    word = "no interval" if one.low is None else below if one.mean < 0 else above
    row = [literal(pictures.term_words(term)), nats(one), span(one) or "-"]
    return [*row, "inside the noise" if in_noise(one) else word]


def _interactions(found: Effects) -> str:
    """Which changes depend on each other, in words."""
    if all(one.low is None for one in found.interactions.values()):
        return "Without intervals nothing can be said about how much the changes depend on each other."
    certain = {t: one for t, one in found.interactions.items() if one.low is not None and not in_noise(one)}
    if not certain:
        return (
            "No interaction stands out of the noise: as far as this study can tell, what one change does to the loss"
            " does not depend on the others."
        )
    words = [f"{literal(pictures.term_words(t))} ({nats(one)}, {span(one)})" for t, one in certain.items()]
    return (
        f"The changes do not simply add up: {listed(words)} stand{'s' * (len(words) == 1)} out of the noise. Below zero"
        " two changes together do better than apart would suggest, above zero they do worse."
    )


def _ladder(study: Study) -> Table | None:
    """One change after the other: the base, with RoPE, with GQA as well, with all three."""
    steps, done = [study.base_name], set()
    for change in NAMES:
        done.add(change)
        steps += [name for name, kinds in study.kinds.items() if kinds == done][:1]
    losses = [loss for name in steps if (loss := study.loss(name)) is not None]
    if len(losses) < len(NAMES) + 1:
        return None
    context, rows = study.contexts[-1] if study.contexts else 0, []
    for i, name in enumerate(steps):
        totals = [study.variants[n].parameters["total"] for n in steps[max(i - 1, 0) : i + 1]]
        row = [f"+ {list(NAMES.values())[i - 1]}" if i else study.label(name), count(totals[-1])]
        row += [percent(totals[-1], totals[0]) if i else ""]
        row += [memory(study.cache(name, context) or 0)] if context else []
        rows.append([*row, f"{losses[i]:.3f}", nats(losses[i] - losses[i - 1]) if i else ""])
    columns = [Column("step", "text"), Column("parameters"), Column("to the step before")]
    columns += [Column(f"cache, {count(context)} tokens")] if context else []
    columns += [Column("loss"), Column("to the step before")]
    return Table("One change after the other", study.setting, columns, rows, f"Loss in nats a token on {study.text}.")
