"""Several budgets from one run: where the learning rate is constant, the shorter run is the beginning of the longer.

With the schedule ``wsd`` the rate is the same until the last part of a run, and so is everything else: a step depends
on the seed, its number and the rate. A run of one budget can go on from where a run of another one was before its decay
began, and comes to the same weights, bit for bit, as if it had been trained from the start (Hu et al. 2024, *MiniCPM*).
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Collection
from pathlib import Path

from gptlab.checkpoints.files import write_files
from gptlab.checkpoints.runs import run_checkpoints
from gptlab.errors import GptlabError
from gptlab.text.shards import Dataset
from gptlab.training import metrics, state
from gptlab.training.begin import about_run
from gptlab.training.curves import METRICS
from gptlab.training.optimizer import learning_rate_share
from gptlab.training.recipe import Recipe
from gptlab.training.settings import BudgetSettings, ScheduleSettings

_OWN = ("format", "version", "model_sha256")
"""What `training.json` has beside the facts of a run."""


def of_age(recipe: Recipe, tokens: int) -> Recipe:
    """Return the recipe of a run of so many tokens."""
    return recipe.model_copy(update={"budget": BudgetSettings(tokens=tokens)})


def decay_start(schedule: ScheduleSettings, steps: int) -> int:
    """Return the steps of a run before its learning rate first falls; up to there all budgets have the same.

    Raises:
        GptlabError: a schedule without a constant part, or a run that is over before its warm-up.
    """
    if schedule.kind == "cosine":
        raise GptlabError("several budgets from one run need schedule.kind=wsd: cosine falls from the start")
    first = schedule.warmup_steps
    if first >= steps:
        raise GptlabError(
            f"a run of {steps:,} steps is over before its warm-up of {first:,} is; lower schedule.warmup_steps"
        )
    constant = learning_rate_share(schedule, first, steps)
    fallen = (step for step in range(first, steps) if learning_rate_share(schedule, step, steps) != constant)
    return next(fallen, steps)


def keep(run: Path, trunk: Path, steps: Collection[int]) -> None:
    """Keep those checkpoints of a run from which others may branch off, whole and with the rows up to them."""
    for checkpoint in run_checkpoints(run):
        kept = trunk / checkpoint.path.name
        if checkpoint.step not in steps or kept.exists():
            continue
        partial = trunk / f".{kept.name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for file in checkpoint.path.iterdir():
            os.link(file, partial / file.name)
        shutil.copyfile(run / METRICS, partial / METRICS)
        metrics.cut(partial, checkpoint.step)
        os.replace(partial, kept)


def branch(trunk: Path, run: Path, recipe: Recipe, dataset: Dataset, most: int) -> int:
    """Begin a run where another one of the same recipe, but for its budget, left off; return the step.

    Args:
        trunk: what `keep` kept.
        run: the directory of the new run, which appears as a whole.
        recipe: of the new run.
        dataset: of both.
        most: steps before the new run's rate falls; what was kept after more of them is none of its past.

    Returns:
        The step from which ``train(..., resume=True)`` goes on; 0 where nothing was kept, and no run was begun.
    """
    steps = sorted(int(path.name.removeprefix("step-")) for path in trunk.glob("step-*"))
    step = max((step for step in steps if step <= most), default=0)
    if not step:
        return 0
    source = trunk / f"step-{step:06d}"
    checkpoint, memory, facts = state.read_checkpoint(source)
    partial = run.with_name(f".{run.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    facts = {name: value for name, value in facts.items() if name not in _OWN}
    facts["recipe"] = recipe.model_dump(mode="json")
    state.write_checkpoint(
        partial, checkpoint.config, dataset.tokenizer, checkpoint.state, memory, facts, recipe.train.keep_last
    )
    about = json.dumps(about_run(recipe, dataset), indent=2).encode() + b"\n"
    write_files(partial, {METRICS: (source / METRICS).read_bytes(), "run.json": about})
    os.replace(partial, run)
    return step
