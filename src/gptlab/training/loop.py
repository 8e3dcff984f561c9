"""Training: from a recipe and a dataset to a run directory, resumable at any moment."""

from __future__ import annotations

import contextlib
import math
import signal
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from gptlab.checkpoints.files import Checkpoint
from gptlab.checkpoints.runs import read_run, run_checkpoints
from gptlab.conversion.rotary import finish_blend
from gptlab.errors import GptlabError
from gptlab.language_model import LanguageModel
from gptlab.model import cost
from gptlab.model.gpt import GPT
from gptlab.progress import Report
from gptlab.text.shards import Dataset
from gptlab.training import metrics, state
from gptlab.training.begin import begin, check_teacher, first_model, move_data, read_saved, versions
from gptlab.training.budget import with_count
from gptlab.training.data import Batches, Items, Windows
from gptlab.training.distill import Teacher, load_teacher
from gptlab.training.hardware import keep_memory, memory_bytes, peak_flops
from gptlab.training.lock import alone
from gptlab.training.loss import LogitsGradient, softmax_gradient
from gptlab.training.novelty import novelty
from gptlab.training.optimizer import clip, cut_warmup, learning_rate_share, make_optimizers
from gptlab.training.parallel import Group, join, spread
from gptlab.training.recipe import Recipe, make_recipe
from gptlab.training.schedules import set_stage, settled
from gptlab.training.step import (
    DTYPES,
    compile_distillation,
    compile_step,
    gradients,
    recompute_blocks,
    seed_step,
    spare_embedding,
    stream_loss,
    worth_compiling,
)

ROW_EVERY = 10
"""Steps from one row of the metrics to the next."""

NOVELTY_SAMPLES = 200
"""Items sampled at the end of a run on items."""


@dataclass
class Result:
    """What a run leaves.

    Attributes:
        language_model: the model after the last step, with its tokenizer.
        metrics: final figures, plain values for JSON; empty when the run was stopped.
        stopped_by: the signal that stopped the run before its end, or None.
    """

    language_model: LanguageModel
    metrics: dict[str, Any] = field(default_factory=dict)
    stopped_by: signal.Signals | None = None


def rows_of(dataset: Dataset, recipe: Recipe, length: int) -> tuple[Windows | Items, Windows | Items]:
    """Return the rows of the training split and of the validation split, for windows of ``length`` tokens."""
    if recipe.data.items:
        if not dataset.items:
            raise GptlabError(
                f"the data {dataset.name} is not a list of items; prepare it with gptlab prepare --per-line, or set"
                " data.items=false"
            )
        start = next(reversed(dataset.tokenizer.between), None)
        return Items(dataset.training, length, start), Items(dataset.validation, length, start)
    inside = recipe.data.documents
    return Windows(dataset.training, length, inside), Windows(dataset.validation, length, inside)


def train(
    recipe: Recipe,
    dataset: Dataset,
    run: str | Path,
    *,
    base: LanguageModel | None = None,
    resume: bool = False,
    save_at: Collection[int] = (),
    device: str | None = None,
    report: Report = lambda row: None,
) -> Result:
    """Train a model: from random weights, from a trained model, or on from where a run was stopped.

    Args:
        recipe: everything that defines the run but the data.
        dataset: the token shards; they are compared with their checksums first.
        run: the directory for checkpoints and metrics.
        base: the model that ``recipe.base`` names; a run that goes on from a checkpoint does without.
        resume: go on with the run in ``run``.
        save_at: steps after which to save, beside those of the recipe.
        device: ``cpu``, ``cuda``, ...; None takes a GPU where there is one.
        report: called on the first process with the rows of `metrics.jsonl`, with checkpoints and with notes.

    Raises:
        GptlabError: data that is damaged or does not fit the recipe, a loss that is not a number, a full disk, or
            a run that cannot be resumed as asked.
    """
    run = Path(run)
    recipe = with_count(recipe, make_recipe(read_run(run)["recipe"]) if resume else None)
    with join(device) as group:
        tell: Report = report if group.first else lambda row: None
        note = lambda text: tell({"event": "note", "text": text})  # noqa: E731
        with alone(run, group, note):
            return _train(recipe, dataset, run, group, base, resume, save_at, tell, note)


