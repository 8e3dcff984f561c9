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
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from gptlab.config import ModelConfig
from gptlab.errors import GptlabError
from gptlab.generation.engine import CHUNK
from gptlab.model import cost
from gptlab.model.gpt import GPT
from gptlab.study.directory import cached, key, plain
from gptlab.study.memory import peak_memory
from gptlab.study.results import Decode, Machine, Peaks, Prefill, Timings, VariantTimings
from gptlab.study.settings import MeasurementSettings
from gptlab.study.timing import ROUNDS, decoding_step, prefill_step, take_turns, timed, training_step
from gptlab.training.recipe import Recipe

Report = Callable[[dict[str, Any]], None]

MOST_BYTES = 2**31
"""Bytes of all variants' caches together at one point; beyond it the point is left out. A GPU lends 40% of its own."""
HOW = (
    "random weights, learned positions extended to the longest context; variants alternate within each round, medians"
    " over rounds; prompts in chunks of {chunk} tokens, last logits only; generation one token a step in plain PyTorch,"
    " without sampling; training on {rows} windows of the trained length a step, {dtype} products, not compiled; memory"
    " is the peak of a fresh process above its start: training as above, generation with {batch} x {context} tokens in"
    " the cache"
)


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
    large = torch.ones(2**28 if device.type == "cuda" else 2**26, device=device)
    seconds = min(timed(large.sum, device) for _ in range(7))
    n = 8192 if device.type == "cuda" else 1024
    flops = {}
    for name in ("float32", "bfloat16"):
        a = torch.randn(n, n, device=device).to(getattr(torch, name))
        flops[name] = 2 * n**3 / min(timed(functools.partial(torch.mm, a, a), device) for _ in range(7))
    how = f"the best of 7: a sum over {large.nbytes >> 20} MiB of float32, products of {n} x {n} matrices"
    return Peaks(bandwidth_bytes_per_second=large.nbytes / seconds, flops=flops, how=how)


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
    whole = _Measurement(configs, settings, recipe, cache, device, report)
    timings = {name: whole.memory(name) for name in configs}
    whole.training(timings)
    for context in sorted(settings.contexts):
        for batch in sorted(settings.batches):
            whole.decoding(timings, batch, context)
        whole.prefill(timings, context)
    batch, context = whole.memory_point
    return Timings(
        machine=machine(device),
        dtype=str(whole.dtype).removeprefix("torch."),
        how=HOW.format(chunk=CHUNK, rows=whole.rows, dtype=recipe.train.dtype, batch=batch, context=context),
        peaks=Peaks(**whole.kept("peaks", lambda: peaks(device).model_dump())),
        variants=timings,
    )


