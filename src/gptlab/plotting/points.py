"""Drawings of points with their intervals: differences below each other, and quality against size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from gptlab.plotting.style import (
    COLOURS,
    GREY,
    HEIGHT,
    INK,
    Look,
    figure,
    in_unit,
    label_ends,
    place_of,
    powers_of_two,
    short,
    spread,
    styled,
    title,
    write_name,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Point = tuple[str, Look, float, float, float | None, float | None]
"""A labelled point: how it is drawn, bytes, height, and the ends of an interval of the height or None."""

LONGEST = 24
"""Letters of a name that has room beside its point; longer ones stand right of the axes."""


@styled
def intervals(rows: Sequence[tuple[str, float, float | None, float | None]], xlabel: str, split: int = 0) -> Figure:
    """Draw differences with their intervals, one below the other; those that cover zero are hollow and grey.

    Args:
        rows: label, mean, and the ends of the interval or None.
        xlabel: with the unit.
        split: after how many rows to leave a gap; 0 for none.
    """
    drawing = figure(0.62 + 0.24 * len(rows))
    axes = drawing.subplots()
    axes.axvline(0, color=GREY, linewidth=0.8)
    places = [-i - (0.5 if split and i >= split else 0) for i in range(len(rows))]
    for (_, mean, low, high), place in zip(rows, places, strict=True):
        unsure = low is None or high is None or low <= 0 <= high
        look = Look(GREY if unsure else COLOURS[0], hollow=unsure)
        if low is not None and high is not None:
            axes.plot([low, high], [place, place], color=look.colour, linewidth=1.3)
        axes.plot([mean], [place], color=look.colour, **look.mark)
    axes.set_yticks(places, [row[0] for row in rows], parse_math=False)
    axes.tick_params(axis="y", labelcolor=INK)
    axes.grid(axis="x")
    axes.grid(visible=False, axis="y")
    axes.set_xlabel(xlabel)
    axes.locator_params(axis="x", nbins=5)
    axes.xaxis.set_major_formatter(lambda value, _: short(value, sign=True))
    axes.margins(y=0.6 / len(rows))
    return drawing


@styled
def scatter(
    points: Sequence[Point],
    front: Sequence[int],
    xlabel: str,
    ylabel: str,
) -> Figure:
    """Draw points with labels, and the line of those that no other beats.

    Args:
        points: at least one.
        front: which of them to join, from left to right.
        xlabel: with the unit.
        ylabel: with the unit.
    """
    drawing = figure()
    axes = drawing.subplots()
    axes.set_xscale("log", base=2)
    outside = max(len(point[0]) for point in points) > LONGEST
    powers_of_two(axes.xaxis, [point[2] for point in points], in_unit, 3 if outside else 6)
    axes.plot([points[i][2] for i in front], [points[i][3] for i in front], color=GREY, linewidth=0.9, zorder=1)
    for _, look, x, y, low, high in points:
        if low is not None and high is not None:
            axes.plot([x, x], [low, high], color=look.colour, linewidth=1)
        axes.plot([x], [y], color=look.colour, **look.mark)
    axes.set_xlabel(xlabel)
    title(axes, ylabel)
    axes.margins(x=0.12, y=0.12)
    if outside:
        label_ends(axes, [(label, look.colour, x, y) for label, look, x, y, *_ in points], 0.72 * 72 * HEIGHT)
    else:
        _label_points(axes, points)
    return drawing


def _label_points(axes: Axes, points: Sequence[Point]) -> None:
    """Write the names of points towards the middle of the picture, all at heights of their own."""
    placed = sorted(((place_of(axes, *point[2:4]), point) for point in points), key=lambda one: one[0][1])
    heights = spread([at[1] for at, _ in placed], 10 / (0.72 * 72 * HEIGHT))
    left = [at[0] for at, _ in placed if at[0] < 0.5]
    right = [at[0] for at, _ in placed if at[0] >= 0.5]
    for (at, (label, look, *_)), height in zip(placed, heights, strict=True):
        side = 1 if at[0] < 0.5 else -1
        across = (max(left) if side > 0 else min(right)) + 0.05 * side
        leader = ((at[0] + 0.018 * side, at[1]), (across - 0.008 * side, height))
        write_name(axes, label, look.colour, 8, (across, height), leader)
