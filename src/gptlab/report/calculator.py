"""The calculator of a page: what it starts from, and what it must find before it shows itself."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from gptlab import roofline
from gptlab.config import ModelConfig, divisors
from gptlab.model import cost

FIELDS = (
    *("vocab_size", "context_length", "n_layer", "n_head", "n_kv_head", "n_embd", "n_inner"),
    *("position", "norm", "mlp", "bias"),
)
"""What of a configuration the calculator needs, beside whether the embeddings are tied."""
CHECKS: tuple[dict[str, int], ...] = (
    {"context": 1024, "batch": 1},
    {"context": 1024, "batch": 32, "n_kv_head": 1},
    {"context": 16384, "batch": 1, "window": 256},
    {"context": 100, "batch": 7, "window": 256},
    {"context": 65536, "batch": 256, "n_kv_head": 1, "window": 1024},
)
"""What the page computes again when it is opened, for each size, before it shows anything."""


def calculator(
    configs: Mapping[str, ModelConfig], machine: roofline.Machine, dtype: str, machine_words: str
) -> dict[str, Any]:
    """Return everything that a calculator starts from.

    Args:
        configs: what can be chosen, by name, with plain attention: what to change is the calculator's own question.
        machine: its limits for ``dtype``.
        dtype: of weights and cache.
        machine_words: the hardware in a few words, without markup.
    """
    return {
        "models": {name: {**_fields(config), "kv": divisors(config.n_head)} for name, config in configs.items()},
        "size": roofline.BYTES[dtype],
        "dtype": dtype,
        "bandwidth": machine.bandwidth,
        "peak": machine.flops,
        "machine": machine_words,
        "checks": [check(name, config, at, machine, dtype) for name, config in configs.items() for at in CHECKS],
    }


def _fields(config: ModelConfig) -> dict[str, Any]:
    return {**{name: getattr(config, name) for name in FIELDS}, "tie_embeddings": config.tie_embeddings, "window": None}


def check(name: str, config: ModelConfig, at: dict[str, int], machine: roofline.Machine, dtype: str) -> dict[str, Any]:
    """Return a question to the calculator and the answer of `roofline.predict`."""
    changed = {key: value for key, value in at.items() if key in ("n_kv_head", "window")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a window that is longer than the context is the calculator's business
        model = ModelConfig.from_dict({**config.to_dict(), **changed})
    step = roofline.predict(model, machine, context=at["context"], batch=at["batch"], dtype=dtype)
    return {
        "model": name,
        **at,
        "parameters": sum(cost.parameters(model).values()),
        "weightBytes": step.weight_bytes,
        "cacheBytes": step.cache_bytes,
        "seconds": step.seconds,
        "limit": step.limit,
    }