def _train(
    recipe: Recipe,
    dataset: Dataset,
    run: Path,
    group: Group,
    base: LanguageModel | None,
    resume: bool,
    save_at: Collection[int],
    tell: Report,
    note: Callable[[str], None],
) -> Result:
    """Train in a directory that no other process trains in."""
    saved = read_saved(run, recipe, dataset, note) if resume else None
    model = first_model(recipe, dataset, base) if saved is None else GPT(saved[0].config)
    teacher = None
    if recipe.distill is not None:
        teacher = load_teacher(recipe.distill, model.config, dataset.tokenizer)
        check_teacher(run, teacher, resume)
    training, validation = rows_of(dataset, recipe, recipe.length(model.config))
    batches = Batches(training, recipe.batch.size, recipe.train.seed)
    if model.config.position == "blend" and recipe.blend is None:
        note("positions stay between learned and rotary as they are, since the recipe has no section [blend]")
    _check(recipe, group, validation)
    if group.first:
        dataset.verify()
    if not resume:
        begin(run, recipe, dataset, group, teacher)
    elif group.first:
        move_data(run, dataset)
    objective = _place(model, teacher, recipe, batches, group, note)
    loop = _Loop(
        recipe=recipe,
        dataset=dataset,
        run=run,
        group=group,
        model=model,
        module=spread(model, recipe.parallel, group),
        optimizers=make_optimizers(model, recipe.optimizer),
        batches=batches,
        validation=validation,
        objective=objective,
        steps=recipe.steps(recipe.length(model.config), len(training)),
        save_at=save_at,
    )
    if saved is not None:
        loop.restore(*saved)
    if group.first:
        metrics.cut(run, loop.step)
    if not resume and (cut := cut_warmup(recipe.schedule, loop.steps)):
        note(cut)
    return loop.go(tell, _plan(recipe, run.name, model, group, loop.steps, loop.step, objective.compiled))


def _check(recipe: Recipe, group: Group, validation: Windows | Items) -> None:
    """Refuse a run that would leave a process without rows, or that could not be evaluated."""
    if recipe.batch.size < group.size:
        raise GptlabError(f"batch.size={recipe.batch.size} leaves some of {group.size} processes idle; raise it")
    if not validation.n_targets:
        raise GptlabError(
            "the validation data is empty; prepare the data again and hold more of it out (gptlab prepare --held-out,"
            " or data.held_out of gptlab train --corpus)"
        )


@dataclass(frozen=True)
class _Objective:
    """What is minimised, and how.

    Attributes:
        gradient: of the loss with respect to the logits, compiled where it could be.
        teacher: whom the run learns from, or None; with a compiled loss where it could be.
        compiled: whether the blocks are compiled too.
    """

    gradient: LogitsGradient
    teacher: Teacher | None
    compiled: bool


def _place(
    model: GPT, teacher: Teacher | None, recipe: Recipe, batches: Batches, group: Group, note: Callable[[str], None]
) -> _Objective:
    """Move the model and its teacher where it will train, and compile both if asked."""
    settings, config = recipe.train, model.config
    model.to(group.device)
    if teacher is not None:
        teacher.model.to(group.device)
    if group.size == 1:
        spare_embedding(model)
    length = recipe.length(config)
    steps = recipe.steps(length, len(batches.rows))
    flops = cost.training_flops(config, length)
    if teacher is not None:
        flops += cost.forward_flops(teacher.model.config, length).total
    flops = flops * recipe.batch.size * steps // group.size
    gradient = taught = None
    if worth_compiling(flops, group.device) if settings.compile == "auto" else settings.compile:
        note("compiling: half a minute or so")
        mine = batches[0].rows(group.share(recipe.batch.size))
        part = mine.rows(slice(0, recipe.batch.micro)).to(group.device)
        dtype, must = DTYPES[settings.dtype], settings.compile is True
        if teacher is None:
            gradient = compile_step(model, part, dtype, must, note, settings.recompute)
        else:
            taught = compile_distillation(model, teacher, part, dtype, must, note, settings.recompute)
    compiled = gradient is not None or taught is not None
    if settings.recompute and not compiled:
        recompute_blocks(model)
    return _Objective(gradient or softmax_gradient, taught or teacher, compiled)


def _plan(recipe: Recipe, name: str, model: GPT, group: Group, steps: int, step: int, compiled: bool) -> dict[str, Any]:
    """The row that opens a run."""
    length = recipe.length(model.config)
    peak, source = peak_flops(group.device, DTYPES[recipe.train.dtype])
    return {
        "event": "start",
        "name": name,
        "step": step,
        "steps": steps,
        "tokens_per_step": recipe.batch.size * length,
        "parameters": sum(cost.parameters(model.config).values()),
        "flops_per_token": cost.training_flops(model.config, length) / length,
        "peak_flops": peak * group.size,
        "peak_source": source,
        "device": str(group.device),
        "processes": group.size,
        "dtype": recipe.train.dtype,
        "compiled": compiled,
        "resumed_from": step or None,
        **({"share": recipe.budget.share, "share_of": recipe.budget.of} if recipe.budget.share else {}),
        **({"teacher": recipe.distill.teacher} if recipe.distill else {}),
    }


