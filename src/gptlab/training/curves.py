"""The metrics that a run writes, and the picture of several runs' curves."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from gptlab.errors import GptlabError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Array = npt.NDArray[np.float64]

METRICS = "metrics.jsonl"
FORMATS = ("png", "svg", "pdf")
AXES = ("tokens", "steps", "hours")
# Okabe and Ito (2008), *Color Universal Design*, without the yellow, which white paper swallows.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STROKES = ("-", "--", ":", "-.")
GREY = "0.35"
MARK: dict[str, Any] = {
    "linestyle": "none",
    "marker": "o",
    "markersize": 5,
    "markeredgecolor": "white",
    "markeredgewidth": 0.8,
}
UNITS = ((1e9, " (billions)"), (1e6, " (millions)"), (1e3, " (thousands)"), (1, ""))
STYLE: dict[Any, Any] = {
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


def read_metrics(run: str | Path) -> list[dict[str, Any]]:
    """Return the rows of a run's ``metrics.jsonl``, in order.

    Every row has ``event``, a string, and ``step``, a number. A last line that is damaged is left out: a run may be
    writing it, or have died doing so.

    Args:
        run: the directory of the run.

    Raises:
        GptlabError: no such file, no row in it, or a damaged line before the last.
    """
    run = Path(run)
    path = run / METRICS
    try:
        lines = path.read_bytes().splitlines()
    except (FileNotFoundError, NotADirectoryError):
        within = sorted(run.glob(f"*/{METRICS}"))
        hint = f"name one, as {within[0].parent}" if within else "name the directory that `gptlab train --out` made"
        raise GptlabError(f"{run} is no run: it has no {METRICS}; {hint}") from None
    except OSError as error:
        raise GptlabError(f"{path} cannot be read: {error.strerror}") from None
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(_row(line))
        except ValueError as error:
            if number < len(lines):
                raise GptlabError(f"{path} is damaged in line {number} ({error}); remove that line") from None
    if not rows:
        raise GptlabError(f"{path} has no row yet; wait for the run's first step")
    return rows


def _row(line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line.decode())
    except ValueError:
        raise ValueError("no valid JSON") from None
    if not isinstance(row, dict) or not isinstance(row.get("event"), str) or not math.isfinite(_number(row, "step")):
        raise ValueError("no object with 'event' and 'step'")
    return row


def _number(row: dict[str, Any], key: str) -> float:
    """Return a figure of a row; nan where it is absent or no number."""
    value = row.get(key)
    return float(value) if isinstance(value, int | float) else math.nan


class Curve(NamedTuple):
    """One run in columns, float64, nan where a row lacks the figure.

    Attributes:
        name: of the run, as the picture labels it.
        planned: steps that the run is to take, nan if unknown.
        training: one value per row of ``step``: ``steps``, ``tokens``, ``hours``, ``loss`` (nats a token; with a
            teacher the cross-entropy, so that all runs can be compared), ``learning_rate`` and ``tokens_per_second``.
        validation: one value per row of ``evaluate``: ``steps``, ``tokens``, ``hours`` and ``loss``.
    """

    name: str
    planned: float
    training: dict[str, Array]
    validation: dict[str, Array]


def read_curve(run: str | Path, name: str | None = None) -> Curve:
    """Read a run's curve; raises what `read_metrics` raises."""
    rows = [{**row, "loss": row.get("cross_entropy", row.get("loss"))} for row in read_metrics(run)]
    starts = [row for row in rows if row["event"] == "start"]
    per_step = _number(starts[-1], "tokens_per_step") if starts else math.nan
    hours = _hours(rows)

    def columns(event: str, **keys: str) -> dict[str, Array]:
        own = [i for i, row in enumerate(rows) if row["event"] == event]
        values = {column: np.array([_number(rows[i], key) for i in own]) for column, key in keys.items()}
        steps = np.array([_number(rows[i], "step") for i in own])
        tokens = np.array([_number(rows[i], "tokens") for i in own])
        tokens = np.where(np.isnan(tokens), steps * per_step, tokens)
        return {"steps": steps, "tokens": tokens, "hours": np.array([hours[i] for i in own]), **values}

    return Curve(
        name or Path(run).name,
        _number(starts[-1], "steps") if starts else math.nan,
        columns("step", loss="loss", learning_rate="learning_rate", tokens_per_second="tokens_per_second"),
        columns("evaluate", loss="validation_loss"),
    )


