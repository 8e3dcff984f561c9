"""How the report draws: its style, lines with names at their ends, axes. Nothing here knows of studies.

Every drawing is small, so that its letters can be read on a telephone; side by side they fill a screen. What a variant
is can be told without colour: by the label at its line, and dashes and hollow marks for rotary positions. The colours
are few and known, and `inline` turns them into variables of the page's style: one drawing serves light and dark.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gptlab.errors import GptlabError
from gptlab.study.report_blocks import MINUS, UNITS
from gptlab.training.curves import COLOURS, STROKES, spread
from gptlab.training.curves import STYLE as CURVES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

INK, GREY, GRID, PAPER = "#1b1b1a", "#6b6b69", "#e4e4e2", "#fefefe"
WIDTH, HEIGHT = 4.2, 2.9
"""Inches; a point of the drawing is about a pixel of a telephone."""
STYLE: dict[Any, Any] = {
    **CURVES,
    "text.color": INK,
    "axes.labelcolor": GREY,
    "axes.edgecolor": GREY,
    "axes.facecolor": "none",
    "figure.facecolor": PAPER,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "grid.color": GRID,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "axes.spines.left": False,
    "axes.labelsize": 8.5,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "font.size": 8.5,
    # Text stays text, and where the reader's letters are wider than those measured here, it needs room.
    "figure.constrained_layout.w_pad": 0.1,
}


@dataclass(frozen=True)
class Look:
    """How a variant is drawn: a colour, a stroke, and whether its marks are hollow."""

    colour: str = INK
    stroke: str = "-"
    hollow: bool = False

    @property
    def mark(self) -> dict[str, Any]:
        """Its mark, as matplotlib takes it."""
        face = PAPER if self.hollow else self.colour
        return {"marker": "o", "markersize": 4.5, "markerfacecolor": face, "markeredgecolor": self.colour}


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


def looks(kinds: Sequence[tuple[object, bool]]) -> list[Look]:
    """Return how to draw variants: a colour for each kind of attention, dashes where positions are rotary.

    Args:
        kinds: for each variant what its attention is, and whether its positions are rotary; the first is the base.
    """
    attentions = list(dict.fromkeys(attention for attention, _ in kinds))
    palette = [INK, *COLOURS[:-1]]
    found = []
    for attention, rotary in kinds:
        i = attentions.index(attention)
        round_ = i // len(palette)
        stroke = STROKES[2 * round_ % len(STROKES)] if round_ else ("--" if rotary else "-")
        found.append(Look(palette[i % len(palette)], stroke, rotary))
    return found


def merged(series: Sequence[Series]) -> list[Series]:
    """Return series with those that coincide joined under all their names, as the first of them is drawn."""
    groups: dict[tuple[tuple[float, ...], tuple[float, ...]], list[Series]] = {}
    for one in series:
        groups.setdefault((tuple(one.x), tuple(one.y)), []).append(one)
    return [
        Series(", ".join(s.label for s in same), same[0].look, x, y, line=same[0].line, marks=same[0].marks)
        for (x, y), same in groups.items()
    ]


def figure(height: float = HEIGHT) -> Figure:
    """Return an empty figure of the report's width.

    Raises:
        GptlabError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise GptlabError("a report needs matplotlib and jinja2; install them: pip install 'gptlab[report]'") from None
    return Figure(figsize=(WIDTH, height), layout="constrained")


