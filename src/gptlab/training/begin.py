"""How a run begins, or goes on: what is written of it, and what must be as it was."""

from __future__ import annotations

import dataclasses
import json
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import gptlab
from gptlab.checkpoints import Checkpoint
from gptlab.checkpoints.files import write_files
from gptlab.checkpoints.runs import is_run, read_run
from gptlab.conversion.context import rescale
from gptlab.errors import GptlabError
from gptlab.language_model import LanguageModel
from gptlab.model.gpt import GPT
from gptlab.text.shards import Dataset
from gptlab.text.tokenizers import Tokenizer
from gptlab.training import state
from gptlab.training.distill import Teacher
from gptlab.training.parallel import Group
from gptlab.training.recipe import Recipe, differences, make_recipe
from gptlab.training.schedules import check_schedules

FREE = (
    "batch.micro",
    "train.recompute",
    "train.compile",
    "train.keep_last",
    "train.save_every",
    "parallel",
    "distill.teacher",
)
"""Settings that a resumed run may change. They change its numbers by rounding, and which values dropout drops. The
teacher may have moved; its weights are compared."""


def first_model(recipe: Recipe, dataset: Dataset, base: LanguageModel | None) -> GPT:
    """Return the model of a new run: the base, or one with random weights.

    Raises:
        GptlabError: the base, the data and the recipe do not fit together.
    """
    if base is not None:
        if base.tokenizer is not None and base.tokenizer.sha256 != dataset.tokenizer.sha256:
            raise GptlabError(
                f"the data {dataset.name} was prepared with a tokenizer other than that of {recipe.base}; prepare"
                f" it again with --tokenizer {recipe.base}"
            )
        known, needed = base.config.vocab_size, _ids_in_texts(dataset.tokenizer)
        if needed > known:
            raise GptlabError(
                f"{recipe.base} knows {known:,} ids, the tokenizer of the data {dataset.name} has {needed:,}; prepare"
                " the data with the tokenizer that the model was trained with"
            )
        check_schedules(recipe, base.config)
        rope = base.config.rope
        whole = not recipe.data.items and recipe.length(base.config) == base.config.context_length
        if rope is not None and rope.scaling is None and rope.trained_length is not None and whole:
            # From here on it is trained on texts as long as its context. A scaling is worked out from the length that
            # it was made for, which stays.
            return rescale(base.model, dataclasses.replace(rope, trained_length=None)).float()
        return base.model.float()
    config = recipe.model_for(dataset.tokenizer.vocab_size)
    check_schedules(recipe, config)
    return GPT(config, recipe.train.seed)


def check_teacher(run: Path, teacher: Teacher, resume: bool) -> None:
    """Refuse to go on with a run that had another teacher."""
    before = json.loads((run / "run.json").read_text(encoding="utf-8")).get("teacher", {}) if resume else teacher.about
    if before.get("sha256") != teacher.about["sha256"]:
        raise GptlabError(
            f"the teacher {teacher.about['name']} is not the one that the run {run} began with: its weights differ;"
            " restore them, name the right one with --set distill.teacher=..., or start a new run"
        )


def begin(run: Path, recipe: Recipe, dataset: Dataset, group: Group, teacher: Teacher | None) -> None:
    """Write what defines the run; refuse a directory that holds one already."""
    taken = is_run(run)
    group.wait()  # all look before the first one writes
    if taken:
        raise GptlabError(f"{run} holds a run already; go on with it by --resume {run}, or choose another --out")
    if group.first:
        about = about_run(recipe, dataset)
        if teacher is not None:
            about["teacher"] = teacher.about
        write_files(run, {"run.json": json.dumps(about, indent=2).encode() + b"\n"})


def about_run(recipe: Recipe, dataset: Dataset) -> dict[str, Any]:
    """Return what `run.json` says of a run."""
    where = {"path": str(dataset.directory.resolve()), "name": dataset.name, "sha256": dataset.sha256}
    return {"recipe": recipe.model_dump(mode="json"), "data": where, "made_with": versions()}


def versions() -> dict[str, Any]:
    """What decides whether two runs are the same bit for bit."""
    return {
        "gptlab": gptlab.__version__,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "processor": platform.processor() or platform.machine(),
    }


def move_data(run: Path, dataset: Dataset) -> None:
    """Write down where the data of a run are now, so that the next time nobody has to say it."""
    about = json.loads((run / "run.json").read_text(encoding="utf-8"))
    where = str(dataset.directory.resolve())
    if about["data"]["path"] != where:
        about["data"]["path"] = where
        write_files(run, {"run.json": json.dumps(about, indent=2).encode() + b"\n"})


def _new_run(run: Path, dataset: Dataset, trained: bool) -> str:
    """Return what begins another run, with the model of this one where it has one already."""
    command = f"gptlab train --from {run}" if trained else "gptlab train RECIPE"
    return f"{command} --data {dataset.directory} --out NEW"


Saved = tuple[Checkpoint, dict[str, Tensor], dict[str, Any]]


def read_saved(run: Path, recipe: Recipe, dataset: Dataset, note: Callable[[str], None]) -> Saved | None:
    """Return the checkpoint to go on from, after making sure that it belongs to this recipe and this data."""
    about = read_run(run)
    saved = state.read_latest(run, note)
    if saved is None:
        note("the run has no checkpoint yet, so it starts from the beginning")
    facts = {"recipe": about["recipe"], "data_sha256": about["data"]["sha256"]} if saved is None else saved[2]
    changed = {
        name: pair for name, pair in differences(make_recipe(facts["recipe"]), recipe).items() if name not in FREE
    }
    if changed:
        what = ", ".join(f"{name} was {old!r} and is {new!r}" for name, (old, new) in changed.items())
        raise GptlabError(
            f"the run {run} cannot continue with a different recipe: {what}; leave it as it was, or start a new run:"
            f" {_new_run(run, dataset, saved is not None)}"
        )
    if facts["data_sha256"] != dataset.sha256:
        raise GptlabError(
            f"{dataset.directory} holds other data than the run {run} began with: their checksums differ; restore them,"
            f" name the right ones with --data, or start a new run: {_new_run(run, dataset, saved is not None)}"
        )
    if saved is None:
        return None
    before, now = facts["made_with"], versions()
    if different := [name for name in ("torch", "threads", "processor") if before.get(name) != now[name]]:
        was = ", ".join(f"{name} {before.get(name)} before, {now[name]} now" for name in different)
        note(f"not bit for bit what an uninterrupted run would give: {was}")
    return saved


def _ids_in_texts(tokenizer: Tokenizer) -> int:
    """Return how many ids a model needs for prepared texts.

    Many a fine-tuned model has no row for a padding token that its tokenizer has, and no text holds one.
    """
    unused = set(tokenizer.special_tokens.values()) - set(tokenizer.between)
    return 1 + max(token for token in tokenizer.known_ids(tokenizer.vocab_size) if token not in unused)
