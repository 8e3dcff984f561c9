"""One model after several numbers of tokens, each the end of a run of its own with a decay of its own.

The runs share their beginning, which is trained once; see `gptlab.training.branch`.
"""

from __future__ import annotations

import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gptlab.checkpoints.runs import is_run
from gptlab.errors import GptlabError
from gptlab.progress import Report
from gptlab.study.directory import key
from gptlab.study.results import Run
from gptlab.study.runs import attempt, finished, run_of, training_of
from gptlab.text.shards import Dataset
from gptlab.training.branch import branch, decay_start, keep, of_age
from gptlab.training.loop import train
from gptlab.training.recipe import Recipe


def check_ages(name: str, recipe: Recipe, ages: Sequence[int], length: int) -> None:
    """Refuse ages that a recipe's schedule does not give, or that are too near to each other.

    Args:
        name: of the variant, for messages.
        recipe: of it.
        ages: tokens, ascending.
        length: tokens of a window.
    """
    per_step = recipe.batch.size * length
    if min(ages) < per_step or len({tokens // per_step for tokens in ages}) < len(ages):
        raise GptlabError(
            f"ages has {', '.join(f'{tokens:,}' for tokens in ages)}, of which two are as many steps of"
            f" {per_step:,} tokens, or one is none; leave it out, or lower batch.size"
        )
    for tokens in ages:
        try:
            decay_start(recipe.schedule, tokens // per_step)
        except GptlabError as error:
            raise GptlabError(f"variant {name!r} at {tokens:,} tokens is impossible: {error}") from None


def trunk_directory(recipe: Recipe, dataset: Dataset, runs: Path, device: str) -> Path:
    """Return where the common beginning of a recipe's ages is kept."""
    recipe = of_age(recipe, 1)
    config = recipe.model_for(dataset.tokenizer.vocab_size).to_dict()
    name = key("train", trunk=True, recipe=training_of(recipe), model=config, data=dataset.sha256, device=device)
    return runs / f"trunk-{name}"


def train_age(
    recipe: Recipe, dataset: Dataset, where: Path, ages: Sequence[int], length: int, *, device: str, report: Report
) -> tuple[Run, Path | None]:
    """Train a model for the tokens of its recipe unless that was done before; return the run and its directory.

    Args:
        recipe: with seed and budget, one of the ages.
        dataset: what to train on.
        where: the run's directory.
        ages: of the study.
        length: tokens of a window.
        device: as in `gptlab.training.loop.train`.
        report: called with the rows of the training.

    Raises:
        Interrupted: a signal came; the run is saved and goes on next time.
        OSError: the disk is full, or the like.
    """
    per_step, trunk = recipe.batch.size * length, trunk_directory(recipe, dataset, where.parent, device)
    own = decay_start(recipe.schedule, (recipe.budget.tokens or 0) // per_step)
    starts = {start for tokens in ages if (start := decay_start(recipe.schedule, tokens // per_step)) <= own}
    error = None
    if finished(where) is None:

        def tell(row: dict[str, Any]) -> None:
            if row["event"] == "checkpoint":
                keep(where, trunk, starts)
            report(row)

        def work() -> signal.Signals | None:
            if is_run(where):
                keep(where, trunk, starts)  # one that was saved just before the study was killed
            else:
                branch(trunk, where, recipe, dataset, own)
            resume = is_run(where)
            done = train(recipe, dataset, where, resume=resume, save_at=starts, device=device, report=tell)
            return done.stopped_by

        error = attempt(where, work)
    return run_of(where, recipe.train.seed, error)
