"""How fast this machine generates, beside what its memory allows: `gptlab bench generate`.

A decoding step reads every weight once, whatever the batch, and the keys and values of each sequence. A machine whose
memory gives so many bytes a second takes so many steps a second at most. Both are measured in one run, in turns, since
the bandwidth of a shared machine drifts.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import mmap
import statistics
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
import torch

from gptlab import checkpoints
from gptlab.checkpoints import hub
from gptlab.config import PRESETS, ModelConfig
from gptlab.devices import timed
from gptlab.errors import GptlabError, nearest
from gptlab.generation.compiled.decoder import Compiled, read_prompt, serves
from gptlab.generation.compiled.step import CompiledStep, Text
from gptlab.generation.memory import available_memory, check_memory
from gptlab.generation.padded import CHUNK, Padded, evaluating, last_logits
from gptlab.model import cost
from gptlab.model.cache import Cache
from gptlab.model.gpt import GPT
from gptlab.model.quantised import Bits, quantise_model
from gptlab.progress import Report
from gptlab.study.measure import extended, machine
from gptlab.study.results import Machine, Record
from gptlab.study.timing import Step, fill

CPU = torch.device("cpu")
WEIGHTS = {"float32": 4.0, "bfloat16": 2.0, "int8": 1.0, "int4": 0.625}
"""Precisions and about how many bytes a weight takes in them; those of int4 have a float32 factor for every 32."""
TURN = 0.15
"""Seconds that a turn is to take; a step may be much shorter than what disturbs it."""
PROBE_BYTES = 2**30
"""Read to measure the bandwidth: more than any processor's cache holds."""


@dataclass(frozen=True)
class Settings:
    """What to time.

    Attributes:
        dtypes: precisions of the weights, of `WEIGHTS`.
        batches: sequences that take a step together.
        contexts: tokens of each that a step attends to, the new one included.
        prompt: tokens of the prompt that is read.
        rounds: turns of each.

    Raises:
        GptlabError: a value that cannot be timed.
    """

    dtypes: tuple[str, ...] = tuple(WEIGHTS)
    batches: tuple[int, ...] = (1, 8, 32)
    contexts: tuple[int, ...] = (128, 1024)
    prompt: int = 1024
    rounds: int = 7

    def __post_init__(self) -> None:
        for dtype in self.dtypes:
            if dtype not in WEIGHTS:
                raise GptlabError(
                    f"a precision must be one of {', '.join(WEIGHTS)}, got {dtype!r}{nearest(dtype, WEIGHTS)}"
                )
        for name, values in {"a batch": self.batches, "a context": self.contexts}.items():
            if not values or min(values) < 1:
                raise GptlabError(f"{name} must be at least 1, got {', '.join(map(str, values)) or 'none'}")
        if self.prompt < 0 or self.rounds < 1:
            raise GptlabError(
                f"rounds must be at least 1 and a prompt at least 0 tokens, got {self.rounds} and {self.prompt}"
            )


class Times(Record):
    """Seconds of one thing, in the order of the rounds, with their median and quartiles."""

    seconds: list[float]
    median: float
    quartiles: tuple[float, float]


class Bandwidth(Record):
    """Of memory that is read, in bytes per second, measured in turn with every point."""

    bytes_per_second: float
    read: Times
    bytes: int
    how: str


class DecodePoint(Record):
    """One more token in each of ``batch`` sequences of ``context`` tokens.

    ``program`` says what computed it. ``step`` is one step, the mean over the ``steps`` of a turn; the bytes are those
    that a step must read, ``share`` what reading them takes at the bandwidth measured beside it, over the median.
    """

    dtype: str
    batch: int
    context: int
    program: Literal["compiled step", "plain PyTorch"]
    steps: int
    step: Times
    tokens_per_second: float
    weight_bytes: int
    cache_bytes: int
    share: float


class PrefillPoint(Record):
    """A prompt of so many tokens is read, up to the logits that follow."""

    dtype: str
    tokens: int
    read: Times
    tokens_per_second: float


