"""What families with rotary positions share: StarCoder2, Llama and Mistral.

Queries, keys and values are three projections there; pairs of channels are rotated in the "half" layout, as here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptlab.checkpoints.files import Lazy
from gptlab.checkpoints.huggingface.fields import Field, Fields, read_fields
from gptlab.config import ModelConfig
from gptlab.errors import GptlabError

FIELDS = {
    "vocab_size": Field(("vocab_size",), 32000),
    "context_length": Field(("max_position_embeddings",), 4096),
    "n_layer": Field(("num_hidden_layers",), 32),
    "n_head": Field(("num_attention_heads",), 32),
    "n_kv_head": Field(("num_key_value_heads",), None),
    "n_embd": Field(("hidden_size",), 4096),
    "n_inner": Field(("intermediate_size",), None),
    "activation": Field(("hidden_act",), "silu"),
    "tie_embeddings": Field(("tie_word_embeddings",), False),
    # Not fields of `ModelConfig`.
    "head_dim": Field(("head_dim",), None),
    "theta": Field(("rope_theta",), None),
    "rotation": Field(("rope_parameters", "rope_scaling"), None),
    "share": Field(("partial_rotary_factor",), None),
    "trained": Field(("original_max_position_embeddings",), None),
}
"""The fields under the names that all three have, with Llama's defaults, which each family puts its own in place of."""
NAMES = {
    "embed_tokens": "wte",
    "norm": "ln_f",
    "input_layernorm": "ln_1",
    "post_attention_layernorm": "ln_2",
    "self_attn.o_proj": "attn.c_proj",
}
"""Modules that all three have, and gptlab's names of them."""
_LAYER = re.compile(r"layers\.(\d+)\.(.+)\.(weight|bias)")
_LEGACY = re.compile(r"(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")


def read_rotary(path: Path, values: Mapping[str, Any], fields: Fields, family: str) -> dict[str, Any]:
    """Return the value of every field, with `position` and `rope` in place of those about rotation.

    Reads the names of transformers 4 (`rope_theta`, `rope_scaling`) and 5 (`rope_parameters`).

    Args:
        path: the file, for messages.
        values: its contents.
        fields: of the family, those of `FIELDS` among them.
        family: its name, for messages.

    Raises:
        GptlabError: as `read_fields`, or a way to rotate that gptlab does not compute.
    """
    stated = {key: value for key, value in values.items() if key not in ("rope_parameters", "rope_scaling")}
    settings = read_fields(path, stated, fields, family)
    share, trained = settings.pop("share"), settings.pop("trained")
    settings.pop("rotation")
    rotation = {**_object(path, "rope_scaling", values), **_object(path, "rope_parameters", values)}
    theta = rotation.pop("rope_theta", None) or settings["theta"]
    del settings["theta"]
    share = rotation.pop("partial_rotary_factor", share)
    kind = rotation.pop("rope_type", rotation.get("type", "default"))
    trained = rotation.pop("original_max_position_embeddings", trained)
    factor = rotation.pop("factor", None)
    rotation.pop("type", None)
    usual = {"beta_fast": 32, "beta_slow": 1, "truncate": True, "attention_factor": None}
    if kind == "llama3":
        usual = {"low_freq_factor": 1, "high_freq_factor": 4}
    unusual = {name: value for name, value in rotation.items() if value is not None and value != usual.get(name)}
    if kind not in ("default", "linear", "yarn", "llama3") or unusual or share not in (None, 1):
        said = {"rope_type": kind, **unusual, **({} if share in (None, 1) else {"partial_rotary_factor": share})}
        raise GptlabError(f"{path} asks for rotary positions with {said}, which gptlab does not compute")
    rope: dict[str, Any] = {"theta": 10000.0 if theta is None else theta}
    if kind != "default":
        rope |= {"scaling": kind, "factor": factor}
    if kind == "llama3":  # such models were trained on texts as long as their context
        rope |= {} if trained is None else {"trained_length": trained}
    if kind == "yarn" and trained is not None:
        longest = settings["context_length"]
        if factor is None and _is_number(longest) and _is_number(trained):
            rope["factor"] = factor = longest / trained
        if _is_number(factor) and _is_number(trained) and longest == int(trained * factor):
            settings["context_length"] = trained  # as `write_rotary` writes it
        else:
            rope["trained_length"] = trained
    # A rotation without settings of its own is None.
    return {**settings, "position": "rope", "rope": None if rope == {"theta": 10000.0} else rope}


def make_config(path: Path, settings: Mapping[str, Any]) -> ModelConfig:
    """Return the configuration of the fields of `ModelConfig` and `head_dim`.

    Raises:
        GptlabError: an impossible value, or heads of a width that gptlab does not compute.
    """
    config = ModelConfig.from_dict({name: value for name, value in settings.items() if name != "head_dim"})
    if settings["head_dim"] not in (None, config.head_dim):
        raise GptlabError(
            f"{path} has head_dim={settings['head_dim']!r}, which gptlab computes with {config.head_dim} only"
        )
    return config


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 1 <= value < math.inf


