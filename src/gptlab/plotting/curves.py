"""The picture of several runs' training curves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from gptlab.errors import GptlabError
from gptlab.plotting.style import BASE, COLOURS, STROKES, figure, label_ends
from gptlab.training.curves import Array, Curve, smooth

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

AXES = ("tokens", "steps", "hours")
GREY = "0.35"
MARK: dict[str, Any] = {
    "linestyle": "none",
    "marker": "o",
    "markersize": 5,
    "markeredgecolor": "white",
    "markeredgewidth": 0.8,
}
UNITS = ((1e9, " (billions)"), (1e6, " (millions)"), (1e3, " (thousands)"), (1, ""))
WIDTH, ROOM = 7.2, 1.4  # inches: of the picture, and of the longest name that fits beside the plot


def draw(curves: Sequence[Curve], x: str = "tokens", span: float | None = None) -> Figure:
    """Draw the curves of several runs: loss above, learning rate below, each run labelled at its end.

    Args:
        curves: the runs; those without a measured step are left out.
        x: the horizontal axis, one of `AXES`.
        span: steps that the smoothing of the training loss reaches, 0 for none; else a fiftieth of the longest run.

    Raises:
        GptlabError: matplotlib is missing, there is nothing to draw, or a run does not record ``x``.
    """
    curves = [curve for curve in curves if np.isfinite(curve.training["loss"]).any()]
    if not curves:
        raise GptlabError("there is nothing to draw: no run has a measured step yet; wait for the first")
    for curve in curves:
        if not (np.isfinite(curve.training[x]) & np.isfinite(curve.training["loss"])).any():
            raise GptlabError(f"the run {curve.name} does not record its {x}; choose another --x, as steps")
    if span is None:
        span = max(1, round(max(curve.training["steps"].max() for curve in curves) / 50))
    figure()  # says what is missing before matplotlib is asked for
    import matplotlib

    with matplotlib.rc_context(BASE):
        return _draw(curves, x, span)


def _draw(curves: Sequence[Curve], x: str, span: float) -> Figure:
    drawing = figure(4.6, WIDTH)
    upper, lower = drawing.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    rates = [np.stack([curve.training[x], curve.training["learning_rate"]]) for curve in curves]
    longest = max(rates, key=np.size)
    same = len(rates) > 1 and all(np.array_equal(rate, longest[:, : rate.shape[1]]) for rate in rates)
    ends = []
    for i, curve in enumerate(curves):
        colour = COLOURS[i % len(COLOURS)]
        stroke = {"color": colour, "linestyle": STROKES[i // len(COLOURS) % len(STROKES)]}
        ends.append((curve.name, colour, *_draw_losses(upper, curve, x, span, stroke)))
        lower.plot(*rates[i], **{**stroke, "color": GREY} if same else stroke, linewidth=1.2)
    _scale(upper, lower, curves, x)
    lower.set_ylabel("learning rate\n(all runs)" if same else "learning rate")
    drawing.align_ylabels()
    _legend(upper, span, any(len(curve.validation["loss"]) for curve in curves))
    drawing.draw_without_rendering()  # the height of the axes is known afterwards
    label_ends(upper, ends, upper.get_position().height * drawing.get_figheight() * 72, 9)
    # A longer name widens the picture; it takes nothing from the plot.
    longest_name = max(text.get_window_extent().width for text in upper.texts) / drawing.dpi
    drawing.set_figwidth(WIDTH + max(0, longest_name - ROOM))
    return drawing


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
