"""Mistral of transformers: Llama with one window for all layers, and never a bias."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gptlab.checkpoints.huggingface import llama, rotary
from gptlab.checkpoints.huggingface.fields import Field
from gptlab.checkpoints.huggingface.llama import read_tensors, write_tensors
from gptlab.config import ModelConfig

__all__ = ["ARCHITECTURE", "FIELDS", "read_config", "read_tensors", "write_config", "write_tensors"]

ARCHITECTURE = "MistralForCausalLM"
FIELDS = {
    **rotary.FIELDS,
    "context_length": Field(("max_position_embeddings",), 131072),
    "n_kv_head": Field(("num_key_value_heads",), 8),
    "n_inner": Field(("intermediate_size",), 14336),
    "norm_eps": Field(("rms_norm_eps",), 1e-6),
    "window": Field(("sliding_window",), 4096),
}


def read_config(path: Path, values: Mapping[str, Any]) -> ModelConfig:
    """Translate the contents of a `config.json`."""
    settings = rotary.read_rotary(path, values, FIELDS, "Mistral's configuration")
    return llama.make_gated(path, {**settings, "bias": False})


def write_config(config: ModelConfig) -> dict[str, Any]:
    """Return what `config.json` says of a model with rotary positions, RMSNorm, SwiGLU and one window or none."""
    values = {**llama.write_config(config), "sliding_window": config.windows[0]}
    return {name: value for name, value in values.items() if name not in ("attention_bias", "mlp_bias")}