def styled(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    """Draw in the report's style."""

    def drawn(*arguments: Any, **options: Any) -> Figure:
        figure()  # says what is missing before matplotlib is asked for
        import matplotlib

        with matplotlib.rc_context(STYLE):
            made = draw(*arguments, **options)
            # Arranged once: it takes longer than to draw, and each file would do it again.
            made.draw_without_rendering()
            made.set_layout_engine("none")
            return made

    return drawn


@styled
def lines(
    series: Sequence[Series],
    xlabel: str,
    ylabel: str,
    *,
    powers: bool = False,
    logarithmic: bool = False,
    in_bytes: bool = False,
    from_zero: bool = False,
    zero: bool = False,
    top: float | None = None,
    ends_at: tuple[float, str] | None = None,
) -> Figure:
    """Draw series over a common axis, each labelled at its end.

    Args:
        series: at least one, none of them empty.
        xlabel: with the unit.
        ylabel: with the unit.
        powers: a horizontal axis in powers of two.
        logarithmic: a vertical axis in powers of ten.
        in_bytes: the vertical axis counts bytes, in powers of two.
        from_zero: the vertical axis begins at zero.
        zero: draw a line at zero.
        top: upper end of the vertical axis, where the data may leave it.
        ends_at: a place on the horizontal axis to mark, and what it is.
    """
    made = figure()
    axes = made.subplots()
    for one in series:
        if one.low is not None and one.high is not None:
            axes.fill_between(one.x, one.low, one.high, color=one.look.colour, alpha=0.16, linewidth=0)
        stroke = one.look.stroke if one.line else "none"
        marks = one.look.mark if one.marks else {}
        axes.plot(one.x, one.y, color=one.look.colour, linestyle=stroke, linewidth=1.5, **marks)
    if powers:
        axes.set_xscale("log", base=2)
        powers_of_two(axes.xaxis, [x for one in series for x in one.x], short)
    else:
        axes.locator_params(axis="x", nbins=5)
        axes.xaxis.set_major_formatter(lambda value, _: short(value))
        axes.set_xlim(left=0)
    if in_bytes:
        axes.set_yscale("log", base=2)
        powers_of_two(axes.yaxis, [y for one in series for y in one.y], in_unit)
    elif logarithmic:
        axes.set_yscale("log")
        axes.set_yticks(tens([y for one in series for y in one.y]))
        axes.minorticks_off()
        axes.yaxis.set_major_formatter(lambda value, _: short(value))
    else:
        axes.yaxis.set_major_formatter(lambda value, _: short(value))
    if from_zero:
        axes.set_ylim(bottom=0)
    if top is not None:
        low = min(min(one.y) for one in series)
        axes.set_ylim(low - 0.05 * (top - low), top)
    if zero:
        axes.axhline(0, color=GREY, linewidth=0.8, zorder=1)
    if ends_at is not None:
        axes.axvline(ends_at[0], color=GREY, linewidth=0.8, linestyle=(0, (1, 2)))
        axes.annotate(
            ends_at[1],
            (ends_at[0], 1),
            (-3, -2),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            ha="right",
            va="top",
            color=GREY,
            fontsize=7.5,
        )
    axes.set_xlabel(xlabel)
    title(axes, ylabel)
    label_ends(axes, [one for one in series if one.label])
    return made


def powers_of_two(axis: Axis, values: Sequence[float], write: Callable[[float], str]) -> None:
    """Set at most six ticks, at powers of two."""
    first, last = math.ceil(math.log2(min(values)) - 1e-9), math.floor(math.log2(max(values)) + 1e-9)
    step = max(1, math.ceil((last - first + 1) / 6))
    axis.set_ticks([2.0**i for i in range(first, last + 1, step)])
    axis.set_ticks([], minor=True)
    axis.set_major_formatter(lambda value, _: write(value))


def tens(values: Sequence[float]) -> list[float]:
    """Return round places on a logarithmic axis that holds positive values: 1, 2 and 5 times powers of ten."""
    low, high = min(values), max(values)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found = [n * 10.0**i for i in powers for n in (1, 2, 5)]
    within = [place for place in found if 0.8 * low <= place <= 1.25 * high]
    return within if len(within) <= 6 else [place for place in within if math.log10(place).is_integer()]


def title(axes: Axes, text: str) -> None:
    """Write what the vertical axis counts above it, where it takes no width."""
    axes.set_title(text, loc="left", fontsize=8.5, color=GREY, pad=7, x=0, parse_math=False)


def label_ends(axes: Axes, series: Sequence[Series]) -> None:
    """Write each series' name right of the axes, as near to its end as the other names allow."""
    points = 0.78 * 72 * HEIGHT  # about what the axes will have; they are arranged later
    size = min(8.5, points / (1.25 * max(len(series), 1)))
    ends = sorted(((place_of(axes, one.x[-1], one.y[-1]), one) for one in series), key=lambda end: end[0][1])
    heights = spread([end[1] for end, _ in ends], 1.25 * size / points)
    for (end, one), height in zip(ends, heights, strict=True):
        leader(axes, end, (1.03, height), one.look)
        axes.text(
            1.04,
            height,
            one.label,
            transform=axes.transAxes,
            va="center",
            color=one.look.colour,
            fontsize=size,
            parse_math=False,
        )


def place_of(axes: Axes, x: float, y: float) -> tuple[float, float]:
    """Where a point stands, as shares of the axes."""
    axes.get_xlim(), axes.get_ylim()  # the limits are set when somebody asks
    across, up = axes.transAxes.inverted().transform(axes.transData.transform((x, y)))
    return float(across), float(up)


def leader(axes: Axes, begin: tuple[float, float], end: tuple[float, float], look: Look) -> None:
    """Draw a thin line from a point to its name."""
    dots: dict[str, Any] = {"color": look.colour, "linewidth": 0.7, "linestyle": (0, (1, 1.6))}
    axes.plot(*zip(begin, end, strict=True), transform=axes.transAxes, clip_on=False, **dots)


def short(value: float, *, sign: bool = False) -> str:
    """A tick: 512, 2k, 1.5M."""
    for size, letter in ((1e9, "B"), (1e6, "M")):
        if abs(value) >= size:
            return f"{value / size:,.6g}{letter}"
    if value >= 1024 and math.log2(value).is_integer():
        return f"{value / 1024:,.0f}k"
    if abs(value) >= 1e3:
        return f"{value / 1e3:,.6g}k"
    return f"{value:{'+' if sign and value else ''},.5g}".replace("-", MINUS)


def in_unit(value: float) -> str:
    """A tick in bytes: 36 MiB."""
    for unit, size in UNITS:
        if value >= size:
            return f"{value / size:,.6g} {unit}"
    return f"{value:,.6g} B"


VARIABLES = {
    INK: "ink",
    GREY: "grey",
    GRID: "grid",
    PAPER: "paper",
    **{c.lower(): f"c{i}" for i, c in enumerate(COLOURS[:-1])},
}


def inline(svg: bytes, name: str, description: str) -> str:
    """Return an SVG file as part of a page: colours as variables, names of its own, nothing that points elsewhere.

    Args:
        svg: as matplotlib writes it.
        name: of the figure, which makes its identifiers unique in the page.
        description: for readers who do not see it, already escaped for an attribute.
    """
    text = svg.decode()
    text = text[text.index("<svg") :]
    # The style would hold for the whole page; its own says the same.
    text = re.sub(r"<metadata>.*?</metadata>\s*|<style.*?</style>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r"font-family: [^;]*; ", "", text)
    text = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', text)
    text = re.sub(r'(xlink:href="|url\()#', rf"\1#{name}-", text)
    text = re.sub(r"#[0-9a-f]{6}\b", lambda m: f"var(--{VARIABLES[m[0]]})" if m[0] in VARIABLES else m[0], text)
    opening, rest = text.split(">", 1)
    opening = re.sub(r' (width|height|xmlns|xmlns:xlink|version)="[^"]*"', "", opening)
    return f'{opening} role="img" aria-label="{description}">{rest.rstrip()}'
