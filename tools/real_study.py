"""What the kept study `real` found, for the top of docs/results.md: one table and two figures."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

from gptlab.formatting import MINUS
from gptlab.plotting import lines
from gptlab.plotting.lines import Series
from gptlab.plotting.style import COLOURS, INK, Look, encode
from gptlab.study.results import Results, Variant

CONTEXT = 8192
"""Tokens in the cache whose bytes are told."""
DRAWN = {
    "base": Look(INK),
    "window-512": Look(COLOURS[0], "--"),
    "window-512-4": Look(COLOURS[0]),
    "window-256": Look(COLOURS[1], "--"),
    "window-256-4": Look(COLOURS[1]),
    "window-128": Look(COLOURS[2], "--"),
    "window-128-4": Look(COLOURS[2]),
}
"""The variants of the figure; those that the results lack are left out."""


def table(results: Results) -> str:
    """Return Markdown: a row for every variant."""
    base = results.variants[results.study.base]
    far = base.by_position.buckets[-1] if base.by_position else (0, 0)
    distances = [copy.distance for copy in base.copying]
    heads = ["cache, MiB", "loss", "added", "95% interval", f"after {far[0]:,} to {far[1]:,} tokens"]
    heads += [f"copies from {distance}" for distance in distances]
    rows = [f"| | {' | '.join(heads)} |", "|---|" + "---:|" * len(heads)]
    rows += [f"| {one.label} | {' | '.join(_cells(one))} |" for one in results.variants.values()]
    quality, position = base.quality, base.by_position
    assert quality is not None
    assert position is not None
    rows.append(
        f"\nNats per token. Cache of one sequence of {CONTEXT:,} tokens in bfloat16. Loss: {quality.tokens:,} tokens of"
        f" {quality.documents} documents of {quality.text}, {quality.protocol}; intervals by paired bootstrap over"
        f" documents. After {far[0]:,} to {far[1]:,} tokens: {position.protocol}. Copies: share of the tokens of random"
        " strings that are reproduced so many tokens after they stood there first."
    )
    if windows(results):
        rows.append("\n![Loss added against the window, by the number of sinks.](images/real-windows.svg)")
    return "\n".join(rows)


def uptrained(kept: Mapping[str, Any]) -> str:
    """Return Markdown: what continued training gave back to the conversion with one key head.

    Args:
        kept: docs/results/real-uptraining.json.
    """
    looks = [row for row in kept["curve"] if row["event"] == "evaluate"]
    rows = ["| model | loss | added | 95% interval |", "|---|---:|---:|---:|"]
    gaps = {gap["of"]: gap for gap in kept["differences"]}
    for name, found in kept["evaluation"].items():
        gap = gaps.get(name)
        cells = f"{_signed(gap['mean'])} | {_signed(gap['low'])} to {_signed(gap['high'])}" if gap else " | "
        rows.append(f"| {name} | {found['nats_per_token']:.3f} | {cells} |")
    curve = ", ".join(f"{row['validation_loss']:.2f} after {row['tokens']:,}" for row in looks)
    rows.append(
        f"\nThe same articles and windows as above. Continued for {looks[-1]['tokens']:,} tokens of other articles, in"
        f" windows of {kept['recipe']['batch']['length']:,}, with SmolLM2 as teacher. Loss on validation tokens during"
        f" training: {curve} tokens. Commands, recipe and curve:"
        " [real-uptraining.json](results/real-uptraining.json)."
    )
    return "\n".join(rows)


def layers(kept: Mapping[str, Any]) -> str:
    """Return Markdown: what sharing one key head costs by the number of layers that share.

    Args:
        kept: docs/results/real-layers.json.
    """
    cost, parts = kept["alone"], [key for key in kept["together"][0] if key != "layers"]
    rows = [f"| layers with one key head | {' | '.join(parts)} |", "|---|" + "---:|" * len(parts)]
    rows += [f"| {row['layers']} | {' | '.join(_signed(row[part]) for part in parts)} |" for row in kept["together"]]
    worst = sorted(range(len(cost)), key=lambda layer: -cost[layer])[:3]
    words = ", ".join(f"layer {layer + 1} ({_signed(cost[layer])})" for layer in worst)
    rows.append(
        f"\nAdded nats per token on {kept['windows']} windows of {kept['length']:,} tokens ({kept['loss']:.3f} as"
        " it is); layers that cost least alone come first; where only keys or values are shared, the rest stay as they"
        f" are. Alone, a layer costs {_signed(statistics.median(cost))} in the median; most of all: {words}."
        " `python benchmarks/shared_layers.py enwiki-validation.txt`, [real-layers.json](results/real-layers.json)."
    )
    return "\n".join(rows)


def windows(results: Results) -> dict[int, list[tuple[int, float]]]:
    """Return (window, loss added) by the number of sinks, of the conversions that change nothing else.

    Empty where no two windows can be compared.
    """
    points: dict[int, list[tuple[int, float]]] = {}
    for variant in results.variants.values():
        about, gap = variant.conversion, variant.difference
        if about and gap and set(about.changes) <= {"window", "sinks"} and isinstance(about.changes["window"], int):
            points.setdefault(about.changes.get("sinks", 0), []).append((about.changes["window"], gap.mean))
    return {sinks: sorted(row) for sinks, row in sorted(points.items())} if max(map(len, points.values())) > 1 else {}


def draw_windows(results: Results) -> bytes:
    """Return the loss added against the window, a line for each number of sinks, as SVG."""
    series = []
    for i, (sinks, row) in enumerate(windows(results).items()):
        x, y = zip(*row, strict=True)
        label = "no sinks" if not sinks else f"{sinks} sink{'s' * (sinks > 1)}"
        series.append(Series(label, Look(COLOURS[i % len(COLOURS)]), x, y, marks=True))
    return encode(lines.draw(series, "window (tokens)", "loss added (nats per token)", powers=True, zero=True), "svg")


def _cells(variant: Variant) -> list[str]:
    size = next(row.bytes for row in variant.cache if (row.context, row.batch) == (CONTEXT, 1))
    gap, quality, position = variant.difference, variant.quality, variant.by_position
    cells = [f"{size / 2**20:.1f}", f"{quality.nats_per_token:.3f}" if quality else ""]
    cells.append(_signed(gap.mean) if gap else "")
    cells.append(
        "" if gap is None or gap.low is None or gap.high is None else f"{_signed(gap.low)} to {_signed(gap.high)}"
    )
    cells.append(f"{position.nats[-1]:.3f}" if position else "")
    return cells + [f"{100 * copy.accuracy:.0f}%" for copy in variant.copying]


def _signed(value: float) -> str:
    return f"{value:+.3f}".replace("-", MINUS)


def draw(results: Results) -> bytes:
    """Return the loss by position of the variants of `DRAWN`, as SVG."""
    series = []
    for name, look in DRAWN.items():
        variant = results.variants.get(name)
        if variant is not None and variant.by_position is not None:
            places = [last for _, last in variant.by_position.buckets]
            series.append(Series(variant.label, look, places[3:], variant.by_position.nats[3:], marks=True))
    drawing = lines.draw(series, "tokens seen (up to)", "loss (nats per token)", powers=True)
    return encode(drawing, "svg")
