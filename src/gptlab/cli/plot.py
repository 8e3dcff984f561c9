"""`gptlab plot`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from gptlab.training.curves import Curve

HEADINGS = ("run", "steps", "tokens", "best validation loss", "tokens/s")


def plot(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN", help="Directories that `gptlab train` wrote.")],
    out: Annotated[
        Path | None, typer.Option(help="The picture: .png, .svg or .pdf; else curves.png in the runs' common parent.")
    ] = None,
    x: Annotated[str, typer.Option("--x", help="Horizontal axis: tokens, steps or hours.")] = "tokens",
    smooth: Annotated[
        float | None,
        typer.Option(help="Steps that smoothing reaches, 0 for none; else a fiftieth."),
    ] = None,
) -> None:
    """Draw the losses and learning rates of runs, finished or under way, and print a table of them."""
    from gptlab.errors import GptlabError, nearest
    from gptlab.plotting import curves
    from gptlab.plotting.style import FORMATS, encode
    from gptlab.training.curves import read_curve

    if x not in curves.AXES:
        raise GptlabError(f"no axis {x!r}{nearest(x, curves.AXES)}; --x takes {', '.join(curves.AXES)}")
    if smooth is not None and not 0 <= smooth < float("inf"):
        raise GptlabError(f"--smooth must be a number of steps, 0 or more, got {smooth}")
    runs = _directories(runs)
    out = out or _common_parent(runs) / "curves.png"
    kind = out.suffix.lower().removeprefix(".")
    if kind not in FORMATS:
        raise GptlabError(f"--out {out} has no ending that tells how to draw; end it in .png, .svg or .pdf")
    read = [read_curve(run, name) for run, name in zip(runs, _names(runs), strict=True)]
    figure = curves.draw(read, x, smooth)

    from gptlab.checkpoints.files import write_files

    write_files(out.parent, {out.name: encode(figure, kind)})
    print(_table([HEADINGS, *map(_row, read)]))
    print(f"drawn: {out}")


def _directories(runs: list[Path]) -> list[Path]:
    """Return each run once, without the pictures that `runs/*` finds beside them."""
    from gptlab.errors import GptlabError
    from gptlab.plotting.style import FORMATS
    from gptlab.training.curves import METRICS

    named = [run.parent if run.name == METRICS else run for run in runs]
    pictures = {f".{kind}" for kind in FORMATS}
    chosen = {os.path.abspath(run): run for run in named if run.suffix not in pictures or run.is_dir()}
    if not chosen:
        raise GptlabError(f"{runs[0]} is a picture; name the directory of a run")
    return list(chosen.values())


def _names(runs: list[Path]) -> list[str]:
    """Return the shortest ends of the runs' paths that tell them apart."""
    parts = [Path(os.path.abspath(run)).parts for run in runs]
    for length in range(1, max(map(len, parts))):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            break
    # A file name need not be Unicode, a label must be.
    return [os.fsencode(name).decode(errors="replace") for name in names]


def _common_parent(runs: list[Path]) -> Path:
    """Return the deepest directory that holds all runs; of one run, that is the run."""
    first, *others = (Path(os.path.abspath(run)) for run in runs)
    return next((up for up in (first, *first.parents) if all(run.is_relative_to(up) for run in others)), first)


def _row(curve: Curve) -> tuple[str, ...]:
    import numpy as np

    steps, tokens, rates = (curve.training[key] for key in ("steps", "tokens", "tokens_per_second"))
    planned = "" if np.isnan(curve.planned) else f" of {curve.planned:,.0f}"
    losses = curve.validation["loss"]
    best = "none yet"
    if np.isfinite(losses).any():
        i = np.nanargmin(np.where(np.isfinite(losses), losses, np.nan))
        best = f"{losses[i]:.4f} at step {curve.validation['steps'][i]:,.0f}"
    return (
        curve.name,
        f"{steps[-1] if len(steps) else 0:,.0f}{planned}",
        f"{tokens[-1]:,.0f}" if np.isfinite(tokens[-1:]).any() else "-",
        best,
        f"{np.nanmedian(rates):,.0f}" if np.isfinite(rates).any() else "-",
    )


def _table(rows: list[tuple[str, ...]]) -> str:
    """Align the columns: names to the left, figures to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for name, *cells in rows:
        figures = (cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True))
        lines.append("  ".join([name.ljust(widths[0]), *figures]))
    return "\n".join(lines)
