"""The figures of attention heads: what one looks at with and without a window, and which share keys."""

from __future__ import annotations

import math

from gptlab.plotting import heads
from gptlab.report.blocks import Picture, slug
from gptlab.report.pictures import name_of
from gptlab.report.view import Study, tokens


def attention(study: Study) -> list[Picture]:
    """The map of one head, in the base and in the variants with a window."""
    maps = {n: v.attention_map for n, v in study.variants.items() if v.attention_map}
    windowed = [n for n in maps if "swa" in study.kinds[n]]
    chosen = [n for n in (study.base_name, *sorted(windowed, key=lambda n: len(study.kinds[n]))[:1]) if n in maps]
    pictures = []
    for name in chosen:
        one = maps[name]
        edge = study.configs[name].windows[one.layer]
        drawing = heads.grid(one.weights, "token looked at", "token that looks", edge)
        where = f"layer {one['layer']}, head {one['head']}"
        words = f"{study.label(name)}, {where}: each row shows where one token looks. The colour is stronger where it"
        words += " looks more (by the square root)."
        if edge is not None:
            words += f" Left of the dashed line is what the window of {tokens(edge)} hides."
        pictures.append(Picture(f"attention-{slug(name)}", words, drawing))
    return pictures


def sharing(study: Study) -> list[Picture]:
    """Which query heads share which key head, in every way that the study has."""
    shapes: dict[tuple[int, int], list[str]] = {}
    for name, config in study.configs.items():
        shapes.setdefault((config.n_head, config.kv_heads), []).append(name_of(study, name))
    if all(n_head == kv for n_head, kv in shapes):
        return []
    drawing = heads.wiring([(", ".join(names), *shape) for shape, names in shapes.items()])
    caption = "Which query heads (round) read which key/value head (square): neighbours share one."
    return [Picture("shared-heads", caption, drawing)]


def alike(study: Study) -> list[Picture]:
    """How unlike the maps of every two heads are, in the base and in a variant whose heads share keys."""
    grouped = [n for n in study.alone("gqa") or study.with_change("gqa") if study.variants[n].heads]
    if not grouped:
        return []
    pictures = []
    shown = study.base.attention_map.layer if study.base.attention_map else 0
    for name in (study.base_name, grouped[0]):
        own = study.variants[name].heads
        if own is None:
            return []
        divergence = own.layers[shown].divergence
        drawing = heads.matrix(divergence, "head", "head", study.configs[grouped[0]].kv_heads, math.log(2))
        frames = "heads that share keys" if name != study.base_name else "heads that would share keys"
        caption = (
            f"{study.label(name)}, layer {shown}: how unlike the maps of two heads are (Jensen-Shannon"
            f" divergence in nats; 0: alike, 0.69: never the same token). Frames: {frames}."
        )
        pictures.append(Picture(f"divergence-{slug(name)}", caption, drawing))
    return pictures