def _hours(rows: Iterable[dict[str, Any]]) -> list[float]:
    """Return each row's training time in hours, which goes on where a resumed run's clock began again at zero."""
    hours, resumed, before, last = [], False, 0.0, 0.0
    for row in rows:
        resumed = resumed or row["event"] == "start"
        seconds = _number(row, "seconds")
        if not math.isnan(seconds):
            if resumed and before + seconds < last:
                before = last
            resumed, last = False, before + seconds
        hours.append((before + seconds) / 3600)
    return hours


class Smoothed:
    """Running average of values that come at uneven steps: one that came n steps ago weighs exp(-n / span).

    At even steps this is the exponential average with Adam's correction of its bias (Kingma & Ba 2015). Values that
    are no finite numbers are passed over.
    """

    def __init__(self, span: float) -> None:
        self.span = span
        self.step = self.total = self.weight = 0.0

    def update(self, step: float, value: float) -> float:
        """Take the value of a step; return the average up to it, nan while there is none."""
        if math.isfinite(value):
            faded = math.exp(-abs(step - self.step) / self.span)
            self.total = self.total * faded + value
            self.weight = self.weight * faded + 1
            self.step = step
        return self.total / self.weight if self.weight else math.nan


def smooth(steps: Array, values: Array, span: float) -> Array:
    """Return the average of ``values`` (n,) around each of ``steps`` (n,), weighted by exp(-distance / span).

    Both sides count, so that the average does not trail behind a falling loss. It is nan where the value is.
    """

    def sums(order: slice) -> tuple[Array, Array]:
        average, rows = Smoothed(span), []
        for step, value in zip(steps[order], values[order], strict=True):
            average.update(step, value)
            rows.append((average.total, average.weight))
        totals, weights = np.array(rows).reshape(-1, 2)[order].T
        return totals, weights

    (past, past_weight), (future, future_weight) = sums(slice(None)), sums(slice(None, None, -1))
    # Both sums hold the value itself, with weight 1.
    known = np.where(np.isfinite(values), values, np.nan)
    return (past + future - known) / (past_weight + future_weight - 1)


def draw(curves: Sequence[Curve], x: str = "tokens", span: float | None = None) -> Figure:
    """Draw the curves of several runs: loss above, learning rate below, each run labelled at its end.

    Args:
        curves: the runs; those without a measured step are left out.
        x: the horizontal axis, one of `AXES`.
        span: steps that the smoothing of the training loss reaches, 0 for none; else a fiftieth of the longest run.

    Raises:
        GptlabError: matplotlib is missing, there is nothing to draw, or a run does not record ``x``.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise GptlabError("drawing needs matplotlib; install it with: pip install 'gptlab[report]'") from None

    curves = [curve for curve in curves if np.isfinite(curve.training["loss"]).any()]
    if not curves:
        raise GptlabError("there is nothing to draw: no run has a measured step yet; wait for the first")
    for curve in curves:
        if not (np.isfinite(curve.training[x]) & np.isfinite(curve.training["loss"])).any():
            raise GptlabError(f"the run {curve.name} does not record its {x}; choose another --x, as steps")
    if span is None:
        span = max(1, round(max(curve.training["steps"].max() for curve in curves) / 50))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 4.6), layout="constrained")
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
        rates = [np.stack([curve.training[x], curve.training["learning_rate"]]) for curve in curves]
        longest = max(rates, key=np.size)
        same = len(rates) > 1 and all(np.array_equal(rate, longest[:, : rate.shape[1]]) for rate in rates)
        ends = []
        for i, curve in enumerate(curves):
            stroke: dict[str, Any] = {
                "color": COLOURS[i % len(COLOURS)],
                "linestyle": STROKES[i // len(COLOURS) % len(STROKES)],
            }
            ends.append((curve.name, *_draw_losses(upper, curve, x, span, stroke), stroke["color"]))
            lower.plot(*rates[i], **{**stroke, "color": GREY} if same else stroke, linewidth=1.2)
        _scale(upper, lower, curves, x)
        lower.set_ylabel("learning rate\n(all runs)" if same else "learning rate")
        figure.align_ylabels()
        _legend(upper, span, any(len(curve.validation["loss"]) for curve in curves))
        _label(figure, upper, ends)
    return figure


def _draw_losses(axes: Axes, curve: Curve, x: str, span: float, stroke: dict[str, Any]) -> tuple[float, float]:
    """Draw one run's losses; return where its main line ends."""
    across, loss = curve.training[x], curve.training["loss"]
    if span > 0:
        axes.plot(across, loss, color=stroke["color"], linewidth=0.6, alpha=0.3, zorder=2)
        loss = smooth(curve.training["steps"], loss, span)
    axes.plot(across, loss, **stroke, linewidth=1.5, zorder=3)
    axes.plot(curve.validation[x], curve.validation["loss"], color=stroke["color"], **MARK, zorder=4)
    last = np.flatnonzero(np.isfinite(across) & np.isfinite(loss))[-1]
    return across[last], loss[last]


