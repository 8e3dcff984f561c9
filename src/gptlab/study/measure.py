"""What the clock says: reading prompts, generating, training, and what the machine reaches at best.

Speed does not depend on the values of weights, so random ones are timed; a model with learned positions gets as many as
the longest context asks for. Variants take turns within a round, so that a machine whose speed wanders does not favour
one of them, and the median over the rounds counts.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import platform
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from gptlab import roofline
from gptlab.config import ModelConfig
from gptlab.errors import GptlabError
from gptlab.generation.compiled.library import library_path
from gptlab.generation.padded import CHUNK
from gptlab.model import cost
from gptlab.model.gpt import GPT
from gptlab.progress import Report
from gptlab.study.directory import cached, key, plain
from gptlab.study.memory import peak_memory
from gptlab.study.results import Decode, Machine, Peaks, Prefill, Timings, VariantTimings
from gptlab.study.settings import MeasurementSettings
from gptlab.study.timing import ROUNDS, Step, computed_by, decoding_step, prefill_step, take_turns, training_step
from gptlab.training.recipe import Recipe

MOST_BYTES = 2**31
"""Bytes of all variants' caches together at one point; beyond it the point is left out. A GPU lends 40% of its own."""
HOW = (
    "random weights, learned positions extended to the longest context; variants alternate within each round, medians"
    " over rounds; prompts in chunks of {chunk} tokens, last logits only; generation one token a step {decoder},"
    " without sampling; training on {rows} windows of the trained length a step, {dtype} products, not compiled; memory"
    " is the peak of a fresh process above its start: training as above, generation with {batch} x {context} tokens in"
    " the cache"
)

NOT_TIMED = VariantTimings(
    training_tokens_per_second=None, training_memory_bytes=None, decoding_memory_bytes=None, prefill=[], decode=[]
)
"""Of a variant whose study leaves the clock alone."""


def machine(device: torch.device) -> Machine:
    """Return what the timings were taken on."""
    if device.type == "cuda":
        memory, name = torch.cuda.get_device_properties(device).total_memory, torch.cuda.get_device_name(device)
    else:
        memory, name = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), device.type
    return Machine(
        processor=_processor(),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        memory_bytes=memory,
        device=name,
        date=datetime.now(UTC).date().isoformat(),
    )


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def peaks(device: torch.device) -> Peaks:
    """Measure the bandwidth of memory and the rate of matrix products, the best of several tries each."""
    return Peaks(
        bandwidth_bytes_per_second=roofline.read_rate(device),
        flops={dtype: roofline.product_rate(device, dtype) for dtype in ("float32", "bfloat16")},
        how=roofline.how_measured(device),
    )


def measure(
    configs: Mapping[str, ModelConfig],
    settings: MeasurementSettings,
    recipe: Recipe,
    cache: Path,
    *,
    device: torch.device,
    report: Report,
) -> Timings:
    """Time all variants against each other.

    Args:
        configs: the variants' configurations by name.
        settings: which contexts and batches, and for how long.
        recipe: the batch and dtype of a training step.
        cache: where single measurements are kept, so that they can go on after an interruption.
        device: to measure on.
        report: called with plain values as the work goes on.
    """
    longest = max(settings.contexts) + ROUNDS + 2
    bench = _Bench(
        configs=dict(configs),
        extended={name: extended(config, longest) for name, config in configs.items()},
        recipe=recipe,
        rows=settings.training_rows or recipe.batch.micro or recipe.batch.size,
        cache=cache,
        device=device,
        report=report,
    )
    if not settings.timed:
        return Timings(
            machine=machine(device),
            dtype=str(bench.dtype).removeprefix("torch."),
            how="no variant was timed",
            peaks=Peaks(**bench.kept("peaks", lambda: peaks(device).model_dump())),
            variants=dict.fromkeys(configs, NOT_TIMED),
        )
    batch, context = _memory_point(bench, settings)
    peak = {name: _memory(bench, name, batch, context, settings.seconds) for name in configs}
    end = time.perf_counter() + settings.seconds
    training = _train(bench, end)
    decode, prefill = _generate(bench, settings, end)
    return Timings(
        machine=machine(device),
        dtype=str(bench.dtype).removeprefix("torch."),
        how=HOW.format(
            chunk=CHUNK,
            rows=bench.rows,
            dtype=recipe.train.dtype,
            batch=batch,
            context=context,
            decoder=computed_by(GPT(next(iter(configs.values()))).to(device)),
        ),
        peaks=Peaks(**bench.kept("peaks", lambda: peaks(device).model_dump())),
        variants={
            name: VariantTimings(
                training_tokens_per_second=training[name],
                training_memory_bytes=peak[name].get("training"),
                decoding_memory_bytes=peak[name].get("decoding"),
                prefill=prefill[name],
                decode=decode[name],
            )
            for name in configs
        },
    )


