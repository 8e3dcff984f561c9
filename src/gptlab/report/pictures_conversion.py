"""The figures of conversions: how the loss comes back as a converted model is trained on."""

from __future__ import annotations

from typing import Any

from gptlab.plotting import lines
from gptlab.plotting.lines import Series
from gptlab.plotting.style import COLOURS, INK, STROKES, Look
from gptlab.report.blocks import Picture
from gptlab.report.pictures import name_of
from gptlab.report.view import Study

FAMILIES = {
    "heads": "Fewer key heads",
    "positions": "Rotary positions",
    "windows": "Windows",
    "context": "A longer context",
    "several": "Several changes at once",
}
"""Kinds of conversions, in the order in which they are told."""
_OF = {"n_kv_head": "heads", "position": "positions", "window": "windows", "context_length": "context"}


def family(asked: dict[str, Any]) -> str:
    """Return which of `FAMILIES` a conversion belongs to; empty where nothing is converted."""
    kinds = [_OF[name] for name in _OF if name in asked]
    return kinds[0] if len(kinds) == 1 else "several" if kinds else ""


def families(study: Study) -> dict[str, list[str]]:
    """Return the converted variants by family, those that have figures."""
    found: dict[str, list[str]] = {name: [] for name in FAMILIES}
    for name, variant in study.variants.items():
        about = variant.conversion
        if about and about.checkpoints and (kind := family(about.changes)):
            found[kind].append(name)
    return {kind: names for kind, names in found.items() if names}


def curves(study: Study) -> list[Picture]:
    """For each family the loss less that of the base trained on, against the share of the pre-training."""
    pictures = []
    for kind, names in families(study).items():
        series: list[Series] = []
        after: list[float] = []
        for name, look in zip(names, _looks(study, names), strict=True):
            looks = study.checkpoints(name)
            points = [(100 * one.share, one.difference.mean) for one in looks if one.difference]
            if len(points) < 2:
                continue
            x, y = zip(*points, strict=True)
            series.append(Series(name_of(study, name), look, x, y, marks=True))
            after += y[1:]
        if not series:
            continue
        # What is lost right away may be many times what is left soon after: then it leaves the picture.
        most, usual = max(max(one.y) for one in series), max(after)
        top = 1.25 * usual if usual > 0 and most > 2.5 * usual else None
        drawing = lines.draw(series, "% of the pre-training", "loss added (nats a token)", zero=True, top=top)
        caption = f"{FAMILIES[kind]}: loss less that of the base trained on with the same tokens; at 0 right after"
        caption += " conversion. At the line of zero nothing is lost."
        caption += " The highest first points leave the picture; the table has them." if top is not None else ""
        pictures.append(Picture(f"conversion-{kind}", caption, drawing))
    return pictures


def _looks(study: Study, names: list[str]) -> list[Look]:
    """A colour for each architecture, and a stroke for each way to it; where there is one alone, a colour for each."""
    kinds = list(dict.fromkeys(study.configs[name] for name in names))
    palette, found = [INK, *COLOURS[:-1]], []
    seen = dict.fromkeys(kinds, 0)
    for i, name in enumerate(names):
        config = study.configs[name]
        way, colour = seen[config], kinds.index(config) if len(kinds) > 1 else i
        seen[config] += 1
        found.append(Look(palette[colour % len(palette)], STROKES[way % len(STROKES)], way > 0))
    return found
