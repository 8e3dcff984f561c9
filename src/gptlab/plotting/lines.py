"""Lines over a common axis, each with its name at its end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from gptlab.plotting.style import (
    GREY,
    HEIGHT,
    Look,
    figure,
    in_unit,
    label_ends,
    powers_of_two,
    short,
    styled,
    tens,
    title,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Series:
    """A line or a row of points.

    Attributes:
        label: in words; empty for what is not to be named.
        look: how it is drawn.
        x: ascending.
        y: as many.
        low: lower edge of a band around it, or None.
        high: its upper edge.
        line: whether to join the points.
        marks: whether to mark them.
    """

    label: str
    look: Look
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    line: bool = True
    marks: bool = False


def merged(series: Sequence[Series]) -> list[Series]:
    """Return series with those that coincide joined under all their names, as the first of them is drawn."""
    groups: dict[tuple[tuple[float, ...], tuple[float, ...]], list[Series]] = {}
    for one in series:
        groups.setdefault((tuple(one.x), tuple(one.y)), []).append(one)
    return [
        Series(", ".join(s.label for s in same), same[0].look, x, y, line=same[0].line, marks=same[0].marks)
        for (x, y), same in groups.items()
    ]


@styled
def draw(
    series: Sequence[Series],
    xlabel: str,
    ylabel: str,
    *,
    powers: bool = False,
    up: Literal["linear", "tens", "bytes"] = "linear",
    from_zero: bool = False,
    zero: bool = False,
    top: float | None = None,
    mark: tuple[float, str] | None = None,
) -> Figure:
    """Draw series over a common axis, each labelled at its end.

    Args:
        series: at least one, none of them empty.
        xlabel: with the unit.
        ylabel: with the unit.
        powers: a horizontal axis in powers of two.
        up: the vertical axis: linear, in powers of ten, or of bytes in powers of two.
        from_zero: the vertical axis begins at zero.
        zero: draw a line at zero.
        top: upper end of the vertical axis, where the data may leave it.
        mark: a place on the horizontal axis, and what it is.
    """
    drawing = figure()
    axes = drawing.subplots()
    for one in series:
        if one.low is not None and one.high is not None:
            axes.fill_between(one.x, one.low, one.high, color=one.look.colour, alpha=0.16, linewidth=0)
        stroke = one.look.stroke if one.line else "none"
        marks = one.look.mark if one.marks else {}
        axes.plot(one.x, one.y, color=one.look.colour, linestyle=stroke, linewidth=1.5, **marks)
    _scale(axes, series, powers, up)
    if from_zero:
        axes.set_ylim(bottom=0)
    if top is not None:
        low = min(min(one.y) for one in series)
        axes.set_ylim(low - 0.05 * (top - low), top)
    if zero:
        axes.axhline(0, color=GREY, linewidth=0.8, zorder=1)
    if mark is not None:
        axes.axvline(mark[0], color=GREY, linewidth=0.8, linestyle=(0, (1, 2)))
        place: dict[str, Any] = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points"}
        axes.annotate(mark[1], (mark[0], 1), (-3, -2), ha="right", va="top", color=GREY, fontsize=7.5, **place)
    axes.set_xlabel(xlabel)
    title(axes, ylabel)
    ends = [(one.label, one.look.colour, one.x[-1], one.y[-1]) for one in series if one.label]
    label_ends(axes, ends, 0.78 * 72 * HEIGHT)  # about what the axes will have; they are arranged later
    return drawing


def _scale(axes: Axes, series: Sequence[Series], powers: bool, up: str) -> None:
    """Choose the scales and their ticks."""
    heights = [y for one in series for y in one.y]
    if powers:
        axes.set_xscale("log", base=2)
        powers_of_two(axes.xaxis, [x for one in series for x in one.x], short)
    else:
        axes.locator_params(axis="x", nbins=5)
        axes.xaxis.set_major_formatter(lambda value, _: short(value))
        axes.set_xlim(left=0)
    if up == "bytes":
        axes.set_yscale("log", base=2)
        powers_of_two(axes.yaxis, heights, in_unit)
        return
    if up == "tens":
        axes.set_yscale("log")
        axes.set_yticks(tens(heights))
        axes.minorticks_off()
    axes.yaxis.set_major_formatter(lambda value, _: short(value))