class GenerationSpeed(Record):
    """The result file of `gptlab bench generate`."""

    format: Literal["gptlab bench generate"]
    version: Literal[1]
    model: str
    weights: Literal["its own", "random"]
    config: dict[str, Any]
    machine: Machine
    settings: dict[str, Any]
    bandwidth: Bandwidth
    decode: list[DecodePoint]
    prefill: list[PrefillPoint]
    left_out: list[str]


def read_shape(name: str, random: bool, settings: Settings) -> tuple[ModelConfig, Literal["its own", "random"]]:
    """Return the configuration to time, and whose weights it is to have.

    A preset means its shape, with random weights and as many learned positions as the settings ask for; so does any
    model with ``random``.
    """
    if name not in PRESETS and not random:
        return checkpoints.read_config(hub.locate(name)), "its own"
    config = ModelConfig.preset(name) if name in PRESETS else checkpoints.read_config(hub.locate(name))
    return extended(config, max(*settings.contexts, settings.prompt)), "random"


def check_room(config: ModelConfig, settings: Settings) -> None:
    """Refuse a model whose weights do not fit into memory in all precisions at once, or contexts that it cannot have.

    Raises:
        GptlabError: with what to leave out.
    """
    longest = max(*settings.contexts, settings.prompt)
    if config.has_table and longest > config.context_length:
        raise GptlabError(
            f"the model's learned positions end at {config.context_length:,} tokens, so {longest:,} cannot be timed;"
            f" give --contexts and --prompt of at most {config.context_length}, or --random for a model with more"
        )
    n_bytes = sum(cost.parameters(config).values()) * (4 + sum(WEIGHTS[dtype] for dtype in settings.dtypes))
    said = f"the weights in {len(settings.dtypes)} precisions, and once more while they are made, take"
    check_memory(int(n_bytes) + PROBE_BYTES, CPU, said, "name fewer with --dtypes, or a smaller model")


def in_precisions(model: GPT, dtypes: tuple[str, ...]) -> dict[str, GPT]:
    """Return copies of a float32 model by precision."""
    models = {}
    for dtype in dtypes:
        models[dtype] = copy.deepcopy(model)
        if dtype.startswith("int"):
            quantise_model(models[dtype], cast(Bits, int(dtype.removeprefix("int"))))
        else:
            models[dtype].to(getattr(torch, dtype))
    return models


def measure_generation(
    name: str, weights: Literal["its own", "random"], model: GPT, settings: Settings, report: Report
) -> GenerationSpeed:
    """Time decoding and the reading of a prompt on the CPU.

    Args:
        name: of the model, for the result.
        weights: whether they mean anything, for the result.
        model: float32, on the CPU.
        settings: what to time.
        report: called with plain values as the work goes on.

    Raises:
        GptlabError: a model or contexts that do not fit, see `check_room`.
    """
    config = model.config
    check_room(config, settings)
    models = in_precisions(model.eval(), settings.dtypes)
    probe = Probe()
    decode: list[DecodePoint] = []
    left_out: list[str] = []
    points = [(batch, context) for context in settings.contexts for batch in settings.batches]
    n = len(points) + bool(settings.prompt)
    for i, (batch, context) in enumerate(points, 1):
        report({"event": "phase", "what": f"batch {batch}, context {context:,}", "number": i, "of": n})
        caches = len(models) * cost.cache_bytes(config, context, 4, batch=batch, chunk=CHUNK)
        free = available_memory(CPU)
        if free is not None and caches > 0.8 * free:
            left_out.append(f"batch {batch}, context {context:,}: {caches / 2**30:,.1f} GiB of caches do not fit")
            continue
        decode += _decode(models, batch, context, settings.rounds, probe)
    prefill: list[PrefillPoint] = []
    if settings.prompt:
        report({"event": "phase", "what": f"a prompt of {settings.prompt:,} tokens", "number": n, "of": n})
        prefill = _prefill(models, settings.prompt, settings.rounds)
    return GenerationSpeed(
        format="gptlab bench generate",
        version=1,
        model=name,
        weights=weights,
        config=config.to_dict(),
        machine=machine(CPU),
        settings={
            "dtypes": list(settings.dtypes),
            "batches": list(settings.batches),
            "contexts": list(settings.contexts),
        }
        | {"prompt": settings.prompt, "rounds": settings.rounds, "turn_seconds": TURN},
        bandwidth=probe.result(),
        decode=decode,
        prefill=prefill,
        left_out=left_out,
    )


