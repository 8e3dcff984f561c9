"""One section for each change: what it is, what it did here, pitfalls and what improves it."""

from __future__ import annotations

from gptlab.formatting import count, digits, listed, memory, percent
from gptlab.report.blocks import (
    Block,
    Bullets,
    Column,
    Formula,
    Paragraph,
    Section,
    Table,
    in_noise,
    literal,
    nats,
    span,
    verdict,
)
from gptlab.report.pictures import term_words
from gptlab.report.sizes import at_four_sizes, where_it_pays
from gptlab.report.summary import common_point, compared, speed_words, weight
from gptlab.report.texts import known
from gptlab.report.view import NAMES, Study, tokens
from gptlab.study.results import Interval


def changes(study: Study) -> list[Section]:
    """The sections of all changes that the study makes."""
    return [_change(study, change) for change in NAMES if study.with_change(change)]


def _change(study: Study, change: str) -> Section:
    text = known()[change]
    parts = [
        Section(f"{change}-here", "What it did here", _here(study, change)),
        Section(f"{change}-sizes", "At GPT-2's four sizes", at_four_sizes(study, change)),
        Section(f"{change}-pays", "Where it pays, and where it does not", where_it_pays(study, change)),
        Section(f"{change}-operation", "How it changes the operation", [Paragraph(text["operation"])]),
        Section(f"{change}-pitfalls", "Pitfalls", [Bullets(text["pitfalls"])]),
        Section(f"{change}-improvements", "What improves it", [Bullets(text["improvements"])]),
    ]
    blocks: list[Block] = [
        Paragraph(text["what"]),
        Formula(text["tex"], text["mathml"]),
        Paragraph(f"{text['where']} {text['source']}.", "note"),
    ]
    return Section(change, text["title"], blocks, [part for part in parts if not part.empty])


def _here(study: Study, change: str) -> list[Block]:
    """Sentences about the variants that make this change alone, and about its effect among the others."""
    alone = study.alone(change)
    blocks: list[Block] = [_several(study, alone)] if len(alone) > 1 else []
    items = [f"**{subject}.** {said}" for subject, said in _measured(study, alone[0])] if len(alone) == 1 else []
    if not alone:
        together = listed([study.label(name) for name in study.with_change(change)])
        items.append(f"This study makes the change only together with others: {together}. See the summary.")
    effects = study.results.effects
    if effects and change in effects.main:
        said = verdict(effects.main[change])
        items.append(f"**Averaged over all combinations with the others.** Loss {said}.")
        for term, one in effects.interactions.items():
            if change in term.split(" x ") and len(term.split(" x ")) == 2:
                items.append(f"**Interaction {literal(term_words(term))}.** {_interaction(one)}")
    return [*blocks, Bullets(items)] if items else blocks


def _several(study: Study, names: list[str]) -> Table:
    """Several variants of one change beside the base."""
    context = study.contexts[-1] if study.contexts else 0
    point = common_point(study, "decode")
    rows = []
    for name in [study.base_name, *names]:
        made = study.label(name) if name == study.base_name else study.made(name)
        row = [f"**{made}**", count(study.variants[name].parameters["total"])]
        row += [memory(study.cache(name, context) or 0)] if context else []
        row += [count(study.decode(name)[point]) if point in study.decode(name) else "-"] if point else []
        loss, gap = study.loss(name), study.variants[name].difference
        row += [f"{loss:.3f}" if loss is not None else "-", nats(gap) if gap else "", span(gap) if gap else ""]
        rows.append([*row, "" if gap is None else "inside the noise" if in_noise(gap) else _word(gap)])
    columns = [Column("variant", "text"), Column("parameters")]
    columns += [Column(f"cache, {count(context)} tokens")] if context else []
    columns += [Column("tokens/s")] if point else []
    columns += [Column("loss"), Column("difference"), Column("95% interval"), Column("", "text")]
    note = f"Loss in nats a token on {study.text}."
    note += f" Decoding at {tokens(point[0])} of context, batch {point[1]}, {study.dtype}." if point else ""
    return Table("", study.setting, columns, rows, note)


def _word(gap: Interval) -> str:
    return "no interval" if gap.low is None else "lower loss" if gap.mean < 0 else "higher loss"


def _interaction(one: Interval) -> str:
    if one.low is None or in_noise(one):
        return f"{verdict(one)[0].upper()}{verdict(one)[1:]}."
    better = "better" if one.mean < 0 else "worse"
    return f"Together they do {better} than apart would suggest: loss {verdict(one)}."


def _measured(study: Study, name: str) -> list[tuple[str, str]]:
    """(subject, sentence) for everything that was measured of a variant, against the base."""
    found, base = [], study.base_name
    gap = study.variants[name].difference
    if gap is not None:
        found.append(("Quality", f"Loss {verdict(gap)}."))
    elif study.untrained(name):
        found.append(("Quality", "Unknown: every run failed."))
    own, before = (study.variants[n].parameters["total"] for n in (name, base))
    size = f"{count(own)} parameters instead of {count(before)} ({percent(own, before)})"
    found.append(("Size", f"{size}." if own != before else f"{count(own)} parameters, as in the base."))
    if study.contexts:
        found.append(("Cache", _cache_words(study, name)))
    points = sorted(study.decode(name).keys() & study.decode(base).keys(), key=weight)
    if points:
        ends = dict.fromkeys((points[0], points[-1]))
        said = "; ".join(speed_words(study, name, at) for at in ends)
        found.append(("Decoding", f"{said}."))
    found += _training(study, name)
    return found


def _cache_words(study: Study, name: str) -> str:
    context = study.contexts[-1]
    own, before = study.cache(name, context) or 0, study.cache(study.base_name, context) or 0
    if own == before:
        return f"{memory(study.per_token(name))} a token, as in the base."
    each = (study.per_token(name), study.per_token(study.base_name))
    words = f"{memory(own)} at {tokens(context)} instead of {memory(before)}, {_times_less(before / own)}"
    if each[0] != each[1]:
        words += f"; {memory(each[0])} a token instead of {memory(each[1])}"
    return f"{words}."


def _times_less(ratio: float) -> str:
    return f"{digits(ratio)} times less" if ratio > 1 else f"{digits(1 / ratio)} times more"


def _training(study: Study, name: str) -> list[tuple[str, str]]:
    own, before, found = study.timed(name), study.timed(study.base_name), []
    if own is None or before is None:
        return []
    rates = (own.training_tokens_per_second, before.training_tokens_per_second)
    if rates[0] and rates[1]:
        said = f"{count(rates[0])} tokens/s instead of {count(rates[1])}: {compared(rates[0] / rates[1])}."
        found.append(("Training", said))
    for key, subject in (("training_memory_bytes", "in training"), ("decoding_memory_bytes", "in decoding")):
        a, b = getattr(own, key), getattr(before, key)
        if a and b:
            found.append((f"Memory {subject}", f"{memory(a)} at the peak instead of {memory(b)} ({percent(a, b)})."))
    return found
