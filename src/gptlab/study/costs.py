"""What each variant costs, from its configuration alone, and what its changes would cost in GPT-2's four sizes."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from gptlab.config import ModelConfig, divisors
from gptlab.generation.padded import CHUNK
from gptlab.model import cost
from gptlab.model.cache import Cache
from gptlab.study.results import CacheSize, Counterpart, Flops
from gptlab.study.variants import KIND_OF_FIELD, changes_of

SIZES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
SIZE_CONTEXTS = (1024, 4096, 16384)
MOST_ALLOCATED = 2**28
"""Bytes of the largest cache that is allocated to be measured."""


def parameters(config: ModelConfig) -> dict[str, int]:
    """Return the parameters of every part, and their ``total``."""
    parts = cost.parameters(config)
    return {**parts, "total": sum(parts.values())}


def flops_per_token(config: ModelConfig, contexts: Sequence[int]) -> Flops:
    """Return the operations of one token after ``contexts`` tokens, and of one token in training, on average."""
    length = config.context_length
    return Flops(
        forward={str(context): cost.token_flops(config, context - 1).total for context in contexts},
        training=cost.training_flops(config, length) / length,
    )


def cache_sizes(config: ModelConfig, contexts: Sequence[int], batches: Sequence[int]) -> list[CacheSize]:
    """Return the bytes of bfloat16 caches by context and batch; those of modest size are allocated and counted.

    Learned positions end with the context; the figures beyond it are those of the same model with more of them.
    """
    sizes = []
    for context in contexts:
        for batch in batches:
            n_bytes = cost.cache_bytes(config, context, 2, batch=batch)
            allocated = None
            if cost.cache_bytes(config, context, 2, batch=batch, chunk=CHUNK) <= MOST_ALLOCATED:
                cache = Cache(
                    cost.visibilities(config),
                    batch=batch,
                    length=context,
                    chunk=CHUNK,
                    n_kv_head=config.kv_heads,
                    head_dim=config.head_dim,
                    dtype=torch.bfloat16,
                    device=torch.device("cpu"),
                )
                allocated = cache.nbytes
            sizes.append(CacheSize(context=context, batch=batch, dtype="bfloat16", bytes=n_bytes, allocated=allocated))
    return sizes


def four_sizes(configs: Mapping[str, ModelConfig], base: str) -> dict[str, dict[str, Counterpart]]:
    """Return for GPT-2's sizes what each variant's changes would give there, from cost.py alone.

    Key heads keep the ratio to query heads as nearly as the size allows, a single one stays single, and windows keep
    their share of the context. A variant that changes anything else has no counterpart and is left out.

    Args:
        configs: the study's variants by name.
        base: the name of the one that the others are compared with.
    """
    sizes: dict[str, dict[str, Counterpart]] = {}
    for size in SIZES:
        sizes[size] = {}
        for name, config in configs.items():
            scaled = _scaled(size, config, configs[base])
            if scaled is not None:
                sizes[size][name] = counterpart(size, scaled)
    return sizes


def counterpart(size: str, config: ModelConfig) -> Counterpart:
    """Return what one of GPT-2's sizes costs with the changes of a configuration."""
    cache = [(n, cost.cache_bytes(config, n, 2)) for n in SIZE_CONTEXTS]
    return Counterpart(
        changes=changes_of(config, ModelConfig.preset(size)),
        parameters=parameters(config)["total"],
        cache=[CacheSize(context=n, batch=1, dtype="bfloat16", bytes=n_bytes) for n, n_bytes in cache],
        flops_per_token={str(n): cost.token_flops(config, n - 1).total for n in SIZE_CONTEXTS},
    )


def _scaled(size: str, config: ModelConfig, base: ModelConfig) -> ModelConfig | None:
    """Make a variant's changes in another size."""
    large = ModelConfig.preset(size)
    wanted = changes_of(config, base)
    if not wanted.keys() <= KIND_OF_FIELD.keys():
        return None
    if "n_kv_head" in wanted:
        ratio = config.n_head / config.kv_heads
        off = lambda n: abs(math.log(large.n_head / n / ratio))  # noqa: E731
        wanted["n_kv_head"] = 1 if config.kv_heads == 1 else min(divisors(large.n_head), key=off)
    share = large.context_length / base.context_length
    layers = [layer * config.n_layer // large.n_layer for layer in range(large.n_layer)]
    for name, values in (("window", config.windows), ("dilation", config.dilations)):
        if name in wanted:
            several = [values[layer] for layer in layers]
            if name == "window":
                several = [None if w is None else max(round(w * share), 1) for w in several]
            wanted[name] = several if len(set(several)) > 1 else several[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a window as long as the context was remarked on in the study's own size
        return dataclasses.replace(large, **_plain(wanted, config))


def _plain(wanted: Mapping[str, Any], config: ModelConfig) -> dict[str, Any]:
    """Fields as the dataclass takes them: `changes` gives those of JSON."""
    return {**wanted, "rope": config.rope} if "rope" in wanted else dict(wanted)
