"""The training of one model for a study: done once, resumed where it was stopped, its failure not the study's."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gptlab
from gptlab.checkpoints.runs import is_run, run_checkpoints
from gptlab.progress import Report
from gptlab.study.directory import key, plain
from gptlab.study.results import Run
from gptlab.study.uptraining import BASE
from gptlab.text.shards import Dataset
from gptlab.training.curves import METRICS
from gptlab.training.loop import train
from gptlab.training.recipe import Recipe

KEPT = "kept"
"""Directory of a run for the models at its milestones: the run itself keeps its last checkpoints only."""


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
    config = recipe.model_for(dataset.tokenizer.vocab_size).to_dict()
    return key("train", recipe=training_of(recipe), model=config, data=dataset.sha256, device=device)


def uptrain_key(recipe: Recipe, converted: str, steps: Sequence[int], dataset: Dataset, device: str) -> str:
    """Return the name of a run that uptrains the conversion of a key."""
    parts = {"converted": converted, "steps": list(steps), "data": dataset.sha256, "device": device}
    return key("train", recipe=training_of(recipe), **parts)


def training_of(recipe: Recipe) -> dict[str, Any]:
    """What a recipe says of training; model, tokenizer and data have keys of their own."""
    values = plain(recipe)
    del values["model"], values["tokenizer"], values["data"]["corpus"]
    return values


def finished(where: Path) -> Path | None:
    """Return the last checkpoint of a run that went to its end, else None."""
    started = [row for row in _rows(where) if row["event"] == "start"]
    checkpoints = run_checkpoints(where)
    if started and checkpoints:
        last = checkpoints[-1]
        if last.step == started[-1]["steps"] and last.validation_loss is not None:
            return last.path
    return None


def train_run(recipe: Recipe, dataset: Dataset, where: Path, *, device: str, report: Report) -> tuple[Run, Path | None]:
    """Train a model unless that was done before; return the run and the model's directory.

    A run that fails is recorded as such, with the reason; its directory then holds Python's traceback.

    Args:
        recipe: with its seed.
        dataset: what to train on.
        where: the run's directory.
        device: as in `gptlab.training.loop.train`.
        report: called with the rows of the training.

    Raises:
        Interrupted: a signal came; the run is saved and goes on next time.
        OSError: the disk is full, or the like.
    """
    error = None
    if finished(where) is None:

        def work() -> signal.Signals | None:
            return train(recipe, dataset, where, resume=is_run(where), device=device, report=report).stopped_by

        error = attempt(where, work)
    return run_of(where, recipe.train.seed, error)


def uptrain_run(
    converted: str | Path,
    teacher: str | Path,
    recipe: Recipe,
    steps: Sequence[int],
    dataset: Dataset,
    where: Path,
    *,
    device: str,
    report: Report,
) -> tuple[Run, dict[int, Path]]:
    """Uptrain a conversion unless that was done before; return the run, and its models by step.

    Args:
        converted: the model to continue from.
        teacher: what it was converted from, its teacher where the recipe says so.
        recipe: with seed and budget.
        steps: after which to keep the model, ascending; the last is the run's own.
        dataset: what to train on.
        where: the run's directory.
        device: as in `gptlab.training.loop.train`.
        report: called with the rows of the training.

    Raises:
        Interrupted: a signal came; the run is saved and goes on next time.
        OSError: the disk is full, or the like.
    """
    error = None
    if kept(where, steps) is None:
        if finished(where) is not None:  # a model is missing that the run no longer can give
            shutil.rmtree(where)
        often = recipe.train.model_copy(update={"save_every": math.gcd(*steps), "keep_last": 1})
        taught = _with_teacher(recipe.model_copy(update={"train": often}), teacher)

        def tell(row: dict[str, Any]) -> None:
            if row["event"] == "checkpoint":
                _keep(where, steps)
            report(row)

        def work() -> signal.Signals | None:
            _keep(where, steps)  # one that was saved just before the study was killed
            base = gptlab.load(converted, dtype="float32")
            return train(taught, dataset, where, base=base, resume=is_run(where), device=device, report=tell).stopped_by

        error = attempt(where, work)
    run, _ = run_of(where, recipe.train.seed, error)
    return run, (kept(where, steps) or {}) if run.status == "done" else {}


def kept(where: Path, steps: Sequence[int]) -> dict[int, Path] | None:
    """Return the models that a run was to keep, by step; None where it has not come to its end."""
    last = finished(where)
    models = {step: where / KEPT / f"step-{step:06d}" for step in steps[:-1]}
    if last is None or not all(path.is_dir() for path in models.values()):
        return None
    return {**models, steps[-1]: last}


def _keep(where: Path, steps: Sequence[int]) -> None:
    """Keep the models of those checkpoints that are to be evaluated."""
    for checkpoint in run_checkpoints(where):
        copy = where / KEPT / checkpoint.path.name
        if checkpoint.step not in steps[:-1] or copy.exists():
            continue
        partial = copy.with_name(f".{copy.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for file in checkpoint.path.iterdir():
            if not file.name.startswith("training."):
                os.link(file, partial / file.name)
        os.replace(partial, copy)


def _with_teacher(recipe: Recipe, teacher: str | Path) -> Recipe:
    """The recipe with the base's place for its name, where the base is the teacher."""
    if recipe.distill is None or recipe.distill.teacher != BASE:
        return recipe
    return recipe.model_copy(update={"distill": recipe.distill.model_copy(update={"teacher": str(teacher)})})


def attempt(where: Path, work: Callable[[], signal.Signals | None]) -> str | None:
    """Do what one run needs; return why it failed, or None, and keep Python's traceback in its directory.

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
    """Return what a run's directory says of it, and the directory of its model; ``error`` is why it failed."""
    model = finished(where)
    validation = _curve(where, "evaluate", "validation_loss")
    done = model is not None and error is None
    run = Run(
        seed=seed,
        status="done" if done else "failed",
        error=error,
        key=where.name,
        curve=_curve(where, "step", "loss"),
        validation_curve=validation,
        validation_loss=validation[-1][1] if done else None,
    )
    return run, model if done else None


def _curve(where: Path, event: str, figure: str) -> list[tuple[int, float]]:
    """(tokens, figure) of all rows of a kind, the last row of a step counting; of distillation its cross-entropy."""
    points = {row["tokens"]: row.get("cross_entropy", row[figure]) for row in _rows(where) if row["event"] == event}
    return [(tokens, points[tokens]) for tokens in sorted(points)]


def _rows(where: Path) -> list[dict[str, Any]]:
    rows = []
    path = where / METRICS
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:  # cut off when the run was killed
            continue
    return rows
