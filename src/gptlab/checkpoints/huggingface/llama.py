"""Llama of transformers: rotary positions, grouped queries, RMSNorm and SwiGLU, as a rule without biases."""

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

ARCHITECTURE = "LlamaForCausalLM"
FIELDS = {
    **rotary.FIELDS,
    "context_length": Field(("max_position_embeddings",), 2048),
    "n_inner": Field(("intermediate_size",), 11008),
    "norm_eps": Field(("rms_norm_eps",), 1e-6),
    # Not fields of `ModelConfig`.
    "attention_bias": Field(("attention_bias",), False),
    "mlp_bias": Field(("mlp_bias",), False),
}
NAMES = {**rotary.NAMES, "mlp.gate_proj": "mlp.c_gate", "mlp.up_proj": "mlp.c_fc", "mlp.down_proj": "mlp.c_proj"}


def read_config(path: Path, values: Mapping[str, Any]) -> ModelConfig:
    """Translate the contents of a `config.json`. A model with biases in attention or feed-forward alone has both."""
    settings = rotary.read_rotary(path, values, FIELDS, "Llama's configuration")
    biases = [settings.pop(name) for name in ("attention_bias", "mlp_bias")]
    for name, value in zip(("attention_bias", "mlp_bias"), biases, strict=True):
        if not isinstance(value, bool):
            raise GptlabError(f"{path}: {name} must be true or false, got {value!r}")
    return make_gated(path, {**settings, "bias": any(biases)})


def make_gated(path: Path, settings: Mapping[str, Any]) -> ModelConfig:
    """Return the configuration of a model with RMSNorm and SwiGLU.

    Raises:
        GptlabError: an impossible value, or a gate of another activation.
    """
    rest = {name: value for name, value in settings.items() if name != "activation"}
    if (act := settings["activation"]) != "silu" and activation(path, "hidden_act", act) != "silu":
        raise GptlabError(
            f"{path} has hidden_act={act!r}, and gptlab computes gates with silu only; get a checkpoint of that"
        )
    return rotary.make_config(path, {**rest, "norm": "rms", "mlp": "swiglu"})


def read_tensors(readers: Lazy, config: ModelConfig) -> Lazy:
    """Return the tensors by gptlab's names and in its layout; where one part has biases, the other gets them of 0."""
    tensors = rotary.read_projections(readers, NAMES)
    has = {part: any(re.fullmatch(rf"h\.\d+\.{part}\.\w+\.bias", name) for name in tensors) for part in ("attn", "mlp")}
    if config.bias and any(has.values()):
        for part in (part for part in has if not has[part]):
            tensors |= rotary.no_biases(config, part)
    return tensors


def write_config(config: ModelConfig) -> dict[str, Any]:
    """Return what `config.json` says of a model with rotary positions, RMSNorm, SwiGLU and full attention."""
    biases = {"attention_bias": config.bias, "mlp_bias": config.bias}
    return {**rotary.write_rotary(config), "hidden_act": "silu", "rms_norm_eps": config.norm_eps, **biases}


def write_tensors(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Return the tensors by the family's names and in its layout."""
    return rotary.write_projections(state, config, NAMES)
