"""What a change does at GPT-2's published sizes: counted, and predicted for this machine. Nothing here was trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gptlab import roofline
from gptlab.config import ModelConfig
from gptlab.formatting import count, digits, memory, percent, times
from gptlab.report.blocks import Block, Column, Paragraph, Table
from gptlab.report.texts import known
from gptlab.report.view import NAMES, Study, make_config, sequences, tokens
from gptlab.study import costs
from gptlab.study.results import Counterpart
from gptlab.study.variants import kinds_of

CORNERS = ((128, 1), (1024, 1), (1024, 32), (16384, 1), (16384, 32))
"""Contexts and batches at which GPT-2 small is predicted: short and long, alone and many."""


def _counterparts(study: Study, change: str) -> dict[str, Counterpart]:
    """For each of GPT-2's sizes, this change alone, as the first variant that makes it would make it there."""
    counterparts = {}
    names = [*study.alone(change), *study.with_change(change)]
    for size, rows in study.results.four_sizes.items():
        name = next((name for name in names if name in rows), None)
        if name is None:
            continue
        row = rows[name]
        if name not in study.alone(change):
            # What else the variant changes is taken back.
            own = {field: value for field, value in row.changes.items() if kinds_of({field: value}) == [change]}
            row = costs.counterpart(size, make_config({**ModelConfig.preset(size).to_dict(), **own}))
        counterparts[size] = row
    return counterparts


def _plain(study: Study, size: str) -> Counterpart | None:
    """The base at one of GPT-2's sizes."""
    return study.results.four_sizes[size].get(study.base_name)


def at_four_sizes(study: Study, change: str) -> list[Block]:
    """Return what the change does to parameters and cache of GPT-2's sizes, as the study counted it."""
    rows, contexts, how = [], [], []
    for size, own in _counterparts(study, change).items():
        plain = _plain(study, size)
        if plain is None:
            continue
        contexts = [entry.context for entry in own.cache]
        how.append((size, _settings(own.changes)))
        row = [f"**{size}**", count(plain.parameters), count(own.parameters), percent(own.parameters, plain.parameters)]
        rows.append(row + [_arrow(b.bytes, a.bytes) for a, b in zip(own.cache, plain.cache, strict=True)])
    if not rows:
        return []
    columns = [Column("size", "text"), Column("GPT-2"), Column(f"with {NAMES[change]}"), Column("parameters")]
    columns += [Column(f"cache, {count(context)}") for context in contexts]
    setting = "GPT-2's published sizes; untrained; no hardware: counted from the configuration"
    same = len({settings for _, settings in how}) == 1
    settings = f"All with {how[0][1]}" if same else "; ".join(f"{size}: {words}" for size, words in how)
    note = f"Cache of one sequence in bfloat16 by tokens of context. {settings}."
    length = ModelConfig().context_length
    if max(contexts) > length and change != "rope":
        note += f" Learned positions end at {count(length)}; beyond, the figures are arithmetic only."
    return [Table("", setting, columns, rows, note)]


def _arrow(before: int, after: int) -> str:
    """Bytes before and after a change, once where they read the same."""
    return " → ".join(dict.fromkeys((memory(before), memory(after))))


def _settings(values: Mapping[str, Any]) -> str:
    return ", ".join(f"`{key}={value}`" for key, value in values.items()) or "no change"


def where_it_pays(study: Study, change: str) -> list[Block]:
    """Return the prediction for GPT-2 small at a few corners, with this machine's limits."""
    text = known()[change]["pays"]
    own = _counterparts(study, change).get("gpt2")
    plain = _plain(study, "gpt2") if own else None
    if own is None or plain is None or change == "rope":  # nothing to read or to compute is saved
        return [Paragraph(text)]
    configs = [make_config({**ModelConfig().to_dict(), **one.changes}) for one in (plain, own)]
    machine, rows = study.machine, []
    for context, batch in CORNERS:
        # Without a machine the bytes are still known.
        limits = machine or roofline.Machine(1.0, 1.0)
        before, after = (
            roofline.predict(config, limits, context=context, batch=batch, dtype=study.dtype) for config in configs
        )
        row = [f"{tokens(context)}, {sequences(batch)}", _arrow(before.weight_bytes, after.weight_bytes)]
        row.append(_arrow(before.cache_bytes, after.cache_bytes))
        if machine:
            row.append(f"{digits(before.tokens_per_second)} → {digits(after.tokens_per_second)}")
            row.append(f"**{times(before.seconds / after.seconds)}**")
        rows.append(row)
    if any("→" in row[2] for row in rows):
        context = configs[0].context_length
        balance = digits(roofline.balance(configs[0], context), 2)
        text += f" In GPT-2 small, keys and values outweigh the weights from {balance} sequences of {tokens(context)}."
    columns = [Column("context and batch", "text"), Column("weights read"), Column("cache read")]
    columns += [Column("tokens/s"), Column("speed-up")] if machine else []
    of = f"GPT-2 small, {_settings(own.changes)}; untrained;"
    where = f"predicted for {study.machine_words}" if machine else "no hardware: bytes read for a step"
    table = Table("One decoding step of GPT-2 small", f"{of} {where}, {study.dtype}", columns, rows)
    return [Paragraph(text), table]