def _scale(upper: Axes, lower: Axes, curves: Sequence[Curve], x: str) -> None:
    """Limit and name the axes. The first tenth may leave the picture at the top: its descent would flatten the rest."""
    training = [_finite(curve.training["loss"]) for curve in curves]
    seen = np.concatenate([*training, *(_finite(curve.validation["loss"]) for curve in curves)])
    low, high = seen.min(), max(np.quantile(loss, 0.9 if len(loss) >= 50 else 1) for loss in training)
    if high > low:
        upper.set_ylim(low - 0.04 * (high - low), high + 0.04 * (high - low))
    furthest = _finite(np.concatenate([curve.training[x] for curve in curves])).max()
    if furthest > 0:
        upper.set_xlim(0, 1.01 * furthest)
    size, unit = 1.0, ""
    if x == "hours":
        size, unit = (1, " (hours)") if furthest >= 0.5 else (1 / 60, " (minutes)")
    elif x == "tokens":
        size, unit = next((n, name) for n, name in UNITS if furthest >= n or n == 1)
    lower.xaxis.set_major_formatter(lambda value, _: f"{value / size:,.6g}")
    lower.set_xlabel({"tokens": "training tokens", "steps": "optimizer steps", "hours": "training time"}[x] + unit)
    upper.set_ylabel("loss (nats per token)")
    lower.set_ylim(bottom=0)
    lower.ticklabel_format(axis="y", style="sci", scilimits=(0, 0), useMathText=True)


def _finite(values: Array) -> Array:
    return values[np.isfinite(values)]


def _legend(axes: Axes, span: float, validation: bool) -> None:
    """Say once, in grey, what the kinds of line are; the runs have their names beside them."""
    from matplotlib.lines import Line2D

    average = f"smoothed over {span:,.6g} steps"
    raw = [Line2D([], [], color=GREY, linewidth=0.6, alpha=0.6, label="training loss as logged")]
    main = [Line2D([], [], color=GREY, linewidth=1.5, label=average if span > 0 else "training loss")]
    marks = [Line2D([], [], color=GREY, **MARK, label="validation loss")]
    handles = (raw if span > 0 else []) + main + (marks if validation else [])
    above = {"bbox_to_anchor": (0, 1), "borderaxespad": 0.3, "ncols": 3, "fontsize": 8}
    axes.legend(handles=handles, loc="lower left", frameon=False, **above)


def _label(figure: Figure, axes: Axes, ends: Sequence[tuple[str, float, float, str]]) -> None:
    """Write each run's name right of the axes, as near to the end of its line as the other names allow."""
    figure.draw_without_rendering()  # the height of the axes is known afterwards
    low, high = axes.get_ylim()
    points = axes.get_position().height * figure.get_figheight() * 72
    size = min(9.0, points / (1.3 * len(ends)))
    ends = sorted(ends, key=lambda end: end[2])
    heights = spread([(loss - low) / (high - low) for _, _, loss, _ in ends], 1.3 * size / points)
    for (name, across, loss, colour), height in zip(ends, heights, strict=True):
        axes.annotate(
            name,
            (across, loss),
            (1.025, height),
            textcoords="axes fraction",
            va="center",
            color=colour,
            fontsize=size,
            parse_math=False,
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": colour,
                "linewidth": 0.7,
                "linestyle": ":",
                "shrinkA": 1,
                "shrinkB": 0,
                "relpos": (0, 0.5),
            },
        )


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


def encode(figure: Figure, kind: str) -> bytes:
    """Return a figure as a file of one of `FORMATS`; the same figure gives the same bytes."""
    import matplotlib

    undated = {"png": {"Software": None}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}[kind]
    buffer = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(buffer, format=kind, dpi=200, metadata=undated)
    return buffer.getvalue()
