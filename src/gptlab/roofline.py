"""How fast could a machine generate? A prediction from what must be read and computed, and nothing else.

Generating one token in each of B sequences is two kinds of work, one after the other, and each takes as long as its
reading or its arithmetic, whichever is longer (the roofline of Williams, Waterman and Patterson 2009):

    seconds = max(weight bytes / bandwidth, B * projection FLOPs / peak)
            + max(key and value bytes / bandwidth, B * attention FLOPs / peak)

Weights are read once for the whole batch, keys and values once for each sequence. What a program spends on anything
else (launching operators, sampling) is not in it, so that it is a limit; only a model that fits into the processor's
caches may be faster, since it is read from there.

`report/templates/roofline.js` computes the same numbers in the report; the tests hold the two together.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from gptlab.config import ModelConfig
from gptlab.devices import timed
from gptlab.errors import GptlabError, nearest
from gptlab.model import cost

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}
"""Bytes of a number, by dtype."""
MEASURED = ("float32", "bfloat16", "float16")
TRIES = 7


@dataclass(frozen=True)
class Machine:
    """What a machine reaches at best.

    Attributes:
        bandwidth: bytes read from memory per second.
        flops: operations per second in matrix products of the dtype in question.
    """

    bandwidth: float
    flops: float


@dataclass(frozen=True)
class Step:
    """One decoding step, predicted.

    Attributes:
        batch: sequences, each of which gains a token.
        weight_bytes: read once for the batch.
        cache_bytes: keys and values read, of all sequences.
        weight_seconds: time of the projections, the feed-forward layers and the output head.
        cache_seconds: time of attention.
        limit: what the longer of the two waits for: reading ``weights``, reading the ``cache``, or ``arithmetic``.
    """

    batch: int
    weight_bytes: int
    cache_bytes: int
    weight_seconds: float
    cache_seconds: float
    limit: str

    @property
    def seconds(self) -> float:
        """Time of the whole step."""
        return self.weight_seconds + self.cache_seconds

    @property
    def tokens_per_second(self) -> float:
        """Tokens of all sequences together."""
        return self.batch / self.seconds


def predict(config: ModelConfig, machine: Machine, *, context: int, batch: int, dtype: str) -> Step:
    """Return the prediction for one more token in each of ``batch`` sequences.

    Args:
        config: the architecture.
        machine: its limits for ``dtype``.
        context: tokens of a sequence, the new one included; beyond a learned model's own it is arithmetic only.
        batch: sequences.
        dtype: of weights and cache, one of `BYTES`.

    Raises:
        GptlabError: an unknown dtype.
    """
    if dtype not in BYTES:
        raise GptlabError(f"no prediction for {dtype!r}{nearest(dtype, BYTES)}; there are {', '.join(BYTES)}")
    read = cost.decode_bytes(config, context - 1, BYTES[dtype], batch=batch)
    flops = cost.token_flops(config, context - 1)
    reading = [n / machine.bandwidth for n in read]
    computing = [batch * n / machine.flops for n in (flops.blocks + flops.head, flops.attention)]
    weights, cache = (max(pair) for pair in zip(reading, computing, strict=True))
    longer = 0 if weights >= cache else 1
    limit = ("weights", "cache")[longer] if reading[longer] >= computing[longer] else "arithmetic"
    return Step(batch, *read, weights, cache, limit)


def measure(device: torch.device, dtype: str) -> Machine:
    """Return what a machine reaches at this moment; it takes about a second. `how_measured` says how.

    Args:
        device: to measure on.
        dtype: of the products, as for `product_rate`.
    """
    return Machine(read_rate(device), product_rate(device, dtype))


def read_rate(device: torch.device) -> float:
    """Return the bytes per second at which memory is read."""
    large = torch.ones(_probe(device)[0], device=device)
    return large.nbytes / min(timed(large.sum, device) for _ in range(TRIES))


def product_rate(device: torch.device, dtype: str) -> float:
    """Return the operations per second of matrix products in ``float32``, ``bfloat16`` or ``float16``.

    Raises:
        GptlabError: another dtype.
    """
    if dtype not in MEASURED:
        raise GptlabError(
            f"no products of {dtype!r} to measure{nearest(dtype, MEASURED)}; there are {', '.join(MEASURED)}"
        )
    n = _probe(device)[1]
    a = torch.randn(n, n, device=device).to(getattr(torch, dtype))
    return 2 * n**3 / min(timed(functools.partial(torch.mm, a, a), device) for _ in range(TRIES))


def how_measured(device: torch.device) -> str:
    """Return in words how `measure` measures on a device."""
    numbers, n = _probe(device)
    return f"the best of {TRIES}: a sum over {numbers * 4 >> 20} MiB of float32, products of {n} x {n} matrices"


def _probe(device: torch.device) -> tuple[int, int]:
    """Return how many float32 are read, and the rows of the matrices that are multiplied."""
    return (2**28, 8192) if device.type == "cuda" else (2**26, 1024)


def balance(config: ModelConfig, context: int) -> float:
    """Return how many sequences of ``context`` tokens it takes until their keys and values outweigh the weights.

    In bytes read for a step, whatever the dtype; the rows of the embeddings are not counted.
    """
    weights, _ = cost.decode_bytes(config, context - 1, 1, batch=0)
    _, cache = cost.decode_bytes(config, context - 1, 1, batch=1)
    return weights / cache
