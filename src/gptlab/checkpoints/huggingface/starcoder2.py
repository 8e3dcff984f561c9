"""StarCoder2 of transformers: GPT-2's blocks with rotary positions, grouped queries and one window for all layers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from gptlab.checkpoints.files import Lazy
from gptlab.checkpoints.huggingface import rotary
from gptlab.checkpoints.huggingface.fields import Field, activation
from gptlab.config import ModelConfig
from gptlab.errors import GptlabError

ARCHITECTURE = "Starcoder2ForCausalLM"
ACTIVATIONS = {"gelu_tanh": "gelu_pytorch_tanh"}
FIELDS = {
    **rotary.FIELDS,
    "vocab_size": Field(("vocab_size",), 49152),
    "n_layer": Field(("num_hidden_layers",), 30),
    "n_head": Field(("num_attention_heads",), 24),
    "n_kv_head": Field(("num_key_value_heads",), 2),
    "n_embd": Field(("hidden_size",), 3072),
    "n_inner": Field(("intermediate_size",), 12288),
    "activation": Field(("hidden_act",), "gelu_pytorch_tanh"),
    "norm_eps": Field(("norm_epsilon",), 1e-5),
    "tie_embeddings": Field(("tie_word_embeddings",), True),
    "window": Field(("sliding_window",), None),
    "use_bias": Field(("use_bias",), True),  # not a field of `ModelConfig`
}
NAMES = {**rotary.NAMES, "mlp.c_fc": "mlp.c_fc", "mlp.c_proj": "mlp.c_proj"}


def read_config(path: Path, values: Mapping[str, Any]) -> ModelConfig:
    """Translate the contents of a `config.json`."""
    settings = rotary.read_rotary(path, values, FIELDS, "StarCoder2's configuration")
    if not isinstance(settings.pop("use_bias"), bool):
        raise GptlabError(f"{path}: use_bias must be true or false, got {values['use_bias']!r}")
    return rotary.make_config(path, {**settings, "activation": activation(path, "hidden_act", settings["activation"])})


def read_tensors(readers: Lazy, config: ModelConfig) -> Lazy:
    """Return the tensors by gptlab's names and in its layout; projections without a bias get one of 0."""
    tensors = rotary.read_projections(readers, NAMES)
    if not any(re.fullmatch(r"h\.\d+\.(attn|mlp)\.\w+\.bias", name) for name in tensors):  # use_bias=false
        tensors |= rotary.no_biases(config, "")
    return tensors


def write_config(config: ModelConfig) -> dict[str, Any]:
    """Return what `config.json` says of a model with rotary positions and full attention or one window."""
    return {
        **rotary.write_rotary(config),
        "hidden_act": ACTIVATIONS.get(config.activation, config.activation),
        "norm_epsilon": config.norm_eps,
        "sliding_window": config.windows[0],
        "use_bias": True,
        "residual_dropout": config.dropout,
        "embedding_dropout": config.dropout,
    }


def write_tensors(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Return the tensors by the family's names and in its layout."""
    return rotary.write_projections(state, config, NAMES)
