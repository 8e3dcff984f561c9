"""The head of the report: the table of variants, and quality against memory."""

from __future__ import annotations

from collections.abc import Sequence

from gptlab.formatting import count, listed, memory, millions, times
from gptlab.model import cost
from gptlab.plotting import lines, points
from gptlab.plotting.lines import Series, merged
from gptlab.report.blocks import (
    VARIANT,
    Block,
    Column,
    Paragraph,
    Picture,
    Section,
    Table,
    ends,
    literal,
    nats,
    side_by_side,
    span,
)
from gptlab.report.view import Study, tokens
from gptlab.study.papers import TIE


def summary(study: Study) -> Section:
    """Return the table of all variants, what its intervals cover, what failed, and the figures of quality and cache."""
    table = variants_table(study, "Variants", list(study.variants), {n: study.label(n) for n in study.variants})
    blocks: list[Block] = [table]
    if caveats := _caveats(study):
        blocks.append(Paragraph(caveats, "note"))
    if study.failures:
        runs = sum(len(v.runs) for v in study.variants.values())
        failed = f"**{len(study.failures)} of {runs} runs failed** and are left out of all figures"
        blocks.append(Paragraph(f"{failed}: {'; '.join(study.failures)}.", "warning"))
    return Section("summary", "Summary", [*blocks, *side_by_side([*_pareto(study), *_cache(study)])])


def _caveats(study: Study) -> str:
    """What the intervals cover."""
    gaps = [v.difference for v in study.variants.values() if v.difference is not None]
    notes = []
    for method in sorted({gap.method for gap in gaps}):
        ns = ", ".join(map(str, sorted({gap.n for gap in gaps if gap.method == method})))
        covers = "the choice of text, not of the training seed" if "documents" in method else ""
        notes.append(f"Intervals: 95%, {literal(method)} (n = {ns}){covers and f'; they cover {covers}'}.")
    if residual := study.results.residual:
        words = f"{residual.deviation:.4f} nats per token ({residual.df} degrees of freedom)"
        notes.append(f"Standard deviation of one run, pooled over variants: {words}.")
    return " ".join(notes)


def variants_table(study: Study, title: str, names: Sequence[str], titles: dict[str, str]) -> Table:
    """Return sizes, speed and loss of variants, with their difference to what they are compared with."""
    context, point = (study.contexts or [0])[-1], study.common_point("decode")
    has_loss = any(study.loss(n) is not None for n in names)
    has_gap = any(study.variants[n].difference for n in names)
    columns = [VARIANT, Column("parameters")]
    columns += [Column(f"cache, {count(context)} tokens")] if context else []
    columns += [Column("tokens/s"), Column("speed-up")] if point else []
    columns += [Column("loss")] if has_loss else []
    columns += [Column("difference"), Column("95% interval"), Column("", "range")] if has_gap else []
    rows = []
    for name in names:
        variant, loss = study.variants[name], study.loss(name)
        row: list[object] = [f"**{titles[name]}**", count(variant.parameters["total"])]
        row += [memory(study.cache(name, context) or 0)] if context else []
        if point:
            rate = study.rates(name, "decode").get(point)
            row += [count(rate) if rate else "-", speed_up(study, name, point)]
        row += [f"{loss:.3f}" if loss is not None else "-"] if has_loss else []
        if has_gap:
            gap = variant.difference
            without = "base" if name == study.base_name else "-"
            row += [nats(gap) if gap else without, span(gap) if gap else "", gap]
        rows.append(row)
    if len(names) == len(study.variants) and has_loss:  # what counting alone predicts
        for one in study.results.baselines:
            label = f"{literal(one.label)}, {millions(one.tokens)} tokens"
            cells: dict[str, object] = {"variant": label, "loss": f"{one.quality.nats_per_token:.3f}"}
            rows.append([cells.get(column.title, None if column.kind == "range" else "") for column in columns])
    return Table(title, study.setting, columns, rows, _note(study, names, has_loss))


def speed_up(study: Study, name: str, point: tuple[int, int]) -> str:
    """Return how many times as fast as the base it decodes: a tie in brackets, nothing for the same architecture."""
    rate, before = (study.rates(one, "decode").get(point) for one in (name, study.base_name))
    if not rate or not before or study.configs[name] == study.configs[study.base_name]:
        return ""
    ratio = rate / before
    return f"({times(ratio)})" if 1 / TIE < ratio < TIE else times(ratio)


def _note(study: Study, names: Sequence[str], has_loss: bool) -> str:
    notes = []
    if dtypes := sorted({entry.dtype for entry in study.base.cache}):
        notes.append(f"Cache of one sequence in {listed(dtypes)}.")
    if has_loss:
        base = study.label(study.base_name)
        notes.append(f"Loss in nats per token on {study.text}; differences to {base}, below zero is better.")
        if others := {study.reference(name) for name in names} - {study.base_name}:
            other = study.label(others.pop())
            notes.append(f"Uptrained variants are compared with {other}, which saw the same number of tokens.")
    if point := study.common_point("decode"):
        at = f"{tokens(point[0])} of context, batch {point[1]}, {study.dtype}"
        notes.append(f"Decoding measured at {at}; a speed-up in brackets is a tie, within a factor of {TIE}.")
    return " ".join(notes)


def _pareto(study: Study) -> list[Picture]:
    """Loss against the cache at the longest context."""
    losses = {name: loss for name in study.drawn if (loss := study.loss(name)) is not None}
    context = study.contexts[-1] if study.contexts else 0
    sizes = {name: size for name in losses if (size := study.cache(name, context)) is not None}
    if len(sizes) < 2:
        return []
    dots: list[points.Point] = []
    for name, size in sizes.items():
        gap, base = study.variants[name].difference, study.loss(study.reference(name))
        around = ends(gap) if gap is not None else None
        low, high = (None, None) if around is None or base is None else (base + around[0], base + around[1])
        dots.append((study.name_of(name), study.looks[name], float(size), losses[name], low, high))
    front: list[int] = []
    for i in sorted(range(len(dots)), key=lambda i: dots[i][2:4]):
        if not front or dots[i][3] < dots[front[-1]][3]:
            front.append(i)
    drawing = points.scatter(dots, front, f"cache of one sequence of {tokens(context)}", "loss (nats per token)")
    caption = (
        f"Quality against memory, {tokens(context)} in {study.base.cache[0].dtype}. Lower is better text, further left"
        " is a smaller cache. The grey line joins the variants that no other beats in both. Bars are 95% intervals of"
        f" the difference to {study.label(study.base_name)}."
    )
    return [Picture("quality-against-cache", caption, drawing)]


def _cache(study: Study) -> list[Picture]:
    """Bytes of the cache against context, from the configurations."""
    if not study.contexts:
        return []
    size, dtype = study.cache_size, study.base.cache[0].dtype
    last = max(study.contexts[-1], 4 * study.configs[study.base_name].context_length)
    places = [2**i for i in range(4, last.bit_length())]
    series = [
        Series(study.name_of(n), study.looks[n], places, [cost.cache_bytes(study.configs[n], p, size) for p in places])
        for n in study.drawn
    ]
    drawing = lines.draw(
        merged(series), "tokens of context", f"cache of one sequence ({dtype})", powers=True, up="bytes"
    )
    windows = any("swa" in kinds for kinds in study.kinds.values())
    caption = "Grouped queries divide the cache at every length; a window stops its growth." if windows else ""
    caption = f"{caption or 'The cache of keys and values against the context.'} Both axes are logarithmic."
    return [Picture("cache-against-context", caption, drawing)]
