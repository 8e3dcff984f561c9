"""The report's section on conversions: what was lost right after them, and what came back by training on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gptlab.formatting import count, digits, listed, memory
from gptlab.report.blocks import (
    Block,
    Bullets,
    Column,
    Paragraph,
    Pictures,
    Section,
    Table,
    ends,
    in_noise,
    literal,
    nats,
    span,
    verdict,
)
from gptlab.report.pictures_conversion import FAMILIES, curves, families
from gptlab.report.view import Study
from gptlab.study.results import Checkpoint, Interval


def conversion(study: Study) -> Section:
    """Losses by share of the pre-training, curves, and what they say."""
    found = families(study)
    if not found:
        return Section("conversion", "Conversion", [])
    drawn = curves(study)
    blocks: list[Block] = [Paragraph(_how(study)), _losses(study)]
    blocks += [Pictures(drawn)] if drawn else []
    parts = [Section(f"conversion-{kind}", FAMILIES[kind], [Bullets(_said(study, found[kind]))]) for kind in found]
    return Section("conversion", "Conversion", [*blocks, _made(study)], parts)


def _percent(share: float) -> str:
    return f"{100 * share:g}%"


def _how(study: Study) -> str:
    """What was done, and what the figures mean."""
    about, base = study.about.conversion, study.label(study.base_name)
    assert about is not None
    made = [name for name in study.variants if study.checkpoints(name)]
    text = (
        f"Every variant here begins as {base}, converted; conversions were fitted on {literal(about['calibration'])}."
    )
    recipe, yardstick = about.recipe, about.reference
    if recipe is None:
        return f"{text} None was trained on: differences are to {base}."
    who = "It was" if all(len(study.checkpoints(name)) > 1 for name in made) else "Those with figures after 0% were"
    text += f" {who} then trained on; shares are of the {count(about['of'])} tokens that {base} was trained on."
    text += " A curve is one run, looked at on its way: its learning rate"
    kind = recipe["schedule"]["kind"]
    if kind == "constant":
        text += " stays the same after the warm-up."
    else:
        words = {"cosine": "falls as a cosine", "wsd": "falls in its last part"}[kind]
        text += f" {words} to the end of the run, so that a run that ended at a smaller share would do better there."
    if yardstick is None:
        return f"{text} Differences right after conversion are to {base}; no base was trained on to compare with later."
    text += f" Differences are to {study.label(yardstick)}, which is {base} trained on with the same tokens in the same"
    return f"{text} order; right after conversion to {base} itself."


def _losses(study: Study) -> Table:
    """Variant by share: the loss of base and yardstick, and what the others have more."""
    names = [name for name in study.variants if study.checkpoints(name)]
    yardstick = study.about.conversion.reference if study.about.conversion else None
    shares = sorted({look.share for name in names for look in study.checkpoints(name)})
    rows = []
    for name in names:
        looks = {look.share: look for look in study.checkpoints(name)}
        row = [f"**{study.label(name)}**"]
        for share in shares:
            look = looks.get(share)
            row.append("" if look is None else _cell(look, name == yardstick))
        last = max(looks)
        gap = looks[last].difference if name != yardstick else None
        rows.append([*row, span(gap) if gap else "", gap])
    columns = [Column("variant", "text"), *(Column(_percent(share)) for share in shares)]
    columns += [Column("95% interval, last"), Column("", "range")]
    note = f"Nats a token on {study.text}"
    note += (
        f": the loss of {study.label(yardstick)}, and how much more the others have"
        if yardstick
        else ", more than the base"
    )
    note += ", after a share of the pre-training; 0% is right after conversion. In brackets: inside the noise."
    return Table("Loss added", study.setting, columns, rows, note)


def _cell(look: Checkpoint, own: bool) -> str:
    """The loss of the yardstick, or a difference, in brackets where it is inside the noise."""
    gap = look.difference
    if own or gap is None:
        return f"{look['nats_per_token']:.4f}"
    return f"({nats(gap)})" if in_noise(gap) else nats(gap)


def _made(study: Study) -> Table:
    """How each variant was made, its size, and how far its outputs moved."""
    context = study.configs[study.base_name].context_length
    rows = []
    for name, variant in study.variants.items():
        about = variant.conversion
        if not about:
            continue
        moved = about.divergence
        row = [f"**{study.label(name)}**", "; ".join(literal(step) for step in about.steps) or "as it is"]
        row += [count(variant.parameters["total"]), memory(study.cache(name, context) or 0)]
        row += [
            "-" if moved is None else "0" if moved < 1e-6 else digits(moved, 2),
            literal(", ".join(about.settings)) or "",
        ]
        rows.append(row)
    columns = [Column("variant", "text"), Column("conversion", "text"), Column("parameters")]
    columns += [Column(f"cache, {count(context)} tokens"), Column("outputs moved"), Column("own settings", "text")]
    tokens = max(v.conversion.divergence_tokens for v in study.variants.values() if v.conversion)
    note = (
        "Outputs moved: mean divergence of the next token's distribution from the base's right after conversion,"
        f" KL(base || converted) in nats a token, over {count(tokens)} tokens of the held-out text. Cache in bfloat16."
    )
    return Table("How each was made", study.setting, columns, rows, note)


def _said(study: Study, names: Sequence[str]) -> list[str]:
    """Sentences about the variants of a family: one for each, and one for all ways to one architecture."""
    items = [f"**{study.label(name)}.** {_alone(study, name)}" for name in names]
    groups: dict[Any, list[str]] = {}
    for name in names:
        groups.setdefault(study.configs[name], []).append(name)
    return items + [item for group in groups.values() if len(group) > 1 for item in _among(study, group)]


def _alone(study: Study, name: str) -> str:
    """What a variant lost, and what came back."""
    looks = [(look.share, look.difference) for look in study.checkpoints(name) if look.difference is not None]
    if not looks:
        return "There is nothing to compare it with."
    (share, first), (until, last) = looks[0], looks[-1]
    said = f"Right after conversion loss {verdict(first)}." if share == 0 else ""
    if len(looks) == 1:
        return said
    said += f" After {_percent(until)} loss {verdict(last)}"
    if first.mean > 0 and not in_noise(first) and first.low is not None:
        back = 1 - last.mean / first.mean
        said += f": {_back(back)}" if 0 <= back < 1 else ": more than all came back" if back >= 1 else ": it grew"
    return f"{said}."


def _back(share: float) -> str:
    return f"{100 * share:.1f}% of what was lost came back" if share > 0.9 else f"{100 * share:.0f}% of it came back"


def _among(study: Study, names: Sequence[str]) -> list[str]:
    """Which of several ways to one architecture is ahead, right after conversion and at the end."""
    found = []
    for when in (0, -1):
        looks = {name: study.checkpoints(name)[when] for name in names}
        share = max(look.share for look in looks.values())
        looks = {name: look for name, look in looks.items() if look.share == share}
        if len(looks) < 2 or (when == -1 and share == 0):
            continue
        best = min(looks, key=lambda name: looks[name].nats_per_token)
        tied: list[str] = []
        behind: list[str] = []
        for name in looks:
            gap = looks[best].rivals.get(name)
            if name != best and gap is not None:
                (tied if in_noise(gap) else behind).append(f"{study.label(name)} ({nats(_turned(gap))})")
        begin = "Right after conversion" if share == 0 else f"After {_percent(share)}"
        said = f"**{begin} {study.label(best)} has the lowest loss of {len(looks)} ways to the same architecture.**"
        said += f" Behind it: {listed(behind)} nats a token." if behind else ""
        said += f" Inside the noise of it: {listed(tied)}." if tied else ""
        ratio = _ratio(looks, best) if share == 0 else None
        said += f" {ratio}" if ratio else ""
        found.append(said)
    return found


def _turned(gap: Interval) -> Interval:
    """The same difference the other way round."""
    found = ends(gap)
    low, high = (None, None) if found is None else (-found[1], -found[0])
    return gap.model_copy(update={"mean": -gap.mean, "low": low, "high": high})


def _ratio(looks: Mapping[str, Checkpoint], best: str) -> str:
    """How much of the loss that the others add the best one adds."""
    gaps = {name: look.difference for name, look in looks.items() if look.difference}
    own = gaps.get(best)
    others = [gap.mean for name, gap in gaps.items() if name != best and gap.mean > 0 and not in_noise(gap)]
    if own is None or not others or own.mean <= 0:
        return ""
    shares = sorted(100 * own.mean / other for other in others)
    words = f"{digits(shares[0], 2)}%" if len(shares) == 1 else f"{digits(shares[0], 2)} to {digits(shares[-1], 2)}%"
    return f"It adds {words} of the loss that the other{'s' * (len(shares) > 1)} add{'s' * (len(shares) == 1)}."
