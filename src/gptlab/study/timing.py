"""Single steps of what is timed, and the way they are timed against each other."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch

from gptlab.devices import timed
from gptlab.generation.compiled.decoder import can_serve, serves
from gptlab.generation.compiled.step import CompiledStep, Text
from gptlab.generation.padded import CHUNK, last_logits, nothing
from gptlab.model.cache import Cache
from gptlab.model.gpt import GPT
from gptlab.training.data import Batch
from gptlab.training.optimizer import make_optimizers
from gptlab.training.parallel import Group
from gptlab.training.recipe import Recipe
from gptlab.training.step import DTYPES, gradients

Step = Callable[[], object]

COMPILED, PLAIN = "by the compiled step", "in plain PyTorch"
ROUNDS = 9
"""Most rounds at one point, so most steps that a cache must have room for."""


def computed_by(model: GPT) -> str:
    """Say what computes a decoding step of this model; builds the compiled step where it would serve."""
    on_cpu = model.wte.weight.device.type == "cpu"
    return COMPILED if on_cpu and can_serve() and serves(model, 1) else PLAIN


def decoding_step(model: GPT, batch: int, context: int) -> Step:
    """Return a function that brings one token to each of ``batch`` sequences that hold ``context`` already.

    The caches are filled with random keys and values, which cost nothing to compute; each call adds a token to them.
    The step is the one that generates, compiled where that can be.
    """
    if computed_by(model) == COMPILED:
        texts = []
        for _ in range(batch):
            own = model.make_cache(1, context + ROUNDS + 2, chunk=CHUNK)
            fill(own, 1, context)
            texts.append(Text(own))
        compiled = CompiledStep(model)
        return lambda: compiled(texts, [0] * batch)
    cache = model.make_cache(batch, context + ROUNDS + 2, chunk=CHUNK)
    ids = torch.zeros(batch, 1, dtype=torch.int64, device=model.wte.weight.device)
    fill(cache, batch, context)

    @torch.inference_mode()
    def step() -> None:
        model(ids, cache=cache, head=last_logits)

    return step


def fill(cache: Cache, batch: int, n: int) -> None:
    """Append ``n`` tokens with random keys and values to an empty cache of ``batch`` rows."""
    like = cache.layers[0].k
    draw = torch.Generator().manual_seed(0)
    for start in range(0, n, CHUNK):
        size = min(CHUNK, n - start)
        new = torch.randn(batch, like.shape[1], size, like.shape[3], generator=draw).to(like)
        tokens = cache.describe(torch.zeros(batch, size, dtype=torch.int64, device=like.device))
        for layer in cache.layers:
            layer.append(new, new, tokens)


def prefill_step(model: GPT, batch: int, context: int) -> Step:
    """Return a function that reads prompts of ``context`` tokens, as generation does, up to the last logits."""
    ids = torch.zeros(batch, context, dtype=torch.int64, device=model.wte.weight.device)

    @torch.inference_mode()
    def step() -> None:
        cache = model.make_cache(batch, context, chunk=CHUNK)
        for start in range(0, context, CHUNK):
            part = ids[:, start : start + CHUNK]
            model(part, cache=cache, head=last_logits if start + CHUNK >= context else nothing)

    return step


def training_step(model: GPT, rows: int, recipe: Recipe) -> Step:
    """Return a function that takes one training step on ``rows`` windows of random tokens."""
    config, device = model.config, model.wte.weight.device
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(config.vocab_size, (rows, config.context_length + 1), generator=draw)
    batch = Batch(tokens[:, :-1], tokens[:, 1:], None, torch.arange(rows))
    optimizers = make_optimizers(model, recipe.optimizer)
    model.train()

    def step() -> None:
        gradients(model, batch, recipe.batch.micro, DTYPES[recipe.train.dtype], Group(0, 1, device))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return step


def take_turns(steps: Mapping[str, Step], device: torch.device, seconds: float) -> dict[str, float]:
    """Return the median seconds of each step: after one call that does not count, all take turns in every round.

    Args:
        steps: what to time, by name.
        device: where they compute.
        seconds: about how long the whole may take; at least one round and at most `ROUNDS` are run.
    """
    started = time.perf_counter()
    for step in steps.values():
        step()
    seconds_of: dict[str, list[float]] = {name: [] for name in steps}
    for done in range(1, ROUNDS + 1):
        for name, step in steps.items():
            seconds_of[name].append(timed(step, device))
        if (time.perf_counter() - started) * (done + 2) / (done + 1) > seconds:
            break
    return {name: statistics.median(times) for name, times in seconds_of.items()}
