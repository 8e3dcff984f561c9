"""The making of a study's models: trained from scratch, or converted from the base and uptrained."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import gptlab
from gptlab.checkpoints.files import write_files
from gptlab.conversion.calibration import (
    DEFAULT_TEXT,
    LONGEST_ROW,
    TOKENS,
    TOKENS_PER_CHANNEL,
    calibration_rows,
    default_tokens,
)
from gptlab.conversion.changes import Changes
from gptlab.conversion.convert import convert
from gptlab.conversion.convert import plan as plan_steps
from gptlab.devices import timed
from gptlab.errors import GptlabError
from gptlab.language_model import LanguageModel
from gptlab.progress import Report
from gptlab.study.ages import train_age
from gptlab.study.directory import CONVERTED, RUNS, key
from gptlab.study.resolve import Entry, Plan
from gptlab.study.results import Run
from gptlab.study.runs import (
    attempt,
    finished,
    kept,
    run_key,
    run_of,
    train_run,
    uptrain_key,
    uptrain_run,
    with_seed,
)
from gptlab.study.timing import training_step
from gptlab.study.uptraining import Uptraining
from gptlab.study.variants import Converted, Loaded, Trained
from gptlab.text.shards import Dataset
from gptlab.training.branch import of_age
from gptlab.training.recipe import Recipe

Source = str | Path

DONE = "conversion.json"
WINDOWS = {"window", "sinks", "dilation"}
"""Changes of a conversion that touch no weight."""


@dataclass(frozen=True)
class Narrowed:
    """A conversion that changes no weight: made again from its base whenever it is asked for, and not saved.

    Attributes:
        base: what `gptlab.load` takes.
        changes: of windows, sinks and dilation alone.
    """

    base: Source
    changes: Changes


Model = Source | Narrowed


def load_model(model: Model, device: torch.device) -> LanguageModel:
    """Return a model of a study, ready to be asked."""
    if not isinstance(model, Narrowed):
        return gptlab.load(model, dtype="float32", device=device)
    lm = gptlab.load(model.base, dtype="float32", device=device)
    return LanguageModel(convert(lm.model, model.changes).model, lm.tokenizer)


@dataclass(frozen=True)
class Made:
    """One variant with one seed.

    Attributes:
        run: its training, None where it has none, or none of the last age.
        model: its final model, None where it failed or ends at an earlier age.
        checkpoints: of a conversion: its models by share of the pre-training, 0 right after it.
        ages: of one that is trained: its models by tokens, where the study has ages.
        steps: of a conversion, in words.
    """

    run: Run | None = None
    model: Model | None = None
    checkpoints: Mapping[float, Model] = field(default_factory=dict)
    steps: tuple[str, ...] = ()
    ages: Mapping[int, Model] = field(default_factory=dict)


def make(plan: Plan, report: Report) -> dict[tuple[str, int], Made]:
    """Make all models of a study, unless that was done before; return them by variant and seed.

    Args:
        plan: of the study.
        report: called as the work goes on: what there is to train, each run, the rows of its training, failures.

    Raises:
        GptlabError: no variant could be made.
        Interrupted: a signal came during training; the run is saved and goes on next time.
        OSError: the disk is full, or the like.
    """
    report(forecast(plan))
    made = {(e.name, 0): Made(model=e.variant.model) for e in plan.entries if isinstance(e.variant, Loaded)}
    for kind in (Trained, Converted):  # the base is never a conversion
        entries = [entry for entry in plan.entries if isinstance(entry.variant, kind)]
        jobs = [(entry, 0) for entry in entries if entry.seeds == (0,) != plan.seeds]
        jobs += [(entry, seed) for seed in plan.seeds for entry in entries if entry.seeds == plan.seeds]
        for i, (entry, seed) in enumerate(jobs):
            report({"event": "phase", **_words(plan, entry, seed), "done": i, "of": len(jobs)})
            base = made.get((plan.base.name, plan.base_seed(seed)))
            source = base.model if base and not isinstance(base.model, Narrowed) else None
            one = _make(plan, entry, seed, source, report)
            made[entry.name, seed] = one
            if one.model is None and one.run is not None:
                report({"event": "note", "text": f"{entry.name}, seed {seed} failed: {one.run.error}"})
    if all(one.model is None and not one.ages for one in made.values()):
        errors = [one.run.error for one in made.values() if one.run is not None]
        raise GptlabError(f"no variant could be trained: {errors[0]}")
    return made


def _words(plan: Plan, entry: Entry, seed: int) -> dict[str, str]:
    trains = not isinstance(entry.variant, Converted) or entry.variant.uptraining is not None
    seeded = f", seed {seed}" if trains or isinstance(plan.base.variant, Trained) else ""
    return {"phase": "train" if trains else "convert", "what": f"{entry.name}{seeded}"}


def _make(plan: Plan, entry: Entry, seed: int, base: Source | None, report: Report) -> Made:
    """Make one model; ``base`` is that of the base, None where it could not be trained."""

    def tell(row: dict[str, Any]) -> None:
        report({"event": "training", "row": row})

    variant, device = entry.variant, str(plan.device)
    if isinstance(variant, Trained):
        dataset, where = _dataset(plan), run_directory(plan, entry, seed)
        if plan.study.ages:
            return _make_ages(plan, entry, seed, tell)
        run, model = train_run(with_seed(variant.recipe, seed), dataset, where, device=device, report=tell)
        return Made(run, model)
    if isinstance(variant, Loaded):
        return Made(model=variant.model)

    converted = plan.out / CONVERTED / conversion_key(plan, variant.changes, seed)
    if base is not None and variant.uptraining is None and variant.changes.to_dict().keys() <= WINDOWS:
        return _narrowed(plan, variant.changes, base)
    if base is None:
        run, _ = run_of(converted, seed, f"its base, seed {seed}, was not trained")
        return Made(run)
    start: Source = base if variant.changes == Changes() else converted

    def work() -> None:
        if start != base and not (converted / DONE).exists():
            _convert(variant.changes, base, plan.dataset, converted)

    error = attempt(converted, work)
    if error is not None:
        run, _ = run_of(converted, seed, f"the conversion failed: {error}")
        return Made(run)
    taken = () if start == base else tuple(json.loads((converted / DONE).read_text(encoding="utf-8"))["steps"])
    if variant.uptraining is None:
        return Made(None, start, {0.0: start}, taken)
    steps = [milestone.step for milestone in entry.milestones[1:]]
    recipe = variant.uptraining.run(seed, steps[-1])
    where = run_directory(plan, entry, seed)
    run, models = uptrain_run(start, base, recipe, steps, _dataset(plan), where, device=device, report=tell)
    by_share = {m.share: models[m.step] for m in entry.milestones if m.step in models}
    return Made(run, models.get(steps[-1]), {0.0: start, **by_share}, taken)


def _make_ages(plan: Plan, entry: Entry, seed: int, tell: Report) -> Made:
    ages, length = plan.study.ages, _recipe(entry).length(entry.config)
    models: dict[int, Model] = {}
    for tokens in ages:
        if tokens == ages[-1] and seed not in plan.oldest_seeds:
            return Made(ages=models)
        where, recipe = run_directory(plan, entry, seed, tokens), with_seed(of_age(_recipe(entry), tokens), seed)
        run, model = train_age(recipe, _dataset(plan), where, ages, length, device=str(plan.device), report=tell)
        if model is None:
            return Made(run, ages=models)
        models[tokens] = model
    return Made(run, model, ages=models)


def _recipe(entry: Entry) -> Recipe:
    assert isinstance(entry.variant, Trained)
    return entry.variant.recipe


def _narrowed(plan: Plan, changes: Changes, base: Source) -> Made:
    model = Narrowed(base, changes)
    steps = plan_steps(plan.base.config, changes, calibrated=False)
    return Made(None, model, {0.0: model}, tuple(step.change for step in steps))


def _dataset(plan: Plan) -> Dataset:
    if plan.dataset is None:
        raise GptlabError(f"the study {plan.study.name} has no data to train on; name some by --data or --corpus")
    return plan.dataset


def run_directory(plan: Plan, entry: Entry, seed: int, tokens: int | None = None) -> Path:
    """Return the directory of the run of a variant that is trained or uptrained; the last of its ages by default."""
    match entry.variant:
        case Trained(recipe=recipe):
            recipe = recipe if tokens is None else of_age(recipe, tokens)
            name = run_key(with_seed(recipe, seed), _dataset(plan), str(plan.device))
        case Converted(changes=changes, uptraining=Uptraining() as after):
            steps = [milestone.step for milestone in entry.milestones[1:]]
            converted = conversion_key(plan, changes, seed)
            name = uptrain_key(after.run(seed, steps[-1]), converted, steps, _dataset(plan), str(plan.device))
        case _:
            raise ValueError(f"{entry.name} is not trained")
    return plan.out / RUNS / name


def conversion_key(plan: Plan, changes: Changes, seed: int) -> str:
    """Return the name of a conversion: of the base, what is changed, and the text that it is fitted on."""
    source = plan.base_key or run_directory(plan, plan.base, seed).name
    text = DEFAULT_TEXT if plan.dataset is None else plan.dataset.sha256
    return key("convert", source=source, changes=changes.to_dict(), text=text, tokens=[TOKENS, TOKENS_PER_CHANNEL])


def _convert(changes: Changes, base: Source, dataset: Dataset | None, where: Path) -> None:
    """Convert a base; the training data are the calibration text, without them `DEFAULT_TEXT`."""
    lm = gptlab.load(base, dtype="float32")
    n_tokens, length = default_tokens(lm.config.n_embd), min(lm.config.context_length, LONGEST_ROW)
    if dataset is None:
        rows = calibration_rows(lm.needs_tokenizer(), length, n_tokens)
    else:
        rows = _evenly(dataset, length, n_tokens)
    conversion = convert(lm.model, changes, rows)
    gptlab.save(LanguageModel(conversion.model, lm.tokenizer), where)
    content = {"changes": changes.to_dict(), "steps": [step.change for step in conversion.steps]}
    write_files(where, {DONE: json.dumps(content).encode() + b"\n"})


def _evenly(dataset: Dataset, length: int, n_tokens: int) -> list[Tensor]:
    """Rows of ``length`` tokens, evenly distributed over the training data, all of them where there are few."""
    there = max(dataset.training.n_tokens // length, 1)
    wanted = min(math.ceil(n_tokens / length), there)
    starts = [i * there // wanted * length for i in range(wanted)]
    return [torch.from_numpy(dataset.training.read(start, start + length).astype("int64")) for start in starts]


def forecast(plan: Plan) -> dict[str, Any]:
    """Return the event that says how much there is to train, and about how long that will take."""
    runs, missing = 0, []
    for entry in plan.entries:
        match entry.variant:
            case Trained(recipe=recipe):
                for age in plan.study.ages[:-1]:  # of the others, the decay comes on top
                    decays = [finished(run_directory(plan, entry, seed, age)) is not None for seed in entry.seeds]
                    runs += len(decays)
                    part = round(age * recipe.schedule.decay_share)
                    missing += [(entry, recipe, part)] * decays.count(False)
                seeds = [seed for seed in entry.seeds if seed in plan.oldest_seeds]
                done = [finished(run_directory(plan, entry, seed)) is not None for seed in seeds]
                tokens = entry.tokens or 0
            case Converted(uptraining=Uptraining(recipe=recipe)):
                steps = [milestone.step for milestone in entry.milestones[1:]]
                done = [kept(run_directory(plan, entry, seed), steps) is not None for seed in entry.seeds]
                tokens = entry.milestones[-1].tokens
            case _:
                continue
        runs += len(done)
        missing += [(entry, recipe, tokens)] * done.count(False)
    total = sum(tokens for _, _, tokens in missing)
    seconds = 0.0
    if missing:  # time a few steps of the first
        entry, recipe, _ = missing[0]
        rows = recipe.batch.micro or recipe.batch.size
        step = training_step(gptlab.GPT(entry.config).to(plan.device), rows, recipe)
        step()
        fastest = min(timed(step, plan.device) for _ in range(2))
        seconds = total * fastest / (rows * entry.config.context_length)
    about = {"variants": len(plan.entries), "runs": runs, "done": runs - len(missing), "tokens": total}
    return {"event": "plan", "study": plan.study.name, **about, "seconds": seconds}
