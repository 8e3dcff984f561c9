"""The training of a study's variants: each run once, resumed where it was stopped, not lost to another's failure."""

from __future__ import annotations

import json
import signal
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gptlab.checkpoints.runs import is_run, run_checkpoints
from gptlab.study import stages
from gptlab.study.results import Run
from gptlab.text.shards import Dataset
from gptlab.training.curves import METRICS
from gptlab.training.loop import train
from gptlab.training.recipe import Recipe

Report = Callable[[dict[str, Any]], None]

RUNS = "runs"


class Interrupted(Exception):
    """A signal stopped the study; everything up to there is saved."""

    def __init__(self, number: signal.Signals) -> None:
        super().__init__(f"stopped by {number.name}")
        self.number = number


def with_seed(recipe: Recipe, seed: int) -> Recipe:
    """Return the recipe with another seed."""
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"seed": seed})})


def run_key(recipe: Recipe, dataset: Dataset, device: str) -> str:
    """Return the name of a run: two variants that come to the same model, by the same recipe, share it."""
    values = stages.plain(recipe)
    del values["model"], values["tokenizer"], values["data"]["corpus"]
    config = recipe.model_for(dataset.tokenizer.vocab_size).to_dict()
    # Since the mark before a document is the document's own, runs that keep documents apart give other numbers.
    marks = {"marks": 2} if recipe.data.documents else {}
    return stages.key("train", recipe=values, model=config, data=dataset.sha256, device=device, **marks)


def finished(run: Path) -> Path | None:
    """Return the last checkpoint of a run that went to its end, else None."""
    started = [row for row in _rows(run) if row["event"] == "start"]
    found = run_checkpoints(run)
    if started and found and found[-1].step == started[-1]["steps"] and found[-1].validation_loss is not None:
        return found[-1].path
    return None


def train_run(
    recipe: Recipe, seed: int, dataset: Dataset, runs: Path, *, device: str, report: Report
) -> tuple[Run, Path | None]:
    """Train a variant with a seed unless that was done before; return the run and its model's directory.

    A run that fails is recorded as such, with the reason; its directory then holds what Python said of it.

    Args:
        recipe: the variant's.
        seed: takes the place of the recipe's.
        dataset: what to train on.
        runs: the directory of all runs.
        device: as in `gptlab.training.loop.train`.
        report: called with the rows of the training.

    Raises:
        Interrupted: a signal came; the run is saved and goes on next time.
        OSError: the disk is full, or the like.
    """
    plan = with_seed(recipe, seed)
    name = run_key(plan, dataset, device)
    where, error = runs / name, None
    if finished(where) is None:
        error = attempt(
            where, lambda: train(plan, dataset, where, resume=is_run(where), device=device, report=report).stopped_by
        )
    return run_of(where, seed, error)


def attempt(where: Path, work: Callable[[], signal.Signals | None]) -> str | None:
    """Do what one run needs; return what it failed of, or None, and keep in its directory what Python said of that.

    Args:
        where: the run's directory.
        work: returns the signal that stopped it, or None.

    Raises:
        Interrupted: a signal came.
        OSError: the disk is full, or the like.
    """
    try:
        stopped = work()
        if stopped is not None:
            raise Interrupted(stopped)
    except (Interrupted, OSError):  # nor would another variant fare better
        raise
    except Exception as caught:  # whatever ails one variant, the others are trained
        where.mkdir(parents=True, exist_ok=True)
        (where / "failure.txt").write_text(traceback.format_exc(), encoding="utf-8")
        return str(caught) or type(caught).__name__
    return None


def run_of(where: Path, seed: int, error: str | None) -> tuple[Run, Path | None]:
    """Return what a run's directory tells of it, and the directory of its model; ``error`` is what it failed of."""
    model = finished(where)
    validation = _curve(where, "evaluate", "validation_loss")
    done = model is not None and error is None
    found = Run(
        seed=seed,
        status="done" if done else "failed",
        error=error,
        key=where.name,
        curve=_curve(where, "step", "loss"),
        validation_curve=validation,
        validation_loss=validation[-1][1] if done else None,
    )
    return found, model if done else None


def _curve(run: Path, event: str, figure: str) -> list[tuple[int, float]]:
    """(tokens, figure) of all rows of a kind, each step once, the last word counting; of distillation its own loss."""
    points = {row["tokens"]: row.get("cross_entropy", row[figure]) for row in _rows(run) if row["event"] == event}
    return [(tokens, points[tokens]) for tokens in sorted(points)]


def _rows(run: Path) -> list[dict[str, Any]]:
    rows = []
    path = run / METRICS
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:  # cut off when the run was killed
            continue
    return rows
