"""When does it pay? What generating a token costs a variant, on a machine with given limits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gptlab.config import ModelConfig
from gptlab.errors import GptlabError
from gptlab.model import cost
from gptlab.roofline import BYTES, Machine, Step, predict


@dataclass(frozen=True)
class Costs:
    """One more token in each of a batch of sequences.

    Attributes:
        context: tokens of a sequence, the new one included.
        cache_bytes: that the caches of all sequences hold; of these a step reads ``step.cache_bytes``.
        step: what is read and computed, how long that takes at least, and what it waits for.
    """

    context: int
    cache_bytes: int
    step: Step


def costs(
    config: ModelConfig, contexts: Sequence[int], machine: Machine, *, batch: int = 1, dtype: str = "bfloat16"
) -> list[Costs]:
    """Return what generating costs at each of some contexts, by the report's own prediction (`gptlab.roofline`).

    Args:
        config: the variant.
        contexts: tokens of a sequence; past the end of learned positions it is arithmetic only.
        machine: its limits for ``dtype``: figures of one's own, or `gptlab.roofline.measure`.
        batch: sequences.
        dtype: of weights and cache, one of `gptlab.roofline.BYTES`.

    Raises:
        GptlabError: an unknown dtype, or no token or sequence.
    """
    if batch < 1 or min(contexts, default=1) < 1:
        raise GptlabError(f"contexts and batch must be at least 1, got {list(contexts)} and {batch}")
    steps = [(n, predict(config, machine, context=n, batch=batch, dtype=dtype)) for n in contexts]
    return [Costs(n, cost.cache_bytes(config, n, BYTES[dtype], batch=batch), step) for n, step in steps]
