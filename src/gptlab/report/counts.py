"""What can be counted without training or a clock: parameters by part, operations, and bytes of the cache."""

from __future__ import annotations

from gptlab.formatting import count, memory, millions
from gptlab.report.blocks import VARIANT, Block, Column, Paragraph, Section, Table
from gptlab.report.view import Study
from gptlab.study.results import CacheSize


def counts(study: Study) -> Section:
    """Return parameters, operations and cache of every variant."""
    blocks: list[Block] = []
    if len(study.drawn) < len(study.variants):
        blocks.append(Paragraph("Variants of one architecture share a row, named after the best of them.", "note"))
    return Section("counts", "Sizes, counted", [*blocks, _parameters(study), *_flops(study), *_cache(study)])


def _parameters(study: Study) -> Table:
    sizes = {name: study.variants[name].parameters for name in study.drawn}
    parts = list(dict.fromkeys(part for own in sizes.values() for part in own))
    rows = [[f"**{study.label(name)}**", *(count(own.get(part, 0)) for part in parts)] for name, own in sizes.items()]
    return Table("Parameters by part", study.setting, [VARIANT, *map(Column, parts)], rows)


def _flops(study: Study) -> list[Block]:
    flops = {name: study.variants[name].flops_per_token for name in study.drawn}
    contexts = sorted({int(context) for own in flops.values() for context in own.forward})
    if not contexts:
        return []
    rows = []
    for name, own in flops.items():
        cells = [own.forward.get(str(context)) for context in contexts]
        written = ("-" if cell is None else millions(cell) for cell in cells)
        rows.append([f"**{study.label(name)}**", *written, millions(own.training)])
    columns = [VARIANT, *(Column(f"after {count(context)} tokens") for context in contexts), Column("training")]
    note = "A multiplication and an addition count as two. One generated token after so many, and one in training."
    return [Table("Floating-point operations per token", study.setting, columns, rows, note)]


def _cache(study: Study) -> list[Block]:
    entries = {(entry.context, entry.batch) for entry in study.base.cache}
    if not entries:
        return []
    # One sequence at every context, and several where it is longest: bytes are proportional to them.
    longest, least = max(context for context, _ in entries), min(batch for _, batch in entries)
    points = sorted(point for point in entries if point[1] == least or point[0] == longest)
    rows = []
    for name in study.drawn:
        own = {(entry.context, entry.batch): entry for entry in study.variants[name].cache}
        sizes = (_size(own.get(point)) for point in points)
        rows.append([f"**{study.label(name)}**", memory(study.per_token(name)), *sizes])
    columns = [VARIANT, Column("per token"), *(Column(f"{count(context)} × {batch}") for context, batch in points)]
    note = (
        f"Tokens of context × sequences, {study.base.cache[0].dtype}. In brackets: what the program allocates, where"
        " that is more. A window's cache grows until it is full. Its ring keeps room for a whole chunk of a prompt."
    )
    return [Table("Cache of keys and values", study.setting, columns, rows, note)]


def _size(entry: CacheSize | None) -> str:
    """Bytes counted, and bytes allocated where these differ."""
    if entry is None:
        return "-"
    more = "" if entry.allocated in (None, entry.bytes) else f" ({memory(entry.allocated or 0)})"
    return f"{memory(entry.bytes)}{more}"