class _Measurement:
    """The measurements of one study; each is kept under a key of its own."""

    def __init__(
        self,
        configs: Mapping[str, ModelConfig],
        settings: MeasurementSettings,
        recipe: Recipe,
        cache: Path,
        device: torch.device,
        report: Report,
    ) -> None:
        self.configs, self.settings, self.recipe, self.cache = dict(configs), settings, recipe, cache
        self.device, self.report = device, report
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.rows = settings.training_rows or recipe.batch.micro or recipe.batch.size
        longest = max(settings.contexts) + ROUNDS + 2
        self.extended = {name: _extended(config, longest) for name, config in self.configs.items()}
        self.points = len(settings.contexts) * (len(settings.batches) + 1)
        self.left = settings.seconds
        self.most_bytes = int(0.4 * machine(device).memory_bytes) if device.type == "cuda" else MOST_BYTES
        self.rate = 0.0  # operations a second of the last prefill
        self._models: dict[str, GPT] = {}

    @property
    def models(self) -> dict[str, GPT]:
        """Random models of all variants, made when the first is needed."""
        if not self._models:
            self._models = {n: GPT(c).to(self.device, self.dtype).eval() for n, c in self.extended.items()}
        return self._models

    @property
    def memory_point(self) -> tuple[int, int]:
        """The batch and context at which the memory of generation is measured: the largest of modest size."""
        points = [(b, c) for c in self.settings.contexts for b in self.settings.batches]
        fitting = [point for point in points if self._cache_bytes(*point) <= self.most_bytes]
        return max(fitting or points[:1], key=lambda point: (point[0] * point[1], point[1]))

    def _cache_bytes(self, batch: int, context: int) -> int:
        sizes = (cost.cache_bytes(c, context, self.dtype.itemsize, batch=batch) for c in self.configs.values())
        return sum(sizes)

    def kept(self, what: str, compute: Callable[[], dict[str, Any]], **settings: Any) -> dict[str, Any]:
        """Return a measurement of this machine, taken now or earlier."""
        where = {"node": platform.node(), "processor": _processor(), "device": str(self.device)}
        return cached(self.cache, key("measure", what=what, where=where, **settings), compute)

    def memory(self, name: str) -> VariantTimings:
        """Begin a variant's timings with its memory; None where it could not be measured."""
        batch, context = self.memory_point
        asked: dict[str, Any] = {"config": self.extended[name].to_dict(), "trained": self.configs[name].to_dict()}
        asked |= {"recipe": plain(self.recipe), "device": str(self.device)}
        asked |= {"rows": self.rows, "batch": batch, "context": context}
        self._say(f"memory of {name}")
        try:
            peak = self.kept("memory", lambda: peak_memory(asked), **asked)
        except GptlabError as error:
            self.report({"event": "note", "text": f"{name}: {error}"})
            peak = {}
        return VariantTimings(
            training_tokens_per_second=None,
            training_memory_bytes=peak.get("training"),
            decoding_memory_bytes=peak.get("decoding"),
            prefill=[],
            decode=[],
        )

    def training(self, timings: dict[str, VariantTimings]) -> None:
        """Time a training step of every variant."""
        make = lambda: {  # noqa: E731
            n: training_step(GPT(c).to(self.device), self.rows, self.recipe) for n, c in self.configs.items()
        }
        recipe = plain(self.recipe)
        share = self.left / 4
        for name, seconds in self._point("training", make, share, recipe=recipe, rows=self.rows).items():
            rate = self.rows * self.configs[name].context_length / seconds
            timings[name] = timings[name].model_copy(update={"training_tokens_per_second": rate})

    def decoding(self, timings: dict[str, VariantTimings], batch: int, context: int) -> None:
        """Time the generation of one more token, unless the caches are too large."""
        share, self.points = self.left / self.points, self.points - 1
        if self._cache_bytes(batch, context) > self.most_bytes:
            return
        make = lambda: {n: decoding_step(m, batch, context) for n, m in self.models.items()}  # noqa: E731
        for name, seconds in self._point("decode", make, share, batch=batch, context=context).items():
            rate = batch / seconds
            row = Decode(context=context, batch=batch, milliseconds=1e3 * seconds, tokens_per_second=rate)
            timings[name].decode.append(row)

    def prefill(self, timings: dict[str, VariantTimings], context: int) -> None:
        """Time the reading of a prompt, unless it would take longer than there is time."""
        share, self.points = self.left / self.points, self.points - 1
        work = sum(cost.forward_flops(config, context).total for config in self.extended.values())
        if self.rate and 2 * work / self.rate > max(self.left, 1.0):
            return
        make = lambda: {n: prefill_step(m, 1, context) for n, m in self.models.items()}  # noqa: E731
        times = self._point("prefill", make, share, batch=1, context=context)
        for name, seconds in times.items():
            row = Prefill(context=context, batch=1, tokens_per_second=context / seconds)
            timings[name].prefill.append(row)
        self.rate = work / sum(times.values())

    def _point(self, what: str, make: Callable[[], dict[str, Any]], share: float, **settings: Any) -> dict[str, float]:
        """Time all variants at one point, for about ``share`` seconds."""
        said = ", ".join(f"{settings[name]:,} {name}" for name in ("context", "batch") if name in settings)
        self._say(f"{what} {said}".strip())
        started = time.perf_counter()
        configs = {name: config.to_dict() for name, config in self.extended.items()}
        times = self.kept(what, lambda: take_turns(make(), self.device, share), configs=configs, **settings)
        self.left -= time.perf_counter() - started
        return times

    def _say(self, what: str) -> None:
        self.report({"event": "phase", "phase": "measure", "what": what, "seconds_left": max(self.left, 0.0)})


def _extended(config: ModelConfig, length: int) -> ModelConfig:
    """The same model with enough learned positions for ``length`` tokens."""
    if not config.has_table or config.context_length >= length:
        return config
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return dataclasses.replace(config, context_length=length)