@dataclass(frozen=True)
class _Bench:
    """What all measurements of a study have in common; ``extended`` has learned positions for the longest context."""

    configs: dict[str, ModelConfig]
    extended: dict[str, ModelConfig]
    recipe: Recipe
    rows: int
    cache: Path
    device: torch.device
    report: Report

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    def fits(self, batch: int, context: int) -> bool:
        """Whether the caches of all variants are small enough at this point."""
        most = int(0.4 * machine(self.device).memory_bytes) if self.device.type == "cuda" else MOST_BYTES
        sizes = (cost.cache_bytes(c, context, self.dtype.itemsize, batch=batch) for c in self.configs.values())
        return sum(sizes) <= most

    def kept(self, what: str, compute: Callable[[], dict[str, Any]], **settings: Any) -> dict[str, Any]:
        """Return a measurement of this machine, taken now or earlier."""
        where = {
            "node": platform.node(),
            "processor": _processor(),
            "device": str(self.device),
            "step": library_path().name,
        }
        return cached(self.cache, key("measure", what=what, where=where, **settings), compute)

    def say(self, what: str, left: float) -> None:
        self.report({"event": "phase", "phase": "measure", "what": what, "seconds_left": max(left, 0.0)})


def _memory_point(bench: _Bench, settings: MeasurementSettings) -> tuple[int, int]:
    """The batch and context at which the memory of generation is measured: the largest of modest size."""
    points = [(b, c) for c in settings.contexts for b in settings.batches]
    fitting = [point for point in points if bench.fits(*point)]
    return max(fitting or points[:1], key=lambda point: (point[0] * point[1], point[1]))


def _memory(bench: _Bench, name: str, batch: int, context: int, left: float) -> dict[str, int]:
    """A variant's memory in ``training`` and ``decoding``; empty where it could not be measured."""
    asked: dict[str, Any] = {"config": bench.extended[name].to_dict(), "trained": bench.configs[name].to_dict()}
    asked |= {"recipe": plain(bench.recipe), "device": str(bench.device)}
    asked |= {"rows": bench.rows, "batch": batch, "context": context}
    bench.say(f"memory of {name}", left)
    try:
        return bench.kept("memory", lambda: peak_memory(asked), **asked)
    except GptlabError as error:
        bench.report({"event": "note", "text": f"{name}: {error}"})
        return {}


def _train(bench: _Bench, end: float) -> dict[str, float]:
    """Tokens per second of a training step of every variant."""

    def make() -> dict[str, Step]:
        models = {name: GPT(config).to(bench.device) for name, config in bench.configs.items()}
        return {name: training_step(model, bench.rows, bench.recipe) for name, model in models.items()}

    share = (end - time.perf_counter()) / 4
    seconds = _turns(bench, "training", make, end, share, recipe=plain(bench.recipe), rows=bench.rows)
    return {name: bench.rows * bench.configs[name].context_length / taken for name, taken in seconds.items()}


def _generate(
    bench: _Bench, settings: MeasurementSettings, end: float
) -> tuple[dict[str, list[Decode]], dict[str, list[Prefill]]]:
    """Time one more token where the caches fit, and the reading of prompts where there is time."""
    decode: dict[str, list[Decode]] = {name: [] for name in bench.configs}
    prefill: dict[str, list[Prefill]] = {name: [] for name in bench.configs}

    @functools.cache
    def models() -> dict[str, GPT]:
        return {name: GPT(config).to(bench.device, bench.dtype).eval() for name, config in bench.extended.items()}

    def alternate(what: str, step: Callable[[GPT, int, int], Step], batch: int, context: int) -> dict[str, float]:
        make = lambda: {name: step(model, batch, context) for name, model in models().items()}  # noqa: E731
        return _turns(bench, what, make, end, share, batch=batch, context=context)

    rate = 0.0  # operations a second of the last prefill
    left = len(settings.contexts) * (len(settings.batches) + 1)
    for context in sorted(settings.contexts):
        for batch in sorted(settings.batches):
            share, left = (end - time.perf_counter()) / left, left - 1
            if not bench.fits(batch, context):
                continue
            for name, seconds in alternate("decode", decoding_step, batch, context).items():
                row = Decode(
                    context=context, batch=batch, milliseconds=1e3 * seconds, tokens_per_second=batch / seconds
                )
                decode[name].append(row)
        remaining = end - time.perf_counter()
        share, left = remaining / left, left - 1
        work = sum(cost.forward_flops(config, context).total for config in bench.extended.values())
        if not rate or 2 * work / rate <= max(remaining, 1.0):
            times = alternate("prefill", prefill_step, 1, context)
            for name, seconds in times.items():
                prefill[name].append(Prefill(context=context, batch=1, tokens_per_second=context / seconds))
            rate = work / sum(times.values())
    return decode, prefill


def _turns(
    bench: _Bench, what: str, make: Callable[[], dict[str, Step]], end: float, share: float, **settings: Any
) -> dict[str, float]:
    """Time all variants at one point, for about ``share`` seconds."""
    said = ", ".join(f"{settings[name]:,} {name}" for name in ("context", "batch") if name in settings)
    bench.say(f"{what} {said}".strip(), end - time.perf_counter())
    configs = {name: config.to_dict() for name, config in bench.extended.items()}
    return bench.kept(what, lambda: take_turns(make(), bench.device, share), configs=configs, **settings)


def extended(config: ModelConfig, length: int) -> ModelConfig:
    """The same model with enough learned positions for ``length`` tokens."""
    if not config.has_table or config.context_length >= length:
        return config
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return dataclasses.replace(config, context_length=length)
