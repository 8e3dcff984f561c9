"""Which figures a study has, and what to see in them. Where its numbers are missing, a function returns no picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gptlab.formatting import TIMES
from gptlab.model import cost
from gptlab.plotting import lines, points, style
from gptlab.plotting.lines import Series, merged
from gptlab.plotting.style import Look
from gptlab.report.blocks import Picture, ends, literal
from gptlab.report.view import NAMES, Study, tokens
from gptlab.study import roofline
from gptlab.study.results import Run
from gptlab.training.curves import Array, smooth

Runs = Mapping[str, tuple[str, Sequence[Run]]]
"""Label and training runs of each variant."""


def looks(study: Study) -> dict[str, Look]:
    """How each variant is drawn: the colour tells its attention, dashes and hollow marks rotary positions."""
    without = {"position", "rope"}
    kinds = [
        (str({f: v for f, v in config.to_dict().items() if f not in without}), config.position == "rope")
        for config in study.configs.values()
    ]
    return dict(zip(study.configs, style.looks(kinds), strict=True))


def name_of(study: Study, variant: str) -> str:
    """A variant's name in a drawing, which knows no markup."""
    return study.name_of(variant)


def _drawn(study: Study) -> list[tuple[str, Any]]:
    return [(name, study.variants[name]) for name in study.drawn]


def losses(runs: Runs, base: str, how: Mapping[str, Look]) -> list[Picture]:
    """Draw the training loss against tokens, and the validation loss less the base's.

    Args:
        runs: label and runs of each variant.
        base: the variant to compare with.
        how: each is drawn.
    """
    return [*_training(runs, how), *_differences(runs, base, how)]


