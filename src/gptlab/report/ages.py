"""What changes as models grow older, and what a search of learning rates gave."""

from __future__ import annotations

from collections.abc import Mapping

from gptlab.formatting import TIMES, millions
from gptlab.plotting import lines
from gptlab.plotting.lines import Series
from gptlab.report.blocks import VARIANT, Block, Column, Picture, Table, bracketed, ends, literal, side_by_side, span
from gptlab.report.view import NAMES, Study
from gptlab.study.results import Age, Interval


def term_of(term: str) -> str:
    """Return an effect's name: RoPE × GQA."""
    return f" {TIMES} ".join(NAMES.get(part, part) for part in term.split(" x "))


def by_age(study: Study) -> list[Block]:
    """Return losses, differences and effects at each number of tokens."""
    ages = study.results.ages
    if not ages:
        return []
    seeds = [max((len(own.by_run) for own in age.quality.values()), default=0) for age in ages]
    columns = [VARIANT]
    for age, n in zip(ages, seeds, strict=True):
        columns.append(
            Column(f"{millions(age.tokens)} tokens" + (f", {n} seed{'s' * (n > 1)}" * (len(set(seeds)) > 1)))
        )
    gaps = {name: [age.differences.get(name) for age in ages] for name in study.variants}
    rows = [[f"**{study.label(study.base_name)}**", *(_loss(age, study.base_name) for age in ages)]]
    rows += [
        [f"**{study.label(name)}**", *map(_cell, row)]
        for name, row in gaps.items()
        if any(gap is not None for gap in row)
    ]
    if any(age.baseline for age in ages):
        label = next(literal(age.baseline.label) for age in ages if age.baseline)
        rows.append([label, *(f"{b.quality.nats_per_token:.3f}" if (b := age.baseline) else "" for age in ages)])
    note = (
        f"Nats per token on {study.text}: the losses of the base and of a count model, else less the base's, with 95%"
    )
    blocks: list[Block] = [Table("Against age", study.setting, columns, rows, f"{note} intervals; in brackets: noise.")]
    titles = {name: study.name_of(name) for name in study.variants}
    pictures = _drawn(
        study, {titles[name]: row for name, row in gaps.items()}, "differences-by-age", "loss less the base's"
    )
    if all(age.effects for age in ages):
        terms = {
            term_of(term): [{**age.effects.main, **age.effects.interactions}.get(term) for age in ages if age.effects]
            for term in {**ages[0].effects.main, **ages[0].effects.interactions}  # type: ignore[union-attr]
        }
        blocks.append(
            Table("Effects against age", study.setting, columns, [[t, *map(_cell, row)] for t, row in terms.items()])
        )
        pictures += _drawn(study, terms, "effects-by-age", "effect")
    return [*blocks, *side_by_side(pictures)]


def _loss(age: Age, name: str) -> str:
    return f"{age.quality[name].nats_per_token:.3f}" if name in age.quality else ""


def _cell(gap: Interval | None) -> str:
    return "" if gap is None else f"{bracketed(gap)} [{span(gap)}]" if span(gap) else bracketed(gap)


def _drawn(study: Study, gaps: Mapping[str, list[Interval | None]], name: str, what: str) -> list[Picture]:
    """Differences against tokens, with bands of their intervals."""
    series, looks = [], list(study.looks.values())
    for i, (title, row) in enumerate(gaps.items()):
        points = [(age.tokens, gap) for age, gap in zip(study.results.ages, row, strict=True) if gap is not None]
        if len(points) > 1:
            bands = [ends(gap) or (gap.mean, gap.mean) for _, gap in points]
            y = [gap.mean for _, gap in points]
            low, high = ([band[side] for band in bands] for side in (0, 1))
            series.append(Series(title, looks[i % len(looks)], [n for n, _ in points], y, low, high, marks=True))
    if not series:
        return []
    drawing = lines.draw(series, "training tokens", f"{what} (nats per token)", zero=True)
    caption = f"{what.capitalize()}, against age: each point is the end of a run of its own. Bands are 95% intervals."
    return [Picture(name, caption, drawing)]


def rates(study: Study) -> list[Block]:
    """Return the losses at each learning rate that was tried."""
    searches = study.results.rates
    tried = sorted({one.learning_rate for row in searches.values() for one in row})
    if not tried:
        return []
    rows = []
    for what, row in searches.items():
        losses = {one.learning_rate: one.nats_per_token for one in row if one.nats_per_token is not None}
        best = min(losses, key=losses.__getitem__, default=None)
        cells = (f"{losses[rate]:.3f}" if rate in losses else "-" for rate in tried)
        rows.append([literal(what), *(f"**{c}**" if r == best else c for r, c in zip(tried, cells, strict=True))])
    columns = [Column("", "text"), *(Column(f"{rate:g}") for rate in tried)]
    return [Table("Learning rates", study.setting, columns, rows, "Nats per token; the best in bold.")]
