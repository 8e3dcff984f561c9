"""GPT-2 of transformers: `GPT2LMHeadModel` and its relatives.

The four projections of a block are "Conv1D" there: (in, out), the transpose of a Linear's weight. `attn.c_proj`
is square, so a forgotten transpose would go unnoticed by any check of shapes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from gptlab.checkpoints.files import Lazy
from gptlab.checkpoints.huggingface.fields import Field, activation, read_fields
from gptlab.config import ModelConfig

CONV1D = re.compile(r"h\.\d+\.(attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)\.weight")
# Causal masks that old versions stored as if they were weights.
LEGACY = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")
ARCHITECTURE = "GPT2LMHeadModel"
ACTIVATIONS = {"gelu_tanh": "gelu_new"}
"""Names of activations that differ from gptlab's."""
FIELDS = {
    "vocab_size": Field(("vocab_size",), 50257),
    "context_length": Field(("n_positions", "max_position_embeddings"), 1024),
    "n_layer": Field(("n_layer", "num_hidden_layers"), 12),
    "n_head": Field(("n_head", "num_attention_heads"), 12),
    "n_embd": Field(("n_embd", "hidden_size"), 768),
    "n_inner": Field(("n_inner",), None),
    "activation": Field(("activation_function",), "gelu_new"),
    "norm_eps": Field(("layer_norm_epsilon",), 1e-5),
    "tie_embeddings": Field(("tie_word_embeddings",), True),
    "scale_attn_weights": Field(("scale_attn_weights",), True),
    "scale_attn_by_inverse_layer_idx": Field(("scale_attn_by_inverse_layer_idx",), False),
}


def read_config(path: Path, values: Mapping[str, Any]) -> ModelConfig:
    """Translate the contents of a `config.json`.

    `reorder_and_upcast_attn` only changes rounding (softmax is always float32 here) and is ignored, as are
    dropouts, which belong to training. `n_ctx` is an old name of `n_positions`, and counts where that is missing.
    """
    fields = {**FIELDS}
    if not fields["context_length"].stated(values):
        fields["context_length"] = Field(("n_ctx",), 1024)
    settings = read_fields(path, values, fields, "GPT-2's configuration")
    return ModelConfig.from_dict(
        {**settings, "activation": activation(path, "activation_function", settings["activation"])}
    )


def read_tensors(readers: Lazy, config: ModelConfig) -> Lazy:
    """Return the tensors by gptlab's names and in its layout."""
    return {
        name: _transposed(get) if CONV1D.fullmatch(name) else get
        for name, get in readers.items()
        if not LEGACY.fullmatch(name)
    }


def _transposed(get: Callable[[], Tensor]) -> Callable[[], Tensor]:
    return lambda: get().transpose(0, -1)  # of any rank: a wrong one is refused with the other wrong shapes


def write_config(config: ModelConfig) -> dict[str, Any]:
    """Return what `config.json` says of a model with learned positions and full attention."""
    return {
        "vocab_size": config.vocab_size,
        "n_positions": config.context_length,
        "n_ctx": config.context_length,
        "n_embd": config.n_embd,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_inner": config.inner,
        "activation_function": ACTIVATIONS.get(config.activation, config.activation),
        "layer_norm_epsilon": config.norm_eps,
        "scale_attn_weights": config.scale_attn_weights,
        "scale_attn_by_inverse_layer_idx": config.scale_attn_by_inverse_layer_idx,
        "reorder_and_upcast_attn": False,
        "resid_pdrop": config.dropout,
        "embd_pdrop": config.dropout,
        "attn_pdrop": config.dropout,
    }


def write_tensors(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Return the tensors by the family's names and in its layout."""
    return {
        name if name.startswith("lm_head") else f"transformer.{name}": tensor.t() if CONV1D.fullmatch(name) else tensor
        for name, tensor in state.items()
    }
