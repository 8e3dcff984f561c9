"""StarCoder2 of transformers: GPT-2's blocks with rotary positions, grouped queries and one window for all layers.

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
from gptlab.checkpoints.huggingface.fields import Field, activation, read_fields
from gptlab.config import ModelConfig
from gptlab.errors import GptlabError

ARCHITECTURE = "Starcoder2ForCausalLM"
ACTIVATIONS = {"gelu_tanh": "gelu_pytorch_tanh"}
FIELDS = {
    "vocab_size": Field(("vocab_size",), 49152),
    "context_length": Field(("max_position_embeddings",), 4096),
    "n_layer": Field(("num_hidden_layers",), 30),
    "n_head": Field(("num_attention_heads",), 24),
    "n_kv_head": Field(("num_key_value_heads",), 2),
    "n_embd": Field(("hidden_size",), 3072),
    "n_inner": Field(("intermediate_size",), 12288),
    "activation": Field(("hidden_act",), "gelu_pytorch_tanh"),
    "norm_eps": Field(("norm_epsilon",), 1e-5),
    "tie_embeddings": Field(("tie_word_embeddings",), True),
    "window": Field(("sliding_window",), None),
    # Not fields of `ModelConfig`.
    "head_dim": Field(("head_dim",), None),
    "use_bias": Field(("use_bias",), True),
    "theta": Field(("rope_theta",), None),
    "turns": Field(("rope_parameters", "rope_scaling"), None),
    "share": Field(("partial_rotary_factor",), None),
    "trained": Field(("original_max_position_embeddings",), None),
}
NAMES = {
    "embed_tokens": "wte",
    "norm": "ln_f",
    "input_layernorm": "ln_1",
    "post_attention_layernorm": "ln_2",
    "self_attn.o_proj": "attn.c_proj",
    "mlp.c_fc": "mlp.c_fc",
    "mlp.c_proj": "mlp.c_proj",
}
_LAYER = re.compile(r"layers\.(\d+)\.(.+)\.(weight|bias)")
_LEGACY = re.compile(r"(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")


def read_config(path: Path, values: Mapping[str, Any]) -> ModelConfig:
    """Translate the contents of a `config.json` of transformers 4 (`rope_theta`) or 5 (`rope_parameters`)."""
    stated = {key: value for key, value in values.items() if key not in ("rope_parameters", "rope_scaling")}
    settings = read_fields(path, stated, FIELDS, "StarCoder2's configuration")
    head_dim, share, trained = settings.pop("head_dim"), settings.pop("share"), settings.pop("trained")
    settings.pop("turns")
    if not isinstance(settings.pop("use_bias"), bool):
        raise GptlabError(f"{path}: use_bias must be true or false, got {values['use_bias']!r}")
    turns = {**_object(path, "rope_scaling", values), **_object(path, "rope_parameters", values)}
    theta = turns.pop("rope_theta", None) or settings["theta"]
    del settings["theta"]
    share, kind = turns.pop("partial_rotary_factor", share), turns.pop("rope_type", turns.get("type", "default"))
    trained = turns.pop("original_max_position_embeddings", trained)
    factor = turns.pop("factor", None)
    turns.pop("type", None)
    usual = {"beta_fast": 32, "beta_slow": 1, "truncate": True, "attention_factor": None}
    unusual = {name: value for name, value in turns.items() if value is not None and value != usual.get(name)}
    if kind not in ("default", "linear", "yarn") or unusual or share not in (None, 1):
        said = {"rope_type": kind, **unusual, **({} if share in (None, 1) else {"partial_rotary_factor": share})}
        raise GptlabError(f"{path} asks for rotary positions with {said}, which gptlab does not compute")
    rope: dict[str, Any] = {"theta": 10000.0 if theta is None else theta}
    if kind != "default":
        rope |= {"scaling": kind, "factor": factor}
    if kind == "yarn" and trained is not None:
        longest = settings["context_length"]
        if factor is None and _is_number(longest) and _is_number(trained):
            rope["factor"] = factor = longest / trained
        if _is_number(factor) and _is_number(trained) and longest == int(trained * factor):
            settings["context_length"] = trained  # as `write_config` writes it
        else:
            rope["trained_length"] = trained
    config = ModelConfig.from_dict(
        {
            **settings,
            "position": "rope",
            "rope": None if rope == {"theta": 10000.0} else rope,  # without settings of its own
            "activation": activation(path, "hidden_act", settings["activation"]),
        }
    )
    if head_dim not in (None, config.head_dim):
        raise GptlabError(f"{path} has head_dim={head_dim!r}, which gptlab computes with {config.head_dim} only")
    return config


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 1 <= value < math.inf


def _object(path: Path, name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    value = values.get(name) or {}
    if not isinstance(value, dict):
        raise GptlabError(f"{path}: {name} must be an object, got {value!r}")
    return value


def read_tensors(readers: Lazy, config: ModelConfig) -> Lazy:
    """Return the tensors by gptlab's names and in its layout; projections without a bias get one of 0."""
    tensors: Lazy = {}
    parts: dict[str, dict[str, Callable[[], Tensor]]] = {}
    for name, get in readers.items():
        layer = _LAYER.fullmatch(name)
        if _LEGACY.fullmatch(name):
            continue
        if layer and layer[2] in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"):
            parts.setdefault(f"h.{layer[1]}.attn.c_attn.{layer[3]}", {})[layer[2]] = get
        elif layer and layer[2] in NAMES:
            tensors[f"h.{layer[1]}.{NAMES[layer[2]]}.{layer[3]}"] = get
        else:
            module, _, kind = name.rpartition(".")
            tensors[f"{NAMES[module]}.{kind}" if module in NAMES else name] = get
    tensors |= {name: _stacked(by_part) for name, by_part in parts.items() if len(by_part) == 3}
    if not any(re.fullmatch(r"h\.\d+\.(attn|mlp)\.\w+\.bias", name) for name in tensors):  # use_bias=false
        for i in range(config.n_layer):
            rows = (config.n_head + 2 * config.kv_heads) * config.head_dim
            sizes = {"attn.c_attn": rows, "attn.c_proj": config.n_embd, "mlp.c_fc": config.inner}
            for module, size in {**sizes, "mlp.c_proj": config.n_embd}.items():
                tensors[f"h.{i}.{module}.bias"] = lambda size=size: torch.zeros(size)  # type: ignore[misc]
    return tensors


