"""What can be counted without training or a clock: parameters by part, operations, and bytes of the cache."""

from __future__ import annotations

from typing import Any

from gptlab.formatting import count, memory, millions
from gptlab.report.blocks import Block, Column, Paragraph, Section, Table
from gptlab.report.view import Study
from gptlab.study.results import CacheSize


def counts(study: Study) -> Section:
    """Parameters, operations and cache of every variant."""
    blocks: list[Block] = []
    if len(study.drawn) < len(study.variants):
        blocks.append(Paragraph("Variants of one architecture have one row, that of the first.", "note"))
    return Section("counts", "Sizes, counted", [*blocks, _parameters(study), *_flops(study), *_cache(study)])


def _counted(study: Study) -> list[tuple[str, Any]]:
    return [(name, study.variants[name]) for name in study.drawn]


def _parameters(study: Study) -> Table:
    found = {name: variant.parameters for name, variant in _counted(study)}
    parts = list(dict.fromkeys(part for values in found.values() for part in values))
    rows = [
        [f"**{study.label(name)}**", *(count(values.get(part, 0)) for part in parts)] for name, values in found.items()
    ]
    return Table("Parameters by part", study.setting, [Column("variant", "text"), *map(Column, parts)], rows)


def _flops(study: Study) -> list[Block]:
    forward = {name: variant.flops_per_token.forward for name, variant in _counted(study)}
    contexts = sorted({int(context) for values in forward.values() for context in values})
    if not contexts:
        return []
    rows = []
    for name, values in forward.items():
        cells = [values.get(str(context)) for context in contexts]
        cells.append(study.variants[name].flops_per_token.training)
        rows.append([f"**{study.label(name)}**", *("-" if cell is None else millions(cell) for cell in cells)])
    columns = [Column("variant", "text"), *(Column(f"after {count(context)} tokens") for context in contexts)]
    note = "A multiplication and an addition are two. Generating one token after so many; and one token in training."
    return [Table("Floating-point operations a token", study.setting, [*columns, Column("training")], rows, note)]


def _cache(study: Study) -> list[Block]:
    entries = {(entry.context, entry.batch) for entry in study.base.cache}
    if not entries:
        return []
    # One sequence at every context, and several where it is longest: bytes are proportional to them.
    longest, least = max(context for context, _ in entries), min(batch for _, batch in entries)
    points = sorted(point for point in entries if point[1] == least or point[0] == longest)
    rows = []
    for name, variant in _counted(study):
        found = {(entry.context, entry.batch): entry for entry in variant.cache}
        rows.append([f"**{study.label(name)}**", *(_size(found.get(point)) for point in points)])
    columns = [Column(f"{count(context)} × {batch}") for context, batch in points]
    note = (
        f"Tokens of context × sequences, {study.base['cache'][0]['dtype']}. In brackets what the program allocates"
        " where that is more: a window's ring keeps room for a whole chunk of a prompt."
    )
    return [Table("Cache of keys and values", study.setting, [Column("variant", "text"), *columns], rows, note)]


def _size(entry: CacheSize | None) -> str:
    """Bytes counted, and bytes allocated where these differ."""
    if entry is None:
        return "-"
    allocated = entry.allocated
    more = "" if allocated in (None, entry.bytes) else f" ({memory(allocated or 0)})"
    return f"{memory(entry['bytes'])}{more}"
