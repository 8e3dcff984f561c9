"""The making of variants out of the base: converted, then trained on with looks at the model on the way.

A conversion lies below ``converted/``, a run below ``runs/`` as any other. The models to look at are kept in its
``looks/``, since the run itself keeps its last checkpoints only.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import gptlab
from gptlab.checkpoints.files import write_files
from gptlab.checkpoints.runs import is_run, run_checkpoints
from gptlab.conversion.calibration import (
    DEFAULT_TEXT,
    TOKENS,
    TOKENS_PER_CHANNEL,
    calibration_rows,
    default_tokens,
)
from gptlab.conversion.changes import Changes
from gptlab.conversion.convert import convert
from gptlab.language_model import LanguageModel
from gptlab.study import stages
from gptlab.study.conversions import BASE
from gptlab.study.results import Run
from gptlab.study.runs import attempt, finished, run_of
from gptlab.text.shards import Dataset
from gptlab.training.loop import train
from gptlab.training.recipe import Recipe

Report = Callable[[dict[str, Any]], None]

CONVERTED, LOOKS, DONE = "converted", "looks", "conversion.json"


@dataclass(frozen=True)
class Source:
    """A base that is converted.

    Attributes:
        model: where it lies.
        key: what it is known by: that of its run, or of its weights.
    """

    model: str | Path
    key: str


def conversion_key(changes: Changes, source: Source, dataset: Dataset | None) -> str:
    """Return the name of a conversion: of the source, what is changed, and the text that it is fitted on."""
    text = DEFAULT_TEXT if dataset is None else dataset.sha256
    return stages.key(
        "convert", source=source.key, changes=changes.to_dict(), text=text, tokens=[TOKENS, TOKENS_PER_CHANNEL]
    )


def convert_base(changes: Changes, source: Source, dataset: Dataset | None, out: Path) -> str | Path:
    """Convert a base unless that was done before; return the directory of the model.

    Args:
        changes: what to convert it into; where nothing is changed, the base itself is returned.
        source: the base.
        dataset: its training data are the calibration text; None takes `DEFAULT_TEXT`.
        out: the study's directory.
    """
    if changes == Changes():
        return source.model
    where = out / CONVERTED / conversion_key(changes, source, dataset)
    if not (where / DONE).exists():
        lm = gptlab.load(source.model)
        n_tokens, length = default_tokens(lm.config.n_embd), lm.config.context_length
        if dataset is None:
            rows = calibration_rows(lm.needs_tokenizer(), length, n_tokens)
        else:
            rows = _spread(dataset, length, n_tokens)
        made = convert(lm.model, changes, rows)
        gptlab.save(LanguageModel(made.model, lm.tokenizer), where)
        content = {"changes": changes.to_dict(), "steps": [step.change for step in made.steps]}
        write_files(where, {DONE: json.dumps(content).encode() + b"\n"})
    return where


def steps_of(converted: str | Path) -> list[str]:
    """Return the steps in which a model was converted; none where it is the base itself."""
    path = Path(converted) / DONE
    if not path.exists():
        return []
    found: list[str] = json.loads(path.read_text(encoding="utf-8")).get("steps", [])
    return found


def _spread(dataset: Dataset, length: int, n_tokens: int) -> list[Tensor]:
    """Rows of ``length`` tokens, spread evenly over the training data, all of them where there are few."""
    there = max(dataset.training.n_tokens // length, 1)
    wanted = min(math.ceil(n_tokens / length), there)
    starts = [i * there // wanted * length for i in range(wanted)]
    return [torch.from_numpy(dataset.training.read(start, start + length).astype("int64")) for start in starts]


def uptrain_key(
    changes: Changes, plan: Recipe, steps: Sequence[int], source: Source, dataset: Dataset, device: str
) -> str:
    """Return the name of a run that trains a conversion on."""
    values = stages.plain(plan)
    del values["model"], values["tokenizer"], values["data"]["corpus"]
    converted = conversion_key(changes, source, dataset)
    what = {"recipe": values, "converted": converted, "looks": list(steps), "data": dataset.sha256, "device": device}
    return stages.key("train", **what)


def looks(where: Path, steps: Sequence[int]) -> dict[int, Path] | None:
    """Return the models that a run was to be looked at, by step; None where it has not come to its end."""
    last = finished(where)
    found = {step: where / LOOKS / f"step-{step:06d}" for step in steps[:-1]}
    if last is None or not all(path.is_dir() for path in found.values()):
        return None
    return {**found, steps[-1]: last}


def uptrain(
    converted: str | Path,
    source: Source,
    plan: Recipe,
    steps: Sequence[int],
    dataset: Dataset,
    where: Path,
    *,
    device: str,
    report: Report,
) -> tuple[Run, dict[int, Path]]:
    """Train a conversion on unless that was done before; return the run, and the models to look at by step.

    Args:
        converted: directory of the model to go on from.
        source: what it was converted from, which may be its teacher.
        plan: the recipe, with seed and budget.
        steps: after which to look at the model, ascending; the last is the run's own.
        dataset: what to train on.
        where: the run's directory.
        device: as in `gptlab.training.loop.train`.
        report: called with the rows of the training.

    Raises:
        Interrupted: a signal came; the run is saved and goes on next time.
        OSError: the disk is full, or the like.
    """
    error = None
    if looks(where, steps) is None:
        if finished(where) is not None:  # a look is missing that the run no longer can give
            shutil.rmtree(where)
        often = plan.train.model_copy(update={"save_every": math.gcd(*steps), "keep_last": 1})
        recipe = _taught(plan.model_copy(update={"train": often}), source)

        def tell(row: dict[str, Any]) -> None:
            if row["event"] == "checkpoint":
                _keep(where, steps)
            report(row)

        def work() -> signal.Signals | None:
            _keep(where, steps)  # one that was saved just before the study was killed
            base = gptlab.load(converted)
            return train(recipe, dataset, where, base=base, resume=is_run(where), device=device, report=tell).stopped_by

        error = attempt(where, work)
    run, _ = run_of(where, plan.train.seed, error)
    return run, (looks(where, steps) or {}) if run["status"] == "done" else {}


def _taught(recipe: Recipe, source: Source) -> Recipe:
    """The recipe with the base's place for its name, where the base is the teacher."""
    distill = getattr(recipe, "distill", None)
    if distill is None or distill.teacher != BASE:
        return recipe
    return recipe.model_copy(update={"distill": distill.model_copy(update={"teacher": str(source.model)})})


def _keep(where: Path, steps: Sequence[int]) -> None:
    """Keep the models of those checkpoints that are to be looked at."""
    for checkpoint in run_checkpoints(where):
        kept = where / LOOKS / checkpoint.path.name
        if checkpoint.step not in steps[:-1] or kept.exists():
            continue
        partial = kept.with_name(f".{kept.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for file in checkpoint.path.iterdir():
            if not file.name.startswith("training."):
                os.link(file, partial / file.name)
        os.replace(partial, kept)
