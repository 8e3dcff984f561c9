"""The report's section on conversions: the loss right after them, and after continued training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from gptlab.config import ModelConfig
from gptlab.formatting import count, digits, memory
from gptlab.plotting import lines
from gptlab.plotting.lines import Series
from gptlab.plotting.style import COLOURS, INK, STROKES, Look
from gptlab.report.blocks import (
    VARIANT,
    Column,
    Picture,
    Section,
    Table,
    bracketed,
    ends,
    identical,
    in_noise,
    literal,
    side_by_side,
    span,
)
from gptlab.report.view import Study
from gptlab.study.results import Checkpoint, Conversions, Interval

FAMILIES = {
    "gqa": ("heads", "Fewer key heads"),
    "rope": ("positions", "Rotary positions"),
    "swa": ("windows", "Windows"),
    "other": ("context", "A longer context"),
    "several": ("several", "Several changes at once"),
}
"""Kinds of conversions, by what they change, with the names of their figures, in the order in which they are shown."""


def families(study: Study) -> dict[str, list[str]]:
    """Return the converted variants that were evaluated, by family."""
    by_kind: dict[str, list[str]] = {name: [] for name in FAMILIES}
    for name, kinds in study.kinds.items():
        if study.checkpoints(name) and kinds:
            by_kind[next(iter(kinds)) if len(kinds) == 1 else "several"].append(name)
    return {kind: names for kind, names in by_kind.items() if names}


def conversion(study: Study) -> Section:
    """Return losses by share of the pre-training, their curves, and the best of several ways to one architecture."""
    about, by_kind = study.about.conversion, families(study)
    if about is None or not by_kind:
        return Section("conversion", "Conversion", [])
    blocks = [_losses(study, about), *side_by_side(_curves(study, by_kind))]
    return Section("conversion", "Conversion", [*blocks, *_rivals(study), _steps(study)])


def _percent(share: float) -> str:
    return f"{100 * share:g}%"


def _losses(study: Study, about: Conversions) -> Table:
    """Variant by share: the loss of the reference, and what the others have more."""
    names = [name for name in study.variants if study.checkpoints(name)]
    shares = sorted({at.share for name in names for at in study.checkpoints(name)})
    rows = []
    for name in names:
        own = name == about.reference
        at = {checkpoint.share: checkpoint for checkpoint in study.checkpoints(name)}
        row = [_cell(at[share], own) if share in at else "" for share in shares]
        gaps = {share: checkpoint.difference for share, checkpoint in at.items() if not own}
        if len(shares) > 1:
            row += [_recovered(at) if not own else "", _interval(gaps.get(shares[0]))]
        rows.append([f"**{study.label(name)}**", *row, _interval(gaps.get(shares[-1]))])
    columns = [VARIANT, *(Column(_percent(share)) for share in shares)]
    if len(shares) > 1:
        columns += [Column("recovered"), Column(f"95% interval, {_percent(shares[0])}")]
    columns.append(Column(f"95% interval, {_percent(shares[-1])}"))
    base = study.label(study.base_name)
    note = f"Nats per token on {study.text}, less {base}'s at 0%, which is right after the conversion"
    if about.reference and about.pretraining_tokens:
        note += f"; after that less those of {study.label(about.reference)}, {base} after the same continued training,"
        note += " whose own losses stand in its row"
    note += ". In brackets: within noise."
    if len(shares) > 1:
        note += f" Shares of {count(about.pretraining_tokens or 0)} tokens of pre-training."
        note += " Recovered: the part of the added loss that continued training removed."
        if about.recipe and about.recipe["schedule"]["kind"] != "constant":
            note += " The rate decays to the end of the run; a shorter run would do better at its own end."
    return Table("Loss added", study.setting, columns, rows, note)


def _interval(gap: Interval | None) -> str:
    return span(gap) if gap else ""


def _cell(at: Checkpoint, own: bool) -> str:
    """The loss of the reference, or a difference."""
    return f"{at.nats_per_token:.4f}" if own or at.difference is None else bracketed(at.difference)


def _recovered(at: Mapping[float, Checkpoint]) -> str:
    """The share of the added loss that is gone at the end; empty where nothing was added, or nobody trained."""
    first, last = at[min(at)].difference, at[max(at)].difference
    if len(at) < 2 or first is None or last is None or ends(first) is None or identical(first):
        return ""
    if first.mean <= 0 or in_noise(first):
        return ""
    back = 1 - last.mean / first.mean
    return f"{100 * back:.1f}%" if 0.9 < back < 1 else "all" if back >= 1 else f"{100 * back:.0f}%" if back >= 0 else ""


def _rivals(study: Study) -> list[Table]:
    """The best of several ways to one architecture, right after conversion and at the end, and the gaps of others."""
    groups: dict[ModelConfig, list[str]] = {}
    for name, kinds in study.kinds.items():
        if study.checkpoints(name) and kinds:
            groups.setdefault(study.configs[name], []).append(name)
    rows = []
    for names in groups.values():
        for when in (0, -1):
            at = {name: study.checkpoints(name)[when] for name in names}
            share = max(checkpoint.share for checkpoint in at.values())
            at = {name: checkpoint for name, checkpoint in at.items() if checkpoint.share == share}
            if len(at) > 1 and not (when == -1 and share == 0):
                rows.append(_ranking(study, share, at))
    if not rows:
        return []
    columns = [Column(title, "text") for title in ("after", "lowest loss", "others, and how much higher")]
    note = "Differences are paired over the same documents, in nats per token. In brackets: within noise."
    return [Table("Several ways to the same architecture", study.setting, columns, rows, note)]


def _ranking(study: Study, share: float, at: Mapping[str, Checkpoint]) -> list[str]:
    best = min(at, key=lambda name: at[name].nats_per_token)
    gaps = {name: at[best].rivals[name] for name in at if name in at[best].rivals}
    others = [f"{study.label(name)} {bracketed(_reversed(gap))}" for name, gap in gaps.items()]
    return ["conversion" if share == 0 else _percent(share), f"**{study.label(best)}**", "; ".join(others)]


def _reversed(gap: Interval) -> Interval:
    """The same difference with the other sign."""
    low, high = (-end for end in ends(gap) or (0.0, 0.0))
    return gap.model_copy(update={"mean": -gap.mean, "low": high, "high": low} if ends(gap) else {"mean": -gap.mean})


def _steps(study: Study) -> Table:
    """How each variant was made, its size, and how far its outputs moved."""
    context = study.configs[study.base_name].context_length
    abouts = {name: about for name, variant in study.variants.items() if (about := variant.conversion)}
    measured = max(about.divergence_tokens for about in abouts.values())
    own = any(about.settings for about in abouts.values())
    rows = []
    for name, about in abouts.items():
        row = [f"**{study.label(name)}**", "; ".join(literal(step) for step in about.steps) or "none"]
        row += [count(study.variants[name].parameters["total"]), memory(study.cache(name, context) or 0)]
        moved = about.divergence
        row += ["-" if moved is None else "0" if moved < 1e-6 else digits(moved, 2)] * (measured > 0)
        rows.append([*row, *[literal(", ".join(about.settings))] * own])
    columns = [VARIANT, Column("conversion", "text"), Column("parameters"), Column(f"cache, {count(context)} tokens")]
    note = "Cache in bfloat16."
    if measured:
        columns.append(Column("divergence"))
        note += (
            " Divergence: KL(base || converted) of the next token's distribution right after conversion, in nats per"
            f" token, the mean over {count(measured)} tokens of the held-out text."
        )
    columns += [Column("own settings", "text")] * own
    return Table("How each was made", study.setting, columns, rows, note)


def _curves(study: Study, by_kind: Mapping[str, Sequence[str]]) -> list[Picture]:
    """For each family the added loss against the share of the pre-training."""
    pictures = []
    for kind, names in by_kind.items():
        series: list[Series] = []
        for name, look in zip(names, _looks(study, names), strict=True):
            points = [(100 * at.share, at.difference.mean) for at in study.checkpoints(name) if at.difference]
            if len(points) > 1:
                x, y = zip(*points, strict=True)
                series.append(Series(study.name_of(name), look, x, y, marks=True))
        if not series:
            continue
        # What is lost right away may be many times what is left soon after: then it leaves the picture.
        most, usual = max(max(one.y) for one in series), max(y for one in series for y in one.y[1:])
        top = 1.25 * usual if usual > 0 and most > 2.5 * usual else None
        drawing = lines.draw(series, "% of the pre-training", "loss added (nats per token)", zero=True, top=top)
        caption = f"{FAMILIES[kind][1]}: loss added, by share of the pre-training. At zero nothing is lost."
        caption += " The highest first points are outside the figure; the table has them." if top is not None else ""
        pictures.append(Picture(f"conversion-{FAMILIES[kind][0]}", caption, drawing))
    return pictures


def _looks(study: Study, names: Sequence[str]) -> list[Look]:
    """A colour for each architecture, and a stroke for each way to it; where there is one alone, a colour for each."""
    kinds = list(dict.fromkeys(study.configs[name] for name in names))
    palette, looks = [INK, *COLOURS[:-1]], []
    seen = dict.fromkeys(kinds, 0)
    for i, name in enumerate(names):
        config = study.configs[name]
        way, colour = seen[config], kinds.index(config) if len(kinds) > 1 else i
        seen[config] += 1
        looks.append(Look(palette[colour % len(palette)], STROKES[way % len(STROKES)], way > 0))
    return looks