def _stacked(parts: Mapping[str, Callable[[], Tensor]]) -> Callable[[], Tensor]:
    return lambda: torch.cat([parts[f"self_attn.{x}_proj"]() for x in "qkv"])


def write_config(config: ModelConfig) -> dict[str, Any]:
    """Return what `config.json` says of a model with rotary positions and full attention or one window."""
    rope: dict[str, Any] = {"rope_type": "default"}
    theta = 10000.0 if config.rope is None else float(config.rope.theta)
    longest = config.context_length
    if config.rope is not None and config.rope.scaling is not None:
        rope = {"rope_type": config.rope.scaling, "factor": float(config.rope.factor)}
        if config.rope.scaling == "yarn":
            rope["original_max_position_embeddings"] = config.trained_length
            # Not the context: transformers 4 takes the factor from the two lengths.
            longest = int(config.trained_length * config.rope.factor)
    return {
        "vocab_size": config.vocab_size,
        "max_position_embeddings": longest,
        "hidden_size": config.n_embd,
        "intermediate_size": config.inner,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.kv_heads,
        "norm_epsilon": config.norm_eps,
        "sliding_window": config.windows[0],
        "use_bias": True,
        "rope_theta": theta,  # for transformers 4, as is rope_scaling
        **({"rope_scaling": dict(rope)} if rope["rope_type"] != "default" else {}),
        "rope_parameters": {**rope, "rope_theta": theta},
        "attention_dropout": config.dropout,
        "residual_dropout": config.dropout,
        "embedding_dropout": config.dropout,
    }


def write_tensors(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Return the tensors by the family's names and in its layout."""
    theirs = {ours: name for name, ours in NAMES.items()}
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
