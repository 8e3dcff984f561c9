"""What a change does at GPT-2's published sizes: counted, and predicted for this machine. Nothing here was trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gptlab.config import ModelConfig
from gptlab.formatting import count, digits, listed, memory, percent, times
from gptlab.model import cost
from gptlab.report.blocks import Block, Column, Paragraph, Table
from gptlab.report.pictures import sequences
from gptlab.report.texts import known
from gptlab.report.view import NAMES, Study, make_config, tokens
from gptlab.study import roofline
from gptlab.study.claims import TIE
from gptlab.study.results import Counterpart
from gptlab.study.variants import kinds_of

CORNERS = ((128, 1), (1024, 1), (1024, 32), (16384, 1), (16384, 32))
"""Contexts and batches at which GPT-2 small is predicted: short and long, alone and many."""


def _counterparts(study: Study, change: str) -> dict[str, Counterpart]:
    """For each of GPT-2's sizes, this change alone, as the first variant that makes it would make it there."""
    found = {}
    names = [*study.alone(change), *study.with_change(change)]
    for size, rows in study.results.four_sizes.items():
        name = next((name for name in names if name in rows), None)
        if name is None:
            continue
        row = rows[name]
        if name not in study.alone(change):
            # What else the variant changes is taken back.
            own = {field: value for field, value in row.changes.items() if kinds_of({field: value}) == [change]}
            config = make_config({**ModelConfig.preset(size).to_dict(), **own})
            row = Counterpart(
                changes=own,
                parameters=sum(cost.parameters(config).values()),
                cache=[
                    e.model_copy(update={"bytes": cost.cache_bytes(config, e.context, 2, batch=e.batch)})
                    for e in row.cache
                ],
                flops_per_token={},
            )
        found[size] = row
    return found


def _plain(study: Study, size: str) -> Counterpart | None:
    """The base at one of GPT-2's sizes."""
    return study.results.four_sizes[size].get(study.base_name)


def at_four_sizes(study: Study, change: str) -> list[Block]:
    """A table of what the change does to parameters and cache of GPT-2's sizes, as the study counted it."""
    rows, contexts, how = [], [], []
    for size, own in _counterparts(study, change).items():
        plain = _plain(study, size)
        if plain is None:
            continue
        contexts = [entry.context for entry in own.cache]
        how.append((size, _settings(own.changes)))
        caches = zip(own.cache, plain.cache, strict=True)
        rows.append(
            [
                f"**{size}**",
                count(plain.parameters),
                count(own.parameters),
                percent(own.parameters, plain.parameters),
                *(_arrow(b.bytes, a.bytes) for a, b in caches),
            ]
        )
    if not rows:
        return []
    columns = [Column("size", "text"), Column("GPT-2"), Column(f"with {NAMES[change]}"), Column("parameters")]
    columns += [Column(f"cache, {count(context)}") for context in contexts]
    setting = "GPT-2's published sizes; untrained; no hardware: counted from the configuration"
    note = f"Cache of one sequence in bfloat16 by tokens of context. {_all_settings(how)}."
    if max(contexts) > ModelConfig().context_length and change != "rope":
        note += (
            f" Learned positions end at {count(ModelConfig().context_length)}; beyond, the figures are arithmetic only."
        )
    return [Table("", setting, columns, rows, note)]


def _all_settings(how: list[tuple[str, str]]) -> str:
    """What was set in which size, once where it is the same in all."""
    if len({settings for _, settings in how}) == 1:
        return f"All with {how[0][1]}"
    return "; ".join(f"{size}: {settings}" for size, settings in how)


def _arrow(before: int, after: int) -> str:
    """Bytes before and after a change, once where they are equal."""
    return memory(before) if before == after else f"{memory(before)} → {memory(after)}"


def _settings(values: Mapping[str, Any]) -> str:
    return ", ".join(f"`{key}={value}`" for key, value in values.items()) or "no change"


def where_it_pays(study: Study, change: str) -> list[Block]:
    """The prediction for GPT-2 small at a few corners, with this machine's limits."""
    blocks: list[Block] = [Paragraph(known()[change]["pays"])]
    own = _counterparts(study, change).get("gpt2")
    plain = _plain(study, "gpt2") if own else None
    if own is None or plain is None:
        return blocks
    configs = [make_config({**ModelConfig().to_dict(), **one.changes}) for one in (plain, own)]
    machine, rows, gains = study.machine, [], {}
    for context, batch in CORNERS:
        # Without a machine the bytes are still known.
        limits = machine or roofline.Machine(1.0, 1.0)
        before, after = (
            roofline.predict(config, limits, context=context, batch=batch, dtype=study.dtype) for config in configs
        )
        row = [f"{tokens(context)}, {sequences(batch)}", _arrow(before.weight_bytes, after.weight_bytes)]
        row += [_arrow(before.cache_bytes, after.cache_bytes)]
        if machine:
            gains[context, batch] = before.seconds / after.seconds
            row += [f"{digits(before.tokens_per_second)} → {digits(after.tokens_per_second)}"]
            row += [f"**{times(gains[context, batch])}**"]
        rows.append(row)
    shrinks = any("→" in row[2] for row in rows)
    if gains:
        words = _corner_words(gains, change)
        blocks.append(Paragraph(f"{words} {_balance(configs[0])}" if shrinks else words))
    if not shrinks:
        return blocks  # no byte of the cache changes: there is no table to read
    columns = [Column("context and batch", "text"), Column("weights read"), Column("cache read")]
    columns += [Column("tokens/s"), Column("gain")] if machine else []
    of = f"GPT-2 small, {_settings(own['changes'])}; untrained;"
    where = f"predicted for {study.machine_words}" if machine else "no hardware: bytes read for a step"
    table = Table("One decoding step of GPT-2 small", f"{of} {where}, {study.dtype}", columns, rows)
    return [*blocks, table]


def _corner_words(gains: dict[tuple[int, int], float], change: str) -> str:
    """Where the prediction gains something, and where not."""
    words = {at: f"{tokens(at[0])} and {sequences(at[1])} ({times(gain)})" for at, gain in gains.items()}
    some, none = ([words[at] for at, gain in gains.items() if (gain >= TIE) is pays] for pays in (True, False))
    said = f"Predicted for GPT-2 small on this machine, {NAMES[change]}"
    if not some:
        low, high = times(min(gains.values())), times(max(gains.values()))
        gain = low if low == high else f"{low} to {high}"
        places = [f"{tokens(context)} and {sequences(batch)}" for context, batch in (min(gains), max(gains))]
        return f"{said} makes decoding faster nowhere: {gain} the speed from {places[0]} to {places[1]}."
    said += f" pays at {listed(some)}."
    return f"{said} It does not at {listed(none)}." if none else said


def _balance(plain: ModelConfig) -> str:
    """From how many sequences on the cache outweighs the weights."""
    context = plain.context_length
    words = digits(roofline.balance(plain, context), 2)
    return f"Keys and values outweigh the weights from {words} sequences of {tokens(context)} on."