class Probe:
    """Measures how fast memory is read, in two ways: which of them is faster depends on the processor."""

    def __init__(self) -> None:
        memory = mmap.mmap(-1, PROBE_BYTES)
        self._pages = ""
        with contextlib.suppress(AttributeError, OSError):  # not on every system
            memory.madvise(mmap.MADV_HUGEPAGE)
            self._pages = " in huge pages"
        numbers = torch.frombuffer(memory, dtype=torch.float32).fill_(1.0)
        matrix, vector = numbers.view(-1, 1024), torch.ones(1024)
        self._ways: dict[str, Step] = {
            "adds up": numbers.sum,
            "multiplies by a vector": lambda: torch.mv(matrix, vector),
        }
        self._seconds: dict[str, list[float]] = {name: [] for name in self._ways}
        for way in self._ways.values():
            way()

    def __call__(self) -> None:
        """Take one measurement each way."""
        for name, way in self._ways.items():
            self._seconds[name].append(timed(way, CPU))

    @property
    def taken(self) -> int:
        """How many measurements there are of each."""
        return len(next(iter(self._seconds.values())))

    def since(self, first: int) -> float:
        """Return the median bytes per second of the faster way, from one measurement on."""
        return PROBE_BYTES / min(statistics.median(seconds[first:]) for seconds in self._seconds.values())

    def result(self) -> Bandwidth:
        """All measurements of the way that is faster."""
        name = min(self._seconds, key=lambda name: statistics.median(self._seconds[name]))
        how = f"PyTorch {name} {PROBE_BYTES >> 20:,} MiB of float32{self._pages}, with all threads"
        return Bandwidth(bytes_per_second=self.since(0), read=times(self._seconds[name]), bytes=PROBE_BYTES, how=how)


def times(seconds: list[float]) -> Times:
    """Sum up what was measured."""
    low, high = np.quantile(seconds, [0.25, 0.75])
    return Times(seconds=seconds, median=statistics.median(seconds), quartiles=(float(low), float(high)))


def weight_bytes(model: GPT, batch: int) -> int:
    """Return the bytes of weights that a step of ``batch`` sequences must read: all, of look-up tables their rows."""
    tables = [model.wte] if not model.config.tie_embeddings else []
    tables += [model.wpe] if model.config.has_table else []
    every = {tensor.data_ptr(): tensor.nbytes for tensor in model.tensors().values()}
    looked_up = [tensor for table in tables for tensor in (*table.parameters(), *table.buffers())]
    for tensor in looked_up:
        every[tensor.data_ptr()] = min(batch, len(tensor)) * tensor.nbytes // len(tensor)
    return sum(every.values())


def one_token_step(model: GPT, batch: int, context: int) -> tuple[Step, bool]:
    """Return a function that reads the last of ``context`` tokens of each sequence, again and again.

    The cache holds random keys and values. What a step adds to it is taken back, so that all steps do the same. The
    likeliest token is chosen, as greedy decoding does.

    Returns:
        The function, and whether the compiled step computes it.
    """
    compiled = serves(model, 4096)
    if compiled:
        cache = model.make_cache(1, context, chunk=CHUNK)
        fill(cache, 1, context - 1)
        texts = [Text(cache), *(Text(copy.deepcopy(cache)) for _ in range(batch - 1))]
        return _compiled_step(CompiledStep(model), texts), True
    cache = model.make_cache(batch, context, chunk=CHUNK)
    fill(cache, batch, context - 1)
    return _plain_step(model, cache, torch.zeros(batch, 1, dtype=torch.int64)), False


