"""When does it pay? The prediction and how well it holds here, the calculator, and what was timed."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping
from typing import Literal

from gptlab import roofline
from gptlab.config import ModelConfig
from gptlab.formatting import count, digits, memory
from gptlab.plotting import lines
from gptlab.plotting.lines import Series
from gptlab.report.blocks import (
    VARIANT,
    Block,
    Calculator,
    Column,
    Formula,
    Paragraph,
    Picture,
    Section,
    Table,
    literal,
    side_by_side,
    to_plain,
)
from gptlab.report.calculator import calculator
from gptlab.report.texts import known
from gptlab.report.view import Study, sequences, tokens
from gptlab.study import costs


def speed(study: Study) -> Section:
    """Return prediction, calculator, measured speed and memory."""
    text, machine = known()["prediction"], study.machine
    blocks: list[Block] = []
    if machine is not None and study.timings:
        measured = (
            f"{text['where']} On this machine memory is read at {digits(machine.bandwidth / 1e9)} GB/s, and products in"
            f" {study.dtype} reach {digits(machine.flops / 1e9)} GFLOP/s ({literal(study.timings.peaks.how)})."
        )
        blocks += [Paragraph(text["what"]), Formula(text["tex"], text["mathml"]), Paragraph(measured, "note")]
        blocks += [*_fit(study, machine), *side_by_side(_predictions(study, machine))]
        blocks.append(_calculator(study, machine))
    timed = [*side_by_side(_decoding(study)), *_timed(study)]
    return Section("pays", "When does it pay?", blocks, [Section("measured", "Measured speed and memory", timed)])


def _fit(study: Study, machine: roofline.Machine) -> list[Block]:
    """How far the measured points are from the prediction."""
    rows = []
    for name, config in study.configs.items():
        shares, gaps = [], []
        for point in timed.decode if (timed := study.timed(name)) else ():
            step = roofline.predict(config, machine, context=point.context, batch=point.batch, dtype=study.dtype)
            shares.append(100_000 * step.seconds / point.milliseconds)
            gaps.append(point.milliseconds - 1000 * step.seconds)
        if shares:
            found = (min(shares), statistics.median(shares), max(shares))
            row = [f"**{study.label(name)}**", str(len(shares)), *(f"{share:.0f}%" for share in found)]
            rows.append([*row, digits(statistics.median(gaps), 2)])
    if not rows:
        return []
    columns = [VARIANT, Column("points"), Column("least"), Column("median"), Column("most"), Column("ms longer")]
    note = (
        "Share of the predicted limit that decoding reaches, and how much longer a step takes (median). The formula"
        f" leaves out {known()['prediction']['leaves_out']}. Above 100%: weights that stay in the processor's caches."
    )
    return [Table("Measured against predicted", study.setting, columns, rows, note)]


def _calculator(study: Study, machine: roofline.Machine) -> Calculator:
    base = study.configs[study.base_name]
    own = dataclasses.replace(base, n_kv_head=base.n_head, window=None, sinks=0, dilation=1)
    configs = {**{size: ModelConfig.preset(size) for size in costs.SIZES}, "this study's model": own}
    return Calculator(calculator(configs, machine, study.dtype, to_plain(study.machine_words)))


def _decoding(study: Study) -> list[Picture]:
    """Measured tokens per second against context, for each batch, and against batch."""
    measured = {name: study.rates(name, "decode") for name in study.drawn}
    pictures = []
    for batch in sorted({batch for rates in measured.values() for _, batch in rates}):
        series = _lines(study, {n: {c: v for (c, b), v in r.items() if b == batch} for n, r in measured.items()})
        if series:
            drawing = lines.draw(series, "tokens of context", "tokens/s, measured", powers=True, from_zero=True)
            caption = f"Decoding {sequences(batch)} ({study.dtype}): tokens per second in all, against context."
            pictures.append(Picture(f"decode-speed-batch-{batch}", caption, drawing))
    own = measured[study.base_name]
    several = [context for context, _ in own if len([b for c, b in own if c == context]) > 1]
    if several:
        context = max(several)
        series = _lines(study, {n: {b: v for (c, b), v in r.items() if c == context} for n, r in measured.items()})
        drawing = lines.draw(series, "sequences at once", "tokens/s, measured", powers=True, from_zero=True)
        caption = f"Decoding against batch, {tokens(context)} of context ({study.dtype})."
        caption += " The weights are read once for all sequences."
        pictures.append(Picture("decode-speed-against-batch", caption, drawing))
    return pictures


def _lines(study: Study, measured: Mapping[str, Mapping[int, float]]) -> list[Series]:
    return [
        Series(study.name_of(name), study.looks[name], sorted(rates), [rates[at] for at in sorted(rates)], marks=True)
        for name, rates in measured.items()
        if len(rates) > 1
    ]


def _predictions(study: Study, machine: roofline.Machine) -> list[Picture]:
    """Measured points over the roofline's lines, for each batch: the base and the variants of a single change."""
    measured = {name: study.rates(name, "decode") for name in study.drawn if len(study.kinds[name]) <= 1}
    pictures = []
    for batch in sorted({batch for rates in measured.values() for _, batch in rates}):
        drawn: list[Series] = []
        for name, rates in measured.items():
            own = sorted(context for context, b in rates if b == batch)
            if len(own) < 2:
                continue
            places = sorted({*own, *(2**i for i in range(own[0].bit_length(), own[-1].bit_length()))})
            steps = (
                roofline.predict(study.configs[name], machine, context=n, batch=batch, dtype=study.dtype)
                for n in places
            )
            look = study.looks[name]
            drawn.append(Series(study.name_of(name), look, places, [step.tokens_per_second for step in steps]))
            drawn.append(Series("", look, own, [rates[n, batch] for n in own], line=False, marks=True))
        if drawn:
            drawing = lines.draw(drawn, "tokens of context", "tokens/s", powers=True, up="tens")
            caption = f"Decoding {sequences(batch)} ({study.dtype}): lines are the predicted limit, points measured."
            pictures.append(Picture(f"prediction-batch-{batch}", caption, drawing))
    return pictures


def _timed(study: Study) -> list[Block]:
    """One row for each variant: training, memory, reading a prompt, generating."""
    timed = {name: one for name in study.drawn if (one := study.timed(name))}
    if not timed:
        return []
    columns = {
        "training, tokens/s": {n: count(t.training_tokens_per_second or 0) for n, t in timed.items()},
        "memory, training": {n: memory(t.training_memory_bytes or 0) for n, t in timed.items()},
        "memory, decoding": {n: memory(t.decoding_memory_bytes or 0) for n, t in timed.items()},
    }
    points = []
    titles: dict[Literal["prefill", "decode"], str] = {"prefill": "prefill", "decode": "decoding"}
    for what, title in titles.items():
        if point := study.common_point(what):
            rates = {n: study.rates(n, what)[point] for n in timed}
            columns[f"{title}, tokens/s"] = {n: count(rate) for n, rate in rates.items()}
            points.append(f"{title} {tokens(point[0])}, batch {point[1]}")
    absent = ("0", "0\u00a0B")
    shown = {title: cells for title, cells in columns.items() if set(cells.values()) - set(absent)}
    rows = [
        [f"**{study.label(n)}**", *("-" if cells[n] in absent else cells[n] for cells in shown.values())] for n in timed
    ]
    note = f"{study.dtype}; {'; '.join(points)}." if points else ""
    return [Table("Measured", study.setting, [VARIANT, *map(Column, shown)], rows, note)]
