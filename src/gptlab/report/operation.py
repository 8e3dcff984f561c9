"""What the changes do inside the model: where heads attend, which heads share, how far it reads and recalls."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from gptlab.config import ModelConfig
from gptlab.formatting import count, digits, listed
from gptlab.plotting import heads as drawings
from gptlab.plotting import lines
from gptlab.plotting.lines import Series
from gptlab.report.blocks import VARIANT, Block, Column, Picture, Section, Table, nats, side_by_side, slug
from gptlab.report.view import Study, tokens
from gptlab.study.results import Heads


def operation(study: Study) -> Section:
    """Return how the changes change what the model does."""
    sharing = [*_groups(study), *side_by_side(_wiring(study)), *side_by_side(_divergence(study))]
    recall = [*_recall(study), *side_by_side(_copying(study)), *_induction(study)]
    parts = [
        Section("reading", "Where heads attend", [*side_by_side(_attention(study)), *_distances(study)]),
        Section("sharing", "Which heads share", sharing),
        beyond(study),
        Section("recall", "Recalling what was read", recall),
    ]
    return Section("operation", "What changes inside", [], [part for part in parts if not part.empty])


def beyond(study: Study) -> Section:
    """Return what the loss does as a model sees more, to several times the trained length."""
    further = _beyond(study)
    title = "Beyond the trained length" if further else "Loss by position"
    return Section("positions", title, [*further, *side_by_side(_by_position(study))])


def _attention(study: Study) -> list[Picture]:
    """The map of one head, in the base and in a variant with a window."""
    maps = {name: v.attention_map for name, v in study.variants.items() if v.attention_map}
    windowed = sorted((n for n in maps if "swa" in study.kinds[n]), key=lambda n: len(study.kinds[n]))
    pictures = []
    for name in (study.base_name, *windowed[:1]):
        if (one := maps.get(name)) is None:
            continue
        edge = study.configs[name].windows[one.layer]
        drawing = drawings.grid(one.weights, "key (token attended to)", "query (token that attends)", edge)
        words = f"{study.label(name)}, layer {one.layer}, head {one.head}: each row shows where one token attends."
        words += " Stronger colour means more weight (its square root)."
        if edge is not None and edge < len(one.weights):
            words += f" Keys left of the dashed line are outside the window of {tokens(edge)}."
        pictures.append(Picture(f"attention-{slug(name)}", words, drawing))
    return pictures


def _distances(study: Study) -> list[Block]:
    """How far back heads attend in each layer."""
    measured = {name: v.heads for name, v in study.variants.items() if v.heads}
    if not measured:
        return []
    n = max(len(heads.layers) for heads in measured.values())
    rows = []
    for name, heads in measured.items():
        row = [f"**{study.label(name)}**", *(digits(statistics.fmean(layer.distance)) for layer in heads.layers)]
        rows.append(row + [""] * (n + 1 - len(row)))
    read = listed([count(n) for n in sorted({heads.tokens for heads in measured.values()})])
    columns = [VARIANT, *(Column(f"layer {i}") for i in range(n))]
    note = f"Distance between query and key, weighted by attention: mean over all heads and the first {read} tokens"
    return [Table("Mean attention distance (tokens)", study.setting, columns, rows, f"{note} of the held-out text.")]


def _wiring(study: Study) -> list[Picture]:
    """Which query heads share which key head, in every way that the study has."""
    shapes: dict[tuple[int, int], list[str]] = {}
    for name in study.drawn:
        config = study.configs[name]
        shapes.setdefault((config.n_head, config.kv_heads), []).append(study.name_of(name))
    if all(n_head == kv for n_head, kv in shapes):
        return []
    drawing = drawings.wiring([(", ".join(names), *shape) for shape, names in shapes.items()])
    caption = "Which query heads (round) read which key/value head (square): neighbours share one."
    return [Picture("shared-heads", caption, drawing)]


def _divergence(study: Study) -> list[Picture]:
    """How unlike the maps of every two heads are, in the base and in a variant whose heads share keys."""
    grouped = [n for n in study.alone("gqa") or study.with_change("gqa") if study.variants[n].heads]
    if not grouped or not study.base.heads:
        return []
    layer = study.base.attention_map.layer if study.base.attention_map else 0
    pictures = []
    for name, frames in ((study.base_name, "heads that would share keys"), (grouped[0], "heads that share keys")):
        if (heads := study.variants[name].heads) is None:
            continue
        values = heads.layers[layer].divergence
        drawing = drawings.matrix(values, "head", "head", study.configs[grouped[0]].kv_heads, math.log(2))
        caption = (
            f"{study.label(name)}, layer {layer}: Jensen-Shannon divergence of the attention of two heads, in nats (0:"
            f" the same, 0.69: never the same token). Frames: {frames}."
        )
        pictures.append(Picture(f"divergence-{slug(name)}", caption, drawing))
    return pictures


def _groups(study: Study) -> list[Block]:
    """Are heads that share keys more alike than heads that do not?"""
    rows = []
    for name in study.alone("gqa"):
        config, own, before = study.configs[name], study.variants[name].heads, study.base.heads
        if own and before and 1 < config.kv_heads < config.n_head:
            pairs = (*_within(own, config), *_within(before, config))
            rows.append([f"**{study.label(name)}**", *(digits(value, 2) for value in pairs)])
    if not rows:
        return []
    titles = ("same group", "different groups", "same pairs in the base", "other pairs in the base")
    note = "Jensen-Shannon divergence of the attention of two heads in nats, mean over all layers."
    return [Table("Are heads that share keys alike?", study.setting, [VARIANT, *map(Column, titles)], rows, note)]


def _within(heads: Heads, config: ModelConfig) -> tuple[float, float]:
    """Mean divergence of two heads of one group, and of two heads of different groups."""
    size = config.n_head // config.kv_heads
    divergences: tuple[list[float], list[float]] = ([], [])
    for layer in heads.layers:
        for i in range(config.n_head):
            for j in range(i):
                divergences[i // size != j // size].append(layer.divergence[i][j])
    return statistics.fmean(divergences[0]), statistics.fmean(divergences[1])


def _beyond(study: Study) -> list[Block]:
    """What the loss does past the trained length."""
    trained = study.configs[study.base_name].context_length
    furthest = max((v.by_position.buckets[-1][1] for v in study.variants.values() if v.by_position), default=0)
    rows = []
    for name, variant in study.variants.items():
        position = variant.by_position
        if position is None or position.buckets[-1][1] < furthest or furthest <= trained:
            continue
        inside = [loss for (_, last), loss in zip(position.buckets, position.nats, strict=True) if last <= trained]
        if inside:
            end = position.nats[-1]
            rows.append([f"**{study.label(name)}**", f"{inside[-1]:.3f}", f"{end:.3f}", nats(end - inside[-1])])
    if not rows:
        return []
    columns = [VARIANT, Column(f"to {tokens(trained)}"), Column(f"to {tokens(furthest)}"), Column("change")]
    note = "Loss in nats per token by position in the text, for the variants that can read so far."
    if any(c.has_table for c in study.configs.values()):
        note += " Learned positions end with their table."
    return [Table("Loss beyond the trained length", study.setting, columns, rows, note)]


def _by_position(study: Study) -> list[Picture]:
    """Loss by the number of tokens that the model has seen."""
    series = []
    for name in study.drawn:
        position = study.variants[name].by_position
        if position and position.nats:
            last = [last for _, last in position.buckets]
            series.append(Series(study.name_of(name), study.looks[name], last, position.nats, marks=True))
    if not series:
        return []
    trained = study.configs[study.base_name].context_length
    further = max(one.x[-1] for one in series) > trained
    mark = (float(trained), "trained length") if further else None
    # The first few tokens are hard for all and would flatten the rest.
    top = max(max(one.y[1:] if len(one.y) > 2 else one.y) for one in series) + 0.05
    drawing = lines.draw(series, "tokens seen (up to)", "loss (nats per token)", powers=True, mark=mark, top=top)
    caption = "Loss by position. A model that uses its context improves as it sees more, up to the trained length."
    caption += " All variants read the same text and predict the same tokens."
    if further:
        caption += " Right of the dotted line, the text is longer than any in training; learned positions end there."
    return [Picture("loss-by-position", caption, drawing)]


def _gains(study: Study, names: Sequence[str]) -> dict[str, dict[int, float]]:
    """How much a string's first appearance helps, by variant and distance."""
    return {
        name: {one.distance: one.logprob - one.baseline_logprob for one in copies}
        for name in names
        if (copies := sorted(study.variants[name].copying, key=lambda one: one.distance))
    }


