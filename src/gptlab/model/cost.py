"""What a model costs, from its configuration alone; checked in the tests against real modules and tensors.

All counts are exact integers: a multiplication and an addition are two floating-point operations, softmax, norms and
activations are not counted (they are well under 1%).
"""

from __future__ import annotations

from dataclasses import dataclass

from gptlab.config import ModelConfig
from gptlab.model.masks import Visibility


def visibilities(config: ModelConfig) -> list[Visibility]:
    """What each layer's queries may see."""
    layers = zip(config.windows, config.dilations, strict=True)
    return [Visibility(window, config.sinks if window else 0, dilation) for window, dilation in layers]


def parameters(config: ModelConfig) -> dict[str, int]:
    """Return the number of parameters of every part; the sum is the model's size.

    A tied output head adds none: it is the token embedding.
    """
    c, inner, bias = config.n_embd, config.inner, int(config.bias)
    up = _projections_up(config)
    kv = 2 * config.kv_heads * config.head_dim
    parts = {
        "token embedding": config.vocab_size * c,
        "position embedding": config.context_length * c * config.has_table,
        "attention: queries, keys, values": config.n_layer * (c + bias) * (c + kv),
        "attention: output": config.n_layer * (c + bias) * c,
        "feed-forward": config.n_layer * (up * (c + bias) * inner + (inner + bias) * c),
        "layer norms": (2 * config.n_layer + 1) * (1 + bias * (config.norm == "layer")) * c,
    }
    if not config.tie_embeddings:
        parts["output head"] = config.vocab_size * c
    return parts


def _projections_up(config: ModelConfig) -> int:
    """How many projections a feed-forward network has to its inner width."""
    return 2 if config.mlp == "swiglu" else 1


def visible_keys(visibility: Visibility, position: int) -> int:
    """Return how many keys the query at ``position`` sees."""
    if visibility.window is None:
        return position + 1
    near = min(visibility.window, position // visibility.dilation + 1)
    oldest = position - (near - 1) * visibility.dilation
    sinks = range(min(visibility.sinks, position + 1))
    beside = sum(s < oldest or (position - s) % visibility.dilation > 0 for s in sinks)
    return near + beside


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of one part each: the projections of all blocks, attention itself, the output head."""

    blocks: int
    attention: int
    head: int

    @property
    def total(self) -> int:
        """All three."""
        return self.blocks + self.attention + self.head


def token_flops(config: ModelConfig, position: int) -> Flops:
    """Return the operations of one token at ``position``, with everything before it in a cache."""
    c, kv = config.n_embd, 2 * config.kv_heads * config.head_dim
    blocks = 2 * config.n_layer * (c * (c + kv) + c * c + (_projections_up(config) + 1) * c * config.inner)
    attention = sum(4 * c * visible_keys(visibility, position) for visibility in visibilities(config))
    return Flops(blocks, attention, 2 * c * config.vocab_size)


def forward_flops(config: ModelConfig, length: int) -> Flops:
    """Return the operations of a forward pass over one sequence, with the logits of every position."""
    first = token_flops(config, 0)
    attention = 0
    for visibility in visibilities(config):
        # Past this position every query sees as many keys as the last, or one more than the query before it.
        settled = length if visibility.window is None else min(length, visibility.capacity(length, 1))
        attention += sum(visible_keys(visibility, position) for position in range(settled))
        if settled < length:
            attention += (length - settled) * visible_keys(visibility, length - 1)
    return Flops(length * first.blocks, 4 * config.n_embd * attention, length * first.head)


def training_flops(config: ModelConfig, length: int) -> int:
    """Return the operations of a training step on one sequence: the backward pass is two forward passes."""
    return 3 * forward_flops(config, length).total


def cache_bytes_per_token(config: ModelConfig, bytes_per_number: int) -> int:
    """Return the bytes that one token adds to the key/value cache: a key and a value in every layer."""
    return 2 * config.n_layer * config.kv_heads * config.head_dim * bytes_per_number


def cache_bytes(config: ModelConfig, length: int, bytes_per_number: int, *, batch: int = 1, chunk: int = 1) -> int:
    """Return the bytes that a cache for ``batch`` sequences of ``length`` tokens allocates.

    Args:
        config: the architecture.
        length: tokens of a sequence.
        bytes_per_number: 4 for float32, 2 for bfloat16.
        batch: sequences.
        chunk: tokens that one call may bring, as in `GPT.make_cache`.
    """
    slots = sum(visibility.capacity(length, chunk) for visibility in visibilities(config))
    return 2 * batch * slots * config.kv_heads * config.head_dim * bytes_per_number


def decode_bytes(config: ModelConfig, position: int, bytes_per_number: int, *, batch: int = 1) -> tuple[int, int]:
    """Return the bytes that generating one token in each of ``batch`` sequences must read: (weights, keys and values).

    Weights are read once for the whole batch; of the two embedding tables only the head's use counts in full.
    """
    parts = parameters(config)
    rows = batch * config.n_embd * (1 + config.has_table)
    head = config.vocab_size * config.n_embd
    weights = sum(n for name, n in parts.items() if "embedding" not in name and name != "output head") + head + rows
    keys = sum(visible_keys(visibility, position) for visibility in visibilities(config))
    return weights * bytes_per_number, 2 * batch * keys * config.kv_heads * config.head_dim * bytes_per_number


def receptive_field(config: ModelConfig) -> int | None:
    """Return how far an output reaches back through all layers, its own position included; None: to the beginning.

    With dilation not every position between can reach it. Sinks are seen from everywhere and are not counted.
    """
    field = 1
    for visibility in visibilities(config):
        if visibility.span is None:
            return None
        field += visibility.span - 1
    return field
