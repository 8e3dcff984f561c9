"""How fast could a machine generate? A prediction from what must be read and computed, and nothing else.

Generating one token in each of B sequences is two kinds of work, one after the other, and each takes as long as its
reading or its arithmetic, whichever is longer (the roofline of Williams, Waterman and Patterson 2009):

    seconds = max(weight bytes / bandwidth, B * projection FLOPs / peak)
            + max(key and value bytes / bandwidth, B * attention FLOPs / peak)

Weights are read once for the whole batch, keys and values once for each sequence. What a program spends on anything
else (launching operators, sampling) is not in it, so that it is a limit; only a model that fits into the processor's
caches may be faster, since it is read from there.

`templates/roofline.js` computes the same numbers in the report; the tests hold the two together.
"""

from __future__ import annotations

from dataclasses import dataclass

from gptlab.config import ModelConfig
from gptlab.errors import GptlabError, nearest
from gptlab.model import cost
from gptlab.study.results import Timings

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}
"""Bytes of a number, by dtype."""


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


def machine_of(timings: Timings | None) -> Machine | None:
    """Return the limits that a study measured, for the dtype that it timed; None where it measured none."""
    flops = timings.peaks.flops.get(timings.dtype) if timings else None
    return Machine(timings.peaks.bandwidth_bytes_per_second, flops) if timings and flops else None


def balance(config: ModelConfig, context: int) -> float:
    """Return how many sequences of ``context`` tokens it takes until their keys and values outweigh the weights.

    In bytes read for a step, whatever the dtype; the rows of the embeddings are not counted.
    """
    weights, _ = cost.decode_bytes(config, context - 1, 1, batch=0)
    _, cache = cost.decode_bytes(config, context - 1, 1, batch=1)
    return weights / cache