def _training(runs: Runs, how: Mapping[str, Look]) -> list[Picture]:
    series, tops = [], []
    for name, (label, all_runs) in runs.items():
        found = _common([run.curve for run in all_runs if run.status == "done"])
        if found is None or len(found[0]) < 3:
            continue
        across, values = found
        values = np.stack([smooth(across, row, across[-1] / 50) for row in values])
        series.append(_banded(label, how[name], across, values))
        tops.append(float(values[:, len(across) // 8 :].max()))
    if not series:
        return []
    drawing = lines.draw(series, "training tokens", "training loss (nats a token)", top=max(tops))
    caption = "Training loss, smoothed; its first descent leaves the picture at the top."
    if any(one.low is not None for one in series):
        caption += " Bands reach from the lowest to the highest seed."
    return [Picture("loss-curves", caption, drawing)]


def _differences(runs: Runs, base: str, how: Mapping[str, Look]) -> list[Picture]:
    before, series = _by_seed(runs[base][1]), []
    for name, (label, all_runs) in runs.items():
        own = _by_seed(all_runs)
        pairs = (
            [_paired(own[seed], before[seed]) for seed in sorted(own.keys() & before.keys())] if name != base else []
        )
        found = _common(pairs)
        if found is not None and len(found[0]) > 1:
            series.append(_banded(label, how[name], *found, marks=True))
    if not series:
        return []
    title = f"validation loss less that of {runs[base][0]} (nats a token)"
    drawing = lines.draw(series, "training tokens", title, zero=True)
    caption = (
        f"Validation loss less that of {literal(runs[base][0])} after the same tokens of the same data. Below zero a"
        " variant is ahead; what counts is where its line ends."
    )
    return [Picture("loss-differences", caption, drawing)]


def _banded(label: str, look: Look, across: Array, values: Array, *, marks: bool = False) -> Series:
    """The mean of several curves with a band from the lowest to the highest: (n,) and (curves, n)."""
    low, high = (values.min(0).tolist(), values.max(0).tolist()) if len(values) > 1 else (None, None)
    return Series(label, look, across.tolist(), values.mean(0).tolist(), low, high, marks=marks)


def _by_seed(runs: Sequence[Run]) -> dict[int, list[tuple[int, float]]]:
    return {run.seed: run.validation_curve for run in runs if run.status == "done"}


def _paired(own: Sequence[Sequence[float]], before: Sequence[Sequence[float]]) -> list[list[float]]:
    reference = {point[0]: point[1] for point in before}
    return [[at, value - reference[at]] for at, value in own if at in reference]


def _common(curves: Sequence[Sequence[Sequence[float]]]) -> tuple[Array, Array] | None:
    """Several curves at the places that all of them have: (n,) and (curves, n)."""
    tables = [{point[0]: point[1] for point in curve} for curve in curves if curve]
    if not tables:
        return None
    places = sorted(set.intersection(*(set(table) for table in tables)))
    return np.array(places, dtype=float), np.array([[table[at] for at in places] for table in tables], dtype=float)


def effects(study: Study) -> list[Picture]:
    """Main effects and interactions of a factorial."""
    found = study.results.effects
    if not found:
        return []
    terms = [*found.main.items(), *found.interactions.items()]
    rows = [(term_words(term), one.mean, one.low, one.high) for term, one in terms]
    drawing = points.intervals(rows, "change of the loss (nats a token)", len(found.main))
    caption = (
        "Above, what each change does to the loss on average over all combinations of the others; below, how much the"
        " changes depend on each other. Left of zero the loss is lower. Lines are 95% intervals; what covers zero is"
        " grey and hollow."
    )
    return [Picture("effects", caption, drawing)]


def term_words(term: str) -> str:
    """An effect's name: RoPE x GQA."""
    return f" {TIMES} ".join(NAMES.get(part, part) for part in term.split(" x "))


def pareto(study: Study) -> list[Picture]:
    """Loss against the cache at the longest context."""
    losses = {name: loss for name in study.drawn if (loss := study.loss(name)) is not None}
    context = study.contexts[-1] if study.contexts else 0
    sizes = {name: size for name in losses if (size := study.cache(name, context)) is not None}
    if len(sizes) < 2:
        return []
    how, dots = looks(study), []
    for name, size in sizes.items():
        gap, base = study.variants[name].difference, study.loss(study.reference(name))
        around = ends(gap) if gap is not None and base is not None else None
        low, high = (None, None) if around is None or base is None else (base + around[0], base + around[1])
        dots.append((name_of(study, name), how[name], float(size), losses[name], low, high))
    front: list[int] = []
    for i in sorted(range(len(dots)), key=lambda i: dots[i][2:4]):
        if not front or dots[i][3] < dots[front[-1]][3]:
            front.append(i)
    drawing = points.scatter(dots, front, f"cache of one sequence of {tokens(context)}", "loss (nats a token)")
    caption = (
        f"Quality against memory, {tokens(context)} in {study.base.cache[0].dtype}: further down is better text,"
        " further left a smaller cache. The grey line joins the variants that no other beats in both; bars are 95%"
        f" intervals of the difference to {study.label(study.base_name)}."
    )
    return [Picture("quality-against-cache", caption, drawing)]


def cache(study: Study) -> list[Picture]:
    """Bytes of the cache against context, from the configurations."""
    if not study.contexts:
        return []
    size = roofline.BYTES[study.base.cache[0].dtype]
    last = max(study.contexts[-1], 4 * study.configs[study.base_name].context_length)
    places = [2**i for i in range(4, last.bit_length())]
    how = looks(study)
    series = merged(
        [
            Series(name_of(study, name), how[name], places, [cost.cache_bytes(config, n, size) for n in places])
            for name, config in ((name, study.configs[name]) for name in study.drawn)
        ]
    )
    dtype = study.base.cache[0].dtype
    drawing = lines.draw(series, "tokens of context", f"cache of one sequence ({dtype})", powers=True, up="bytes")
    caption = "Grouped queries divide the cache at every length; a window stops its growth. Both axes are logarithmic."
    if not any("swa" in kinds for kinds in study.kinds.values()):
        caption = "The cache of keys and values against the context. Both axes are logarithmic."
    return [Picture("cache-against-context", caption, drawing)]


def by_position(study: Study) -> list[Picture]:
    """Loss by the number of tokens that the model has seen."""
    how, series = looks(study), []
    for name, variant in _drawn(study):
        found = variant.by_position
        if found and found.nats:
            ends = [last for _, last in found.buckets]
            series.append(Series(name_of(study, name), how[name], ends, found.nats, marks=True))
    if not series:
        return []
    trained = study.configs[study.base_name].context_length
    beyond = max(one.x[-1] for one in series) > trained
    mark = (float(trained), "trained length") if beyond else None
    drawing = lines.draw(
        series, "tokens seen (up to)", "loss (nats a token)", powers=True, mark=mark, top=_without_first(series)
    )
    caption = "Loss by position: a model that uses its context gets better as it sees more, up to the trained length."
    caption += " All read the same text: at the same position they predict the same tokens."
    if beyond:
        caption += " Right of the dotted line is text longer than any in training; learned positions cannot go there."
    return [Picture("loss-by-position", caption, drawing)]


def _without_first(series: Sequence[Series]) -> float:
    """The height of the second range: the first few tokens are hard for all and would flatten the rest."""
    return max(max(one.y[1:] if len(one.y) > 2 else one.y) for one in series) + 0.05


def decoding(study: Study) -> list[Picture]:
    """Measured tokens per second against context, for each batch, and against batch."""
    measured = {name: study.decode(name) for name in study.drawn}
    points = {point for found in measured.values() for point in found}
    pictures = []
    for batch in sorted({batch for _, batch in points}):
        series = _speeds(
            study, {n: {c: v for (c, b), v in found.items() if b == batch} for n, found in measured.items()}
        )
        if series:
            drawing = lines.draw(series, "tokens of context", "tokens/s, measured", powers=True, from_zero=True)
            caption = f"Decoding {sequences(batch)} at once ({study.dtype}), tokens of all together against context."
            pictures.append(Picture(f"decode-speed-batch-{batch}", caption, drawing))
    own = measured[study.base_name]
    shared = [c for c in {c for c, _ in own} if len([b for at, b in own if at == c]) > 1]
    if shared:
        context = max(shared)
        series = _speeds(
            study, {n: {b: v for (c, b), v in found.items() if c == context} for n, found in measured.items()}
        )
        drawing = lines.draw(series, "sequences at once", "tokens/s, measured", powers=True, from_zero=True)
        caption = (
            f"Decoding against batch, {tokens(context)} of context ({study.dtype}): the weights are read once for all."
        )
        pictures.append(Picture("decode-speed-against-batch", caption, drawing))
    return pictures


def sequences(batch: int) -> str:
    """So many sequences, in words."""
    return "one sequence" if batch == 1 else f"{batch} sequences"


def _speeds(study: Study, measured: Mapping[str, Mapping[int, float]]) -> list[Series]:
    how = looks(study)
    return [
        Series(name_of(study, name), how[name], sorted(found), [found[at] for at in sorted(found)], marks=True)
        for name, found in measured.items()
        if len(found) > 1
    ]


def predictions(study: Study) -> list[Picture]:
    """Measured points over the roofline's lines, for each batch: the base and the variants of a single change."""
    machine, how, pictures = study.machine, looks(study), []
    measured = {name: study.decode(name) for name in study.drawn if len(study.kinds[name]) <= 1}
    for batch in sorted({batch for found in measured.values() for _, batch in found}):
        drawn: list[Series] = []
        for name, found in measured.items():
            own = sorted(context for context, b in found if b == batch)
            if machine is None or len(own) < 2:
                continue
            places = sorted({*own, *(2**i for i in range(own[0].bit_length(), own[-1].bit_length()))})
            limit = [
                roofline.predict(
                    study.configs[name], machine, context=n, batch=batch, dtype=study.dtype
                ).tokens_per_second
                for n in places
            ]
            drawn.append(Series(name_of(study, name), how[name], places, limit))
            drawn.append(Series("", how[name], own, [found[n, batch] for n in own], line=False, marks=True))
        if drawn:
            drawing = lines.draw(drawn, "tokens of context", "tokens/s", powers=True, up="tens")
            caption = (
                f"Decoding {sequences(batch)} at once ({study.dtype}): lines are the predicted limit, points measured."
            )
            pictures.append(Picture(f"prediction-batch-{batch}", caption, drawing))
    return pictures


def copying(study: Study) -> list[Picture]:
    """How much a string's first appearance helps to write it again, against the distance."""
    how = looks(study)
    series = []
    for name, variant in _drawn(study):
        found = sorted(variant.copying, key=lambda one: one.distance)
        if len(found) > 1:
            gains = [one.logprob - one.baseline_logprob for one in found]
            series.append(Series(name_of(study, name), how[name], [one.distance for one in found], gains, marks=True))
    if not series:
        return []
    title = "log-probability gained (nats a token)"
    drawing = lines.draw(series, "tokens back to the string", title, powers=True, zero=True)
    caption = (
        "Copying at a distance: how much more probable the tokens of a random string are if it stood so many tokens"
        " before than if another stood there. At zero the model has forgotten it."
    )
    return [Picture("copying-at-a-distance", caption, drawing)]


def race(study: Study) -> list[Picture]:
    """The curves of the race that was run while the study was made."""
    found = study.results.race
    if not found:
        return []
    racers = found.variants
    whole = {name: racer.config for name, racer in racers.items()}
    kinds = [(str((c.kv_heads, c.window, c.sinks, c.dilation)), c.position == "rope") for c in whole.values()]
    how = dict(zip(racers, style.looks(kinds), strict=True))
    runs = {name: (" ".join(racer.label.split()), [racer.run]) for name, racer in racers.items()}
    return [Picture(f"race-{one.name}", one.caption, one.drawing) for one in losses(runs, found.base, how)]