def _compiled_step(step: CompiledStep, texts: list[Text]) -> Step:
    ids = [0] * len(texts)

    def run() -> None:
        step(texts, ids).argmax(-1).tolist()
        for text in texts:
            text.length -= 1

    return run


def _plain_step(model: GPT, cache: Cache, ids: torch.Tensor) -> Step:
    modules = list(model.modules())

    @torch.inference_mode()
    def run() -> None:
        with evaluating(modules):
            model(ids, cache=cache, head=last_logits).argmax(-1).tolist()
        cache.truncate(1)

    return run


def _decode(models: Mapping[str, GPT], batch: int, context: int, rounds: int, probe: Probe) -> Iterator[DecodePoint]:
    steps = {dtype: one_token_step(model, batch, context) for dtype, model in models.items()}
    counts = {}
    for dtype, (step, _) in steps.items():
        step()
        counts[dtype] = max(1, round(TURN / timed(step, CPU)))
    seconds: dict[str, list[float]] = {dtype: [] for dtype in steps}
    first = probe.taken
    for _ in range(rounds):
        probe()
        for dtype, (step, _) in steps.items():
            seconds[dtype].append(timed(functools.partial(_repeat, step, counts[dtype]), CPU) / counts[dtype])
    for dtype, (_, compiled) in steps.items():
        model, measured = models[dtype], times(seconds[dtype])
        weights = weight_bytes(model, batch)
        _, cache = cost.decode_bytes(model.config, context - 1, model.cache_dtype.itemsize, batch=batch)
        yield DecodePoint(
            dtype=dtype,
            batch=batch,
            context=context,
            program="compiled step" if compiled else "plain PyTorch",
            steps=counts[dtype],
            step=measured,
            tokens_per_second=batch / measured.median,
            weight_bytes=weights,
            cache_bytes=cache,
            share=(weights + cache) / probe.since(first) / measured.median,
        )


def _repeat(step: Step, n: int) -> None:
    for _ in range(n):
        step()


@torch.inference_mode()
def compare_steps(model: GPT) -> tuple[float, float, int]:
    """Return how far the compiled step's logits are from plain PyTorch's at most, their standard deviation, and of how
    many tokens.
    """
    n_prompt, n_tokens = 8, min(24, model.config.context_length)
    ids = torch.randint(model.config.vocab_size, (n_tokens,), generator=torch.Generator().manual_seed(0)).tolist()
    text, _ = read_prompt(model, ids[:n_prompt], n_tokens)
    step = CompiledStep(model)
    actual = torch.cat([step([text], [token]) for token in ids[n_prompt:]])
    expected = model(torch.tensor([ids]))[0, n_prompt:]
    return (actual - expected).abs().max().item(), expected.std().item(), len(actual)


@torch.inference_mode()
def _prefill(models: Mapping[str, GPT], n_tokens: int, rounds: int) -> list[PrefillPoint]:
    prompt = torch.randint(
        next(iter(models.values())).config.vocab_size, (n_tokens,), generator=torch.Generator().manual_seed(0)
    )
    seconds: dict[str, list[float]] = {dtype: [] for dtype in models}
    for round_ in range(rounds + 1):  # the first warms up
        for dtype, model in models.items():
            started = time.perf_counter()
            (Compiled if serves(model, 4096) else Padded)(model, [prompt.tolist()], n_tokens).read()
            if round_:
                seconds[dtype].append(time.perf_counter() - started)
    read = {dtype: times(taken) for dtype, taken in seconds.items()}
    return [
        PrefillPoint(dtype=dtype, tokens=n_tokens, read=taken, tokens_per_second=n_tokens / taken.median)
        for dtype, taken in read.items()
    ]