def _object(path: Path, name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    value = values.get(name) or {}
    if not isinstance(value, dict):
        raise GptlabError(f"{path}: {name} must be an object, got {value!r}")
    return value


def write_rotary(config: ModelConfig) -> dict[str, Any]:
    """Return what `config.json` says under the names that all three families have."""
    rope: dict[str, Any] = {"rope_type": "default"}
    theta = 10000.0 if config.rope is None else float(config.rope.theta)
    longest = config.context_length
    if config.rope is not None and config.rope.scaling is not None:
        rope = {"rope_type": config.rope.scaling, "factor": float(config.rope.factor)}
        if config.rope.scaling == "yarn":
            rope["original_max_position_embeddings"] = config.trained_length
            # Not the context: transformers 4 takes the factor from the two lengths.
            longest = int(config.trained_length * config.rope.factor)
        elif config.rope.scaling == "llama3":
            rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
            rope["original_max_position_embeddings"] = config.trained_length
    return {
        "vocab_size": config.vocab_size,
        "max_position_embeddings": longest,
        "hidden_size": config.n_embd,
        "intermediate_size": config.inner,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.kv_heads,
        "rope_theta": theta,  # for transformers 4, as is rope_scaling
        **({"rope_scaling": dict(rope)} if rope["rope_type"] != "default" else {}),
        "rope_parameters": {**rope, "rope_theta": theta},
        "attention_dropout": config.dropout,
    }


def read_projections(readers: Lazy, names: Mapping[str, str]) -> Lazy:
    """Return the tensors by gptlab's names and in its layout; names that are not known stay as they are.

    Args:
        readers: by the family's names.
        names: of modules, those within a layer without its number, and gptlab's.
    """
    tensors: Lazy = {}
    parts: dict[str, dict[str, Callable[[], Tensor]]] = {}
    for name, get in readers.items():
        layer = _LAYER.fullmatch(name)
        if _LEGACY.fullmatch(name):
            continue
        if layer and layer[2] in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"):
            parts.setdefault(f"h.{layer[1]}.attn.c_attn.{layer[3]}", {})[layer[2]] = get
        elif layer and layer[2] in names:
            tensors[f"h.{layer[1]}.{names[layer[2]]}.{layer[3]}"] = get
        else:
            module, _, kind = name.rpartition(".")
            tensors[f"{names[module]}.{kind}" if module in names else name] = get
    return tensors | {name: _stacked(by_part) for name, by_part in parts.items() if len(by_part) == 3}


def _stacked(parts: Mapping[str, Callable[[], Tensor]]) -> Callable[[], Tensor]:
    return lambda: torch.cat([parts[f"self_attn.{x}_proj"]() for x in "qkv"])


def no_biases(config: ModelConfig, part: str) -> Lazy:
    """Return biases of 0 for the projections of ``attn`` or ``mlp`` in every layer, by gptlab's names."""
    sizes = {
        "attn.c_attn": (config.n_head + 2 * config.kv_heads) * config.head_dim,
        "attn.c_proj": config.n_embd,
        **({"mlp.c_gate": config.inner} if config.mlp == "swiglu" else {}),
        "mlp.c_fc": config.inner,
        "mlp.c_proj": config.n_embd,
    }
    biases: Lazy = {}
    for layer in range(config.n_layer):
        for module, size in sizes.items():
            if module.startswith(part):
                biases[f"h.{layer}.{module}.bias"] = lambda size=size: torch.zeros(size)  # type: ignore[misc]
    return biases


def write_projections(state: Mapping[str, Tensor], config: ModelConfig, names: Mapping[str, str]) -> dict[str, Tensor]:
    """Return the tensors by the family's names and in its layout; ``names`` as for `read_projections`."""
    theirs = {ours: name for name, ours in names.items()}
    rows = [heads * config.head_dim for heads in (config.n_head, config.kv_heads, config.kv_heads)]
    written: dict[str, Tensor] = {}
    for name, tensor in state.items():
        module, _, kind = name.rpartition(".")
        layer = re.fullmatch(r"h\.(\d+)\.(.+)", module)
        if layer is None:
            written[name if module == "lm_head" else f"model.{theirs[module]}.{kind}"] = tensor
        elif layer[2] == "attn.c_attn":
            for x, part in zip("qkv", tensor.split(rows), strict=True):
                written[f"model.layers.{layer[1]}.self_attn.{x}_proj.{kind}"] = part
        else:
            written[f"model.layers.{layer[1]}.{theirs[layer[2]]}.{kind}"] = tensor
    return written
