"""The metrics that a run writes, as curves, and their smoothing."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from gptlab.errors import GptlabError

Array = npt.NDArray[np.float64]

METRICS = "metrics.jsonl"


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
        raise GptlabError(f"{run} is not a run: it has no {METRICS}; {hint}") from None
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
        raise ValueError("not valid JSON") from None
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
        training: one value per row of ``step``: ``steps``, ``tokens``, ``hours``, ``loss`` (nats per token; with a
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
    are not finite numbers are passed over.
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