def _recall(study: Study) -> list[Block]:
    """How much the base and the windows gain from having read a string."""
    gains = _gains(study, [name for name, kinds in study.kinds.items() if kinds <= {"swa"}])
    if not gains:
        return []
    distances = sorted({distance for by_distance in gains.values() for distance in by_distance})
    rows = []
    for name, by_distance in gains.items():
        reach = study.variants[name].receptive_field
        cells = (nats(by_distance[distance]) if distance in by_distance else "" for distance in distances)
        rows.append([f"**{study.label(name)}**", *cells, count(reach) if reach else "no limit"])
    columns = [VARIANT, *(Column(tokens(distance)) for distance in distances), Column("reach, tokens")]
    note = (
        "Log-probability gained, in nats per token, on a random string that was read that many tokens before. Reach:"
        " how far back all layers together can see."
    )
    return [Table("Copying at a distance", study.setting, columns, rows, note)]


def _copying(study: Study) -> list[Picture]:
    series = [
        Series(study.name_of(name), study.looks[name], list(by_distance), list(by_distance.values()), marks=True)
        for name, by_distance in _gains(study, study.drawn).items()
        if len(by_distance) > 1
    ]
    if not series:
        return []
    title = "log-probability gained (nats per token)"
    drawing = lines.draw(series, "tokens back to the string", title, powers=True, zero=True)
    caption = (
        "Copying at a distance: how much more probable the tokens of a random string are if the same string, and not"
        " another, stood that many tokens before. At zero the model has forgotten it."
    )
    return [Picture("copying-at-a-distance", caption, drawing)]


def _induction(study: Study) -> list[Block]:
    rows = []
    for name, variant in study.variants.items():
        if one := variant.induction:
            layer, head = one.best_head
            row = [f"**{study.label(name)}**", f"{one.first:.2f}", f"{one.second:.2f}", nats(one.second - one.first)]
            rows.append([*row, f"{one.best_head_score:.3f}", f"layer {layer}, head {head}"])
    if not rows:
        return []
    titles = ("first pass", "second pass", "difference", "best head's score")
    columns = [VARIANT, *map(Column, titles), Column("best head", "text")]
    note = (
        "Random tokens, twice in a row, in nats per token. A model that recalls what it has read is better the second"
        " time. The score is the attention from a token to the one after its first occurrence: near 1 for an induction"
        " head."
    )
    return [Table("Induction", study.setting, columns, rows, note)]
