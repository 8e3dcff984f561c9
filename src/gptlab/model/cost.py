"""What a model costs, from its configuration alone; checked in the tests against real modules."""

from __future__ import annotations

from gptlab.config import ModelConfig


def parameters(config: ModelConfig) -> dict[str, int]:
    """Return the number of parameters of every part; the sum is the model's size.

    A tied output head adds none: it is the token embedding.
    """
    c, inner, bias = config.n_embd, config.inner, int(config.bias)
    kv = 2 * config.kv_heads * config.head_dim
    parts = {
        "token embedding": config.vocab_size * c,
        "position embedding": config.context_length * c * (config.position == "learned"),
        "attention: queries, keys, values": config.n_layer * (c + bias) * (c + kv),
        "attention: output": config.n_layer * (c + bias) * c,
        "feed-forward": config.n_layer * ((c + bias) * inner + (inner + bias) * c),
        "layer norms": (2 * config.n_layer + 1) * (1 + bias) * c,
    }
    if not config.tie_embeddings:
        parts["output head"] = config.vocab_size * c
    return parts


def cache_bytes_per_token(config: ModelConfig, bytes_per_number: int) -> int:
    """Return the bytes that one token adds to the key/value cache: a key and a value in every layer."""
    return 2 * config.n_layer * config.kv_heads * config.head_dim * bytes_per_number
