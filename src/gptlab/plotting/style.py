"""How everything is drawn: colours, looks, sizes, labels and ticks.

Every drawing is small, so that its letters can be read on a telephone; side by side they fill a screen. What a variant
is can be told without colour: by the label at its line, and dashes and hollow marks for rotary positions. The colours
are few and known, and `inline` turns them into variables of the page's style: one drawing serves light and dark.
"""

from __future__ import annotations

import functools
import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ParamSpec

import numpy as np

from gptlab.errors import GptlabError
from gptlab.formatting import MINUS, UNITS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

Arguments = ParamSpec("Arguments")

FORMATS = ("png", "svg", "pdf")
# Okabe and Ito (2008), *Color Universal Design*, without the yellow, which white paper swallows.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STROKES = ("-", "--", ":", "-.")
BASE: dict[Any, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": "0.9",
    "grid.linewidth": 0.6,
    "lines.solid_capstyle": "round",
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "gptlab",  # the same figures give the same file
    "pdf.fonttype": 42,
}
INK, GREY, GRID, PAPER = "#1b1b1a", "#6b6b69", "#e4e4e2", "#fefefe"
WIDTH, HEIGHT = 4.2, 2.9
"""Inches; a point of the drawing is about a pixel of a telephone."""
STYLE: dict[Any, Any] = {
    **BASE,
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


def looks(kinds: Sequence[tuple[object, bool]]) -> list[Look]:
    """Return how to draw variants: a colour for each kind of attention, dashes where positions are rotary.

    Args:
        kinds: for each variant what its attention is, and whether its positions are rotary; the first is the base.
    """
    attentions = list(dict.fromkeys(attention for attention, _ in kinds))
    palette = [INK, *COLOURS[:-1]]
    styles = []
    for attention, rotary in kinds:
        i = attentions.index(attention)
        round_ = i // len(palette)
        stroke = STROKES[2 * round_ % len(STROKES)] if round_ else ("--" if rotary else "-")
        styles.append(Look(palette[i % len(palette)], stroke, rotary))
    return styles


def figure(height: float = HEIGHT, width: float = WIDTH) -> Figure:
    """Return an empty figure, in inches.

    Raises:
        GptlabError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise GptlabError("drawing needs matplotlib; install it with: pip install 'gptlab[report]'") from None
    return Figure(figsize=(width, height), layout="constrained")


def styled(draw: Callable[Arguments, Figure]) -> Callable[Arguments, Figure]:
    """Draw in the report's style."""

    @functools.wraps(draw)
    def drawn(*arguments: Arguments.args, **options: Arguments.kwargs) -> Figure:
        figure()  # says what is missing before matplotlib is asked for
        import matplotlib

        with matplotlib.rc_context(STYLE):
            drawing = draw(*arguments, **options)
            # Arranged once: it takes longer than to draw, and each file would do it again.
            drawing.draw_without_rendering()
            drawing.set_layout_engine("none")
            return drawing

    return drawn


def powers_of_two(axis: Axis, values: Sequence[float], write: Callable[[float], str], most: int = 6) -> None:
    """Set at most so many ticks, at powers of two."""
    first, last = math.ceil(math.log2(min(values)) - 1e-9), math.floor(math.log2(max(values)) + 1e-9)
    step = max(1, math.ceil((last - first + 1) / most))
    axis.set_ticks([2.0**i for i in range(first, last + 1, step)])
    axis.set_ticks([], minor=True)
    axis.set_major_formatter(lambda value, _: write(value))


def tens(values: Sequence[float]) -> list[float]:
    """Return round places on a logarithmic axis that holds positive values: 1, 2 and 5 times powers of ten."""
    low, high = min(values), max(values)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    candidates = [n * 10.0**i for i in powers for n in (1, 2, 5)]
    within = [place for place in candidates if 0.8 * low <= place <= 1.25 * high]
    return within if len(within) <= 6 else [place for place in within if math.log10(place).is_integer()]


def title(axes: Axes, text: str) -> None:
    """Write what the vertical axis counts above it, where it takes no width."""
    axes.set_title(text, loc="left", fontsize=8.5, color=GREY, pad=7, x=0, parse_math=False)


def place_of(axes: Axes, x: float, y: float) -> tuple[float, float]:
    """Return where a point stands, as shares of the axes."""
    axes.get_xlim(), axes.get_ylim()  # the limits are set when somebody asks
    across, up = axes.transAxes.inverted().transform(axes.transData.transform((x, y)))
    return float(across), float(up)


def write_name(
    axes: Axes,
    name: str,
    colour: str,
    size: float,
    at: tuple[float, float],
    leader: tuple[tuple[float, float], tuple[float, float]],
) -> None:
    """Write a name with a thin line that leads to it; places are shares of the axes.

    Args:
        axes: where.
        name: left of ``at`` if the leader comes from the right.
        colour: of both.
        size: of the letters.
        at: where the name begins, or ends.
        leader: both ends of the line.
    """
    begin, end = leader
    dots: dict[str, Any] = {"color": colour, "linewidth": 0.7, "linestyle": (0, (1, 1.6))}
    axes.plot(*zip(begin, end, strict=True), transform=axes.transAxes, clip_on=False, **dots)
    place: dict[str, Any] = {"transform": axes.transAxes, "va": "center", "ha": "left" if end >= begin else "right"}
    axes.text(*at, name, color=colour, fontsize=size, parse_math=False, **place)


def label_ends(axes: Axes, ends: Sequence[tuple[str, str, float, float]], points: float, largest: float = 8.5) -> None:
    """Write names right of the axes, each as near to the end of its line as the others allow.

    Args:
        axes: where.
        ends: name, colour, and where the line ends.
        points: height of the axes.
        largest: size of the letters, where there is room.
    """
    size = min(largest, points / (1.25 * max(len(ends), 1)))
    placed = sorted(((place_of(axes, x, y), name, colour) for name, colour, x, y in ends), key=lambda end: end[0][1])
    heights = spread([end[1] for end, *_ in placed], 1.25 * size / points)
    for (end, name, colour), height in zip(placed, heights, strict=True):
        write_name(axes, name, colour, size, (1.04, height), (end, (1.03, height)))


def spread(heights: Sequence[float], gap: float) -> list[float]:
    """Move ascending heights apart to at least ``gap``, as little as possible in square, within 0 to 1.

    With i * gap taken from the i-th, they need only ascend: isotonic regression, by pooling adjacent violators.
    """
    pools: list[list[float]] = []
    for i, height in enumerate(heights):
        pools.append([height - i * gap])
        while len(pools) > 1 and np.mean(pools[-2]) > np.mean(pools[-1]):
            pools[-2:] = [pools[-2] + pools[-1]]
    even = [float(np.mean(pool)) for pool in pools for _ in pool]
    top = max(1 - (len(even) - 1) * gap, 0)
    return [min(max(height, 0), top) + i * gap for i, height in enumerate(even)]


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


def encode(figure: Figure, kind: str) -> bytes:
    """Return a figure as a file of one of `FORMATS`; the same figure gives the same bytes."""
    import matplotlib

    undated = {"png": {"Software": None}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}[kind]
    buffer = io.BytesIO()
    with matplotlib.rc_context(BASE):
        figure.savefig(buffer, format=kind, dpi=200, metadata=undated)
    return buffer.getvalue()


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