@dataclass(kw_only=True)
class _Loop:
    """A run as it goes on; what is read from a checkpoint changes with every step."""

    recipe: Recipe
    dataset: Dataset
    run: Path
    group: Group
    model: GPT
    module: torch.nn.Module
    optimizers: list[torch.optim.Optimizer]
    batches: Batches
    validation: Windows | Items
    objective: _Objective
    steps: int
    save_at: Collection[int]
    step: int = 0
    seconds: float = 0.0
    validation_loss: float | None = None

    def restore(self, checkpoint: Checkpoint, memory: dict[str, torch.Tensor], facts: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        state.restore(self.model, self.optimizers, checkpoint.state, memory)
        self.step, self.seconds, self.validation_loss = facts["step"], facts["seconds"], facts["validation_loss"]

    def go(self, tell: Report, plan: dict[str, Any]) -> Result:
        settings = self.recipe.train
        save_every = settings.save_every or settings.evaluate_every
        began = time.perf_counter() - self.seconds
        stop: signal.Signals | None = None
        with metrics.Metrics(self.run, tell, self.group.first) as rows, _signals() as caught:
            rows.row(**plan)
            pace, first = _Pace(self.step), self.step + 1
            while self.step < self.steps and stop is None:
                losses, norm, rate = self._take_step()
                if self.step == first and self.group.device.type == "cpu":
                    keep_memory()
                self.seconds, self.validation_loss = time.perf_counter() - began, None
                last = self.step == self.steps
                if self.step % ROW_EVERY == 0 or self.step == 1 or last:
                    rows.row(
                        **self._row("step"), **losses, gradient_norm=norm, learning_rate=rate, **pace.measure(self)
                    )
                if self.step % settings.evaluate_every == 0 or last:
                    self._evaluate()
                    self.seconds = time.perf_counter() - began
                    rows.row(**self._row("evaluate"), validation_loss=self.validation_loss)
                    pace.skip(self.step)
                # A signal may have reached one process and not yet the others: all stop at the same step.
                if self.group.any(bool(caught)):
                    stop = caught[0] if caught else signal.SIGTERM
                if last or stop is not None or self.step % save_every == 0 or self.step in self.save_at:
                    rows.sync()
                    path = self._save()
                    tell({"event": "checkpoint", "step": self.step, "path": str(path)})
                    pace.skip(self.step)
            stopped = stop if self.step < self.steps else None
            if stopped is not None:
                rows.row(**self._row("end"), reason=f"stopped by {stopped.name}")
                return Result(self._language_model(), {}, stopped)
            lm = self._language_model()
            figures = self._figures(lm)
            rows.row(**self._row("end"), reason="finished", **figures)
        return Result(lm, figures)

    def _row(self, event: str) -> dict[str, Any]:
        tokens = self.step * self.recipe.batch.size * self.batches.rows.length
        return {"event": event, "step": self.step, "tokens": tokens, "seconds": self.seconds}

    def _take_step(self) -> tuple[dict[str, float], float, float]:
        """Take one step; return its losses by name, the norm of its gradient, and the learning rate."""
        recipe = self.recipe
        set_stage(self.model, recipe, self.step, self.steps, training=True)
        self.module.train()
        seed_step(recipe.train.seed, self.step, self.group.rank)
        batch = self.batches[self.step]
        dtype = DTYPES[recipe.train.dtype]
        micro = recipe.batch.micro
        objective = self.objective
        losses = gradients(self.module, batch, micro, dtype, self.group, objective.gradient, objective.teacher)
        loss, nats = losses.tolist()
        norm = clip(list(self.model.parameters()), recipe.optimizer.clip_norm).item()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self._refuse(loss, norm, batch.origins.tolist())
        share = learning_rate_share(recipe.schedule, self.step, self.steps)
        rate = recipe.optimizer.learning_rate * share
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * group["factor"]
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return {"loss": loss} if objective.teacher is None else {"loss": loss, "cross_entropy": nats}, norm, rate

    def _refuse(self, loss: float, norm: float, origins: list[int]) -> None:
        """Stop before a step that would spoil the weights."""
        kind = "items" if isinstance(self.batches.rows, Items) else "windows that begin at tokens"
        where = ", ".join(str(origin) for origin in origins[:8]) + (", ..." if len(origins) > 8 else "")
        what = f"the loss is {loss}" if not math.isfinite(loss) else f"the loss is {loss:.4f} and its gradient {norm}"
        raise GptlabError(
            f"{what} in step {self.step + 1:,}, on the {kind} {where} of {self.dataset.name}; {self._last_good()};"
            " lower optimizer.learning_rate, or look at that text"
        )

    def _last_good(self) -> str:
        kept = run_checkpoints(self.run)
        return f"the last good checkpoint is {kept[-1].path}" if kept else "there is no checkpoint yet"

    def _evaluate(self) -> None:
        settings = self.recipe.train
        set_stage(self.model, self.recipe, self.step, self.steps, training=False)
        size = self.recipe.batch.micro or max(self.recipe.batch.size // self.group.size, 1)
        self.validation_loss = stream_loss(
            self.module,
            self.validation,
            batch_size=size,
            n_tokens=settings.evaluate_tokens,
            dtype=DTYPES[settings.dtype],
            group=self.group,
        )
        if not math.isfinite(self.validation_loss):
            raise GptlabError(
                f"the validation loss is {self.validation_loss} after step {self.step:,}, so nothing is saved;"
                f" {self._last_good()}; lower optimizer.learning_rate, or look at the validation text"
            )

    def _save(self) -> Path | None:
        set_stage(self.model, self.recipe, self.step, self.steps, training=False)
        model = self._rotary() if self._is_blended() else self.model
        weights, memory = state.model_state(model), state.optimizer_state(self.model, self.optimizers)
        memory = {name: value for name, value in memory.items() if name.rpartition("/")[0] in weights}
        facts = {
            "step": self.step,
            "seconds": self.seconds,
            # What is still on its way to its final self is never the run's best.
            "validation_loss": self.validation_loss if settled(self.recipe, self.step, self.steps) else None,
            "recipe": self.recipe.model_dump(mode="json"),
            "data_sha256": self.dataset.sha256,
            "made_with": versions(),
        }
        path = None
        if self.group.first:
            keep = self.recipe.train.keep_last
            path = state.write_checkpoint(self.run, model.config, self.dataset.tokenizer, weights, memory, facts, keep)
        self.group.wait()
        return path

    def _language_model(self) -> LanguageModel:
        model = self._rotary() if self._is_blended() else self._whole_model()
        return LanguageModel(model.eval(), self.dataset.tokenizer)

    def _whole_model(self) -> GPT:
        """Return a copy of the model in one piece on the CPU. All processes must ask together."""
        weights = state.model_state(self.model)
        model = GPT(self.model.config)
        model.load_state_dict(weights, strict=not self.model.config.tie_embeddings)
        model.tie()
        return model

    def _is_blended(self) -> bool:
        """Is the model at the end of a blend, where learned positions have no part any more?"""
        return self.recipe.blend is not None and self.step == self.steps and self.model.config.position == "blend"

    def _rotary(self) -> GPT:
        return finish_blend(self._whole_model())

    def _figures(self, lm: LanguageModel) -> dict[str, Any]:
        """The figures of a finished run, with the protocol that gave them."""
        split, seen, loss = self.dataset.validation, self.recipe.train.evaluate_tokens, self.validation_loss
        n_targets = self.validation.n_targets
        whole = seen is None or seen >= split.n_tokens
        rows = "items" if isinstance(self.validation, Items) else f"windows of {self.validation.length} tokens"
        figures: dict[str, Any] = {
            "validation_loss": loss,
            "validation_tokens": n_targets if whole else seen,
            "protocol": f"non-overlapping {rows}, {self.recipe.train.dtype}",
        }
        if whole and split.n_bytes and loss is not None:
            figures["validation_bits_per_byte"] = loss * n_targets / math.log(2) / split.n_bytes
        if isinstance(self.batches.rows, Items) and self.group.first:
            figures |= novelty(lm, self.dataset, NOVELTY_SAMPLES, self.recipe.train.seed)
        return figures


class _Pace:
    """Tokens a second between two rows, without the time that evaluation and saving take."""

    def __init__(self, step: int) -> None:
        self.skip(step)

    def skip(self, step: int) -> None:
        self._at, self._step = time.perf_counter(), step

    def measure(self, loop: _Loop) -> dict[str, Any]:
        now = time.perf_counter()
        tokens = (loop.step - self._step) * loop.recipe.batch.size * loop.batches.rows.length
        rate = tokens / (now - self._at)
        self._at, self._step = now, loop.step
        return {"tokens_per_second": rate, "memory_bytes": memory_bytes(loop.group.device)}


@contextlib.contextmanager
def _signals() -> Iterator[list[signal.Signals]]:
    """Collect SIGINT and SIGTERM instead of dying of them; a second SIGINT interrupts at once."""
    caught: list[signal.Signals] = []

    def remember(number: int, frame: object) -> None:
        if caught and number == signal.SIGINT:
            raise KeyboardInterrupt
        caught.append(signal.Signals(number))

    try:
        before = {number: signal.signal(number, remember) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not in the main thread: signals stay with whoever owns them
        yield caught
        return
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
