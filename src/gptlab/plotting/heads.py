"""Drawings of attention heads: what one looks at, how alike two are, which share a key head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from gptlab.plotting.style import COLOURS, GREY, INK, PAPER, figure, styled, title
from gptlab.training.curves import Array

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@styled
def grid(weights: Sequence[Sequence[float]], xlabel: str, ylabel: str, edge: int | None = None) -> Figure:
    """Draw attention weights, more ink for more weight (its square root), and the edge of the window.

    Args:
        weights: a row for each query, its keys from the first on.
        xlabel: of the keys.
        ylabel: of the queries.
        edge: keys that a query sees, itself included; None for all.
    """
    drawing = figure(3.2)
    axes = drawing.subplots()
    n = max(len(weights), max(map(len, weights)))
    ink = np.zeros((len(weights), n))
    for i, row in enumerate(weights):
        ink[i, : len(row)] = np.sqrt(np.clip(row, 0, 1))
    _show(axes, ink, COLOURS[1])
    ends = [-0.5, len(weights) - 0.5]
    axes.plot(ends, ends, color=GREY, linewidth=0.7)
    if edge is not None and edge < n:
        axes.plot([-0.5, n - edge - 0.5], [edge - 0.5, n - 0.5], color=GREY, linewidth=0.7, linestyle="--")
    axes.set_xlim(-0.5, n - 0.5)
    axes.set_ylim(len(weights) - 0.5, -0.5)
    axes.grid(visible=False)
    axes.set_xlabel(xlabel)
    title(axes, ylabel)
    return drawing


def _show(axes: Axes, ink: Array, colour: str) -> None:
    """Draw squares of one colour, as strong as ``ink`` (rows, columns) says, 0 to 1."""
    pixels = np.zeros((*ink.shape, 4))
    pixels[..., :3] = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    pixels[..., 3] = ink
    axes.imshow(pixels, interpolation="nearest", aspect="equal")


@styled
def matrix(values: Sequence[Sequence[float]], xlabel: str, ylabel: str, groups: int, most: float) -> Figure:
    """Draw a number for each two heads, with frames around the groups that share keys.

    Args:
        values: (H, H).
        xlabel: of the columns.
        ylabel: of the rows.
        groups: a divisor of H: how many frames.
        most: the value of full colour.
    """
    drawing = figure(3.2)
    axes = drawing.subplots()
    n = len(values)
    _show(axes, np.clip(np.asarray(values) / most, 0, 1), COLOURS[0])
    if n <= 12:
        for i, row in enumerate(values):
            for j, value in enumerate(row):
                text = f"{value:.2f}".lstrip("0") if i != j else ""
                axes.text(j, i, text, ha="center", va="center", fontsize=8 if n <= 8 else 6)
    size = n // groups
    for g in range(groups):
        low, high = g * size - 0.5, (g + 1) * size - 0.5
        axes.plot([low, high, high, low, low], [low, low, high, high, low], color=INK, linewidth=1.2)
    axes.set_xticks(range(n))
    axes.set_yticks(range(n))
    axes.grid(visible=False)
    axes.set_xlim(-0.6, n - 0.4)
    axes.set_ylim(n - 0.4, -0.6)
    axes.spines["bottom"].set_visible(False)
    axes.set_xlabel(xlabel)
    title(axes, ylabel)
    return drawing


@styled
def wiring(models: Sequence[tuple[str, int, int]]) -> Figure:
    """Draw which query heads read which key/value head.

    Args:
        models: label, query heads and key/value heads of each.
    """
    drawing = figure(0.35 + 1.15 * len(models))
    for axes, (label, n_head, n_kv_head) in zip(np.atleast_1d(drawing.subplots(len(models), 1)), models, strict=True):
        size = n_head // n_kv_head
        radius = {"markersize": min(15.0, 230 / n_head), "markeredgewidth": 1.2}
        small = min(7.5, 120 / n_head)
        for h in range(n_head):
            kv = h // size
            colour = COLOURS[kv % (len(COLOURS) - 1)]
            middle = kv * size + (size - 1) / 2
            axes.plot([h, middle], [1, 0], color=colour, linewidth=1.3, zorder=1)
            axes.plot([h], [1], marker="o", color=colour, markerfacecolor=PAPER, **radius)
            axes.plot([middle], [0], marker="s", color=colour, **radius)
            axes.text(h, 1, str(h), ha="center", va="center_baseline", fontsize=small)
            if h % size == 0:
                axes.text(middle, 0, str(kv), ha="center", va="center_baseline", fontsize=small, color=PAPER)
        axes.set_yticks([1, 0], ["query heads", "key/value heads"])
        axes.set_xticks([])
        axes.set_ylim(-0.45, 1.45)
        axes.set_xlim(-0.6, n_head - 0.4)
        axes.grid(visible=False)
        axes.spines["bottom"].set_visible(False)
        axes.set_title(label, loc="left", fontsize=8.5, color=INK, pad=3, parse_math=False)
    return drawing
