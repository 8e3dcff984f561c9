"""What the changes do to the working of the model: where it looks, which heads share, how far it reads and recalls."""

from __future__ import annotations

import statistics

from gptlab.config import ModelConfig
from gptlab.formatting import count, digits, listed, signed
from gptlab.report import pictures as pictures
from gptlab.report import pictures_heads as of_heads
from gptlab.report.blocks import Block, Bullets, Column, Paragraph, Picture, Pictures, Section, Table, nats
from gptlab.report.view import Study, tokens
from gptlab.study.results import Heads


def operation(study: Study) -> Section:
    """How the changes change what the model does."""
    recall = [*_recall(study), *_row(pictures.copying(study)), *_induction(study)]
    parts = [
        Section("reading", "Where heads look", [*_row(of_heads.attention(study)), *_distances(study)]),
        Section(
            "sharing",
            "Which heads share",
            [*_groups(study), *_row(of_heads.sharing(study)), *_row(of_heads.alike(study))],
        ),
        beyond(study),
        Section("recall", "Finding again what was read", recall),
    ]
    return Section("operation", "What changes inside", [], [part for part in parts if not part.empty])


def beyond(study: Study) -> Section:
    """What the loss does as a model sees more, to several times the trained length."""
    return Section("positions", "Beyond the trained length", [*_beyond(study), *_row(pictures.by_position(study))])


def _row(found: list[Picture]) -> list[Block]:
    return [Pictures(found)] if found else []


def _distances(study: Study) -> list[Block]:
    """How far back heads look in each layer."""
    looked = {name: v.heads for name, v in study.variants.items() if v.heads}
    if not looked:
        return []
    rows = [
        [f"**{study.label(name)}**", *(digits(statistics.fmean(layer.distance)) for layer in heads.layers)]
        for name, heads in looked.items()
    ]
    n = max(len(heads.layers) for heads in looked.values())
    rows = [row + [""] * (n + 1 - len(row)) for row in rows]
    read = listed([count(n) for n in sorted({heads.tokens for heads in looked.values()})])
    columns = [Column("variant", "text"), *(Column(f"layer {i}") for i in range(n))]
    note = (
        "Mean number of tokens between a query and what it looks at, over all heads and the first"
        f" {read} tokens of the held-out text."
    )
    return [Table("Mean attention distance (tokens)", study.setting, columns, rows, note)]


def _groups(study: Study) -> list[Block]:
    """Are heads that share keys more alike than heads that do not?"""
    said = []
    for name in study.with_change("gqa"):
        config, own, before = study.configs[name], study.variants[name].heads, study.base.heads
        if not own or not before or not 1 < config.kv_heads < config.n_head or len(study.kinds[name]) > 1:
            continue
        inside, across = _within(own, config)
        would, others = _within(before, config)
        base = study.label(study.base_name)
        said.append(
            f"In {study.label(name)} the maps of two heads that share keys differ by {digits(inside, 2)} nats on"
            f" average over all layers (Jensen-Shannon), those of two heads that do not by {digits(across, 2)}."
            f" In {base}, where each head has its own keys, the same pairs differ by {digits(would, 2)} and"
            f" {digits(others, 2)}."
        )
    return [Paragraph(" ".join(said))] if said else []


def _within(heads: Heads, config: ModelConfig) -> tuple[float, float]:
    """Mean divergence of two heads of one group, and of two heads of different groups."""
    size = config.n_head // config.kv_heads
    pairs = [(i, j) for i in range(config.n_head) for j in range(i)]
    found: tuple[list[float], list[float]] = ([], [])
    for layer in heads.layers:
        for i, j in pairs:
            found[i // size != j // size].append(layer.divergence[i][j])
    return statistics.fmean(found[0]), statistics.fmean(found[1])


def _beyond(study: Study) -> list[Block]:
    """What the loss does past the trained length, with and without a window."""
    changes: dict[bool, list[float]] = {False: [], True: []}
    furthest = 0
    for name, variant in study.variants.items():
        found = variant.by_position
        if found:
            ranges = list(zip(found.buckets, found.nats, strict=True))
            inside = [nats for (_, last), nats in ranges if last <= found.trained_length]
            outside = [nats for (first, _), nats in ranges if first > found.trained_length]
            if inside and outside:
                changes["swa" in study.kinds[name]].append(outside[-1] - inside[-1])
                furthest = max(furthest, ranges[-1][0][1])
    if not furthest:
        return []
    trained = study.configs[study.base_name].context_length
    said = [
        f"by {_range(found)} {'with a window' if window else 'without a window'}"
        for window, found in changes.items()
        if found
    ]
    text = (
        f"From the end of the trained length of {tokens(trained)} to {tokens(furthest)}, the loss of the models that"
        f" can read so far changes {listed(said)} (nats a token)."
    )
    if any(c.has_table for c in study.configs.values()):
        text += " Learned positions end with their table."
    return [Paragraph(text)]


def _range(found: list[float]) -> str:
    low, high = signed(min(found), 2), signed(max(found), 2)
    return low if low == high else f"{low} to {high}"


def _recall(study: Study) -> list[Block]:
    """How much the base and the windows gain from having read a string."""
    said = []
    for name, variant in study.variants.items():
        found = sorted(variant.copying, key=lambda one: one.distance)
        reach = variant.receptive_field
        if found and study.kinds[name] <= {"swa"}:
            near, far = ((one.distance, nats(one.logprob - one.baseline_logprob)) for one in (found[0], found[-1]))
            words = f"**{study.label(name)}** gains {near[1]} nats a token at {tokens(near[0])}"
            words += f", {far[1]} at {tokens(far[0])}"
            said.append(words + (f" (its layers together reach {tokens(reach)} back)" if reach else ""))
    return [Bullets([f"{one}." for one in said])] if said else []


def _induction(study: Study) -> list[Block]:
    rows = []
    for name, variant in study.variants.items():
        found = variant.induction
        if found:
            layer, head = found.best_head
            rows.append(
                [
                    f"**{study.label(name)}**",
                    f"{found['first']:.2f}",
                    f"{found['second']:.2f}",
                    nats(found.second - found.first),
                    f"{found['best_head_score']:.3f}",
                    f"layer {layer}, head {head}",
                ]
            )
    if not rows:
        return []
    titles = ("first pass", "second pass", "difference", "best head's score")
    columns = [Column("variant", "text"), *map(Column, titles), Column("best head", "text")]
    note = (
        "Random tokens, twice in a row; nats a token. A model that finds again what it has read is better the second"
        " time. The score is the attention from a token to the one after its first occurrence: near 1 for an induction"
        " head."
    )
    return [Table("Induction", study.setting, columns, rows, note)]
