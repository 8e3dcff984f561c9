"""What the changes do to the loss: effects and interactions, one change after the other, and the curves of training."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gptlab.formatting import count, memory, percent
from gptlab.plotting import lines, points
from gptlab.plotting.lines import Series
from gptlab.plotting.style import Look
from gptlab.report.ages import by_age, rates, term_of
from gptlab.report.blocks import (
    Block,
    Column,
    Picture,
    Section,
    Table,
    direction,
    literal,
    nats,
    probability,
    side_by_side,
    span,
)
from gptlab.report.view import NAMES, Study
from gptlab.study.results import Effects, Run
from gptlab.training.curves import Array, smooth

Curve = Sequence[tuple[int, float]]


def quality(study: Study) -> Section:
    """Return effects and interactions where there is a factorial, the ladder of changes, and the curves."""
    blocks: list[Block] = []
    effects = study.results.effects
    if effects:
        blocks += [_effects(study, effects), *side_by_side([_drawn(effects)])]
    blocks += _ladder(study)
    blocks += [*side_by_side([*_training(study), *_differences(study)]), *by_age(study), *rates(study)]
    return Section("quality", "Quality, and how the changes combine" if effects else "Quality", blocks)


def _effects(study: Study, effects: Effects) -> Table:
    rows, corrected = [], any(one.adjusted is not None for one in effects.main.values())
    for together, terms in ((False, effects.main), (True, effects.interactions)):
        for term, one in terms.items():
            words = direction(one, *("better together", "worse together") if together else ())
            row = [term_of(term), nats(one), span(one) or "-"]
            rows.append([*row, *[probability(one.adjusted)] * corrected, words])
    columns = [Column("effect", "text"), Column("nats per token"), Column("95% interval")]
    columns += [*[Column("p, corrected")] * corrected, Column("", "text")]
    return Table("Effects", study.setting, columns, rows, literal(effects.definition))


def _drawn(effects: Effects) -> Picture:
    """Main effects and interactions of a factorial."""
    terms = [*effects.main.items(), *effects.interactions.items()]
    rows = [(term_of(term), one.mean, one.low, one.high) for term, one in terms]
    drawing = points.intervals(rows, "change of the loss (nats per token)", len(effects.main))
    caption = (
        "Top: the effect of each change on the loss, averaged over all combinations of the others. Bottom: the"
        " interactions of the changes. Left of zero the loss is lower. Lines are 95% intervals; grey and hollow marks"
        " are within noise."
    )
    return Picture("effects", caption, drawing)


def _ladder(study: Study) -> list[Table]:
    """One change after the other: the base, with RoPE, with GQA as well, with all three."""
    steps, done = [study.base_name], set()
    for change in NAMES:
        done.add(change)
        steps += [name for name, kinds in study.kinds.items() if kinds == done][:1]
    losses = [loss for name in steps if (loss := study.loss(name)) is not None]
    if len(losses) < len(NAMES) + 1:
        return []
    context, rows = study.contexts[-1] if study.contexts else 0, []
    for i, (name, title) in enumerate(zip(steps, [study.label(steps[0]), *NAMES.values()], strict=True)):
        sizes = [study.variants[n].parameters["total"] for n in steps[max(i - 1, 0) : i + 1]]
        row = [f"+ {title}" if i else title, count(sizes[-1]), percent(sizes[-1], sizes[0]) if i else ""]
        row += [memory(study.cache(name, context) or 0)] if context else []
        rows.append([*row, f"{losses[i]:.3f}", nats(losses[i] - losses[i - 1]) if i else ""])
    columns = [Column("step", "text"), Column("parameters"), Column("change")]
    columns += [Column(f"cache, {count(context)} tokens")] if context else []
    columns += [Column("loss"), Column("change")]
    note = f"Loss in nats per token on {study.text}; changes from one step to the next."
    return [Table("One change after the other", study.setting, columns, rows, note)]


def _trained(study: Study) -> dict[str, list[Run]]:
    """The finished runs of all variants but converted ones."""
    return {
        name: [run for run in variant.runs if run.status == "done"]
        for name, variant in study.variants.items()
        if variant.source != "converted"
    }


def _training(study: Study) -> list[Picture]:
    """The training loss against tokens."""
    series, tops = [], []
    for name, runs in _trained(study).items():
        shared = _common([run.curve for run in runs])
        if shared is None or len(shared[0]) < 3:
            continue
        across, values = shared
        values = np.stack([smooth(across, row, across[-1] / 50) for row in values])
        series.append(_banded(study.name_of(name), study.looks[name], across, values))
        tops.append(float(values[:, len(across) // 8 :].max()))
    if not series:
        return []
    drawing = lines.draw(series, "training tokens", "training loss (nats per token)", top=max(tops))
    caption = "Training loss, smoothed. The steep start is cut off at the top."
    if any(one.low is not None for one in series):
        caption += " Bands reach from the lowest to the highest seed."
    return [Picture("loss-curves", caption, drawing)]


def _differences(study: Study) -> list[Picture]:
    """The validation loss less that of the base, seed by seed."""
    trained, series = _trained(study), []
    before = {run.seed: dict(run.validation_curve) for run in trained.get(study.base_name, ())}
    for name, runs in trained.items():
        curves = [
            [(at, value - before[run.seed][at]) for at, value in run.validation_curve if at in before[run.seed]]
            for run in sorted(runs, key=lambda run: run.seed)
            if run.seed in before and name != study.base_name
        ]
        shared = _common(curves)
        if shared is not None and len(shared[0]) > 1:
            series.append(_banded(study.name_of(name), study.looks[name], *shared, marks=True))
    if not series:
        return []
    title = f"validation loss less that of {study.name_of(study.base_name)} (nats per token)"
    drawing = lines.draw(series, "training tokens", title, zero=True)
    caption = (
        f"Validation loss less that of {study.label(study.base_name)} after the same tokens of the same data. Below"
        " zero a variant is ahead."
    )
    return [Picture("loss-differences", caption, drawing)]


def _banded(label: str, look: Look, across: Array, values: Array, *, marks: bool = False) -> Series:
    """The mean of several curves with a band from the lowest to the highest: (n,) and (curves, n)."""
    low, high = (values.min(0).tolist(), values.max(0).tolist()) if len(values) > 1 else (None, None)
    return Series(label, look, across.tolist(), values.mean(0).tolist(), low, high, marks=marks)


def _common(curves: Sequence[Curve]) -> tuple[Array, Array] | None:
    """Several curves at the places that all of them have: (n,) and (curves, n)."""
    tables = [dict(curve) for curve in curves if curve]
    if not tables:
        return None
    places = sorted(set.intersection(*(set(table) for table in tables)))
    return np.array(places, dtype=float), np.array([[table[at] for at in places] for table in tables], dtype=float)
