"""GPTBigCode of transformers (SantaCoder, StarCoder): GPT-2 with one key/value head for all queries.

Its projections are Linear weights, (out, in), with the rows of ``c_attn`` as gptlab has them: q, then k, then v. With
``multi_query=false`` they are q, k and v of the first head, then of the second, and so on.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from gptlab.checkpoints.files import Lazy
from gptlab.checkpoints.huggingface import gpt2
from gptlab.checkpoints.huggingface.fields import Field, activation, read_fields
from gptlab.config import ModelConfig
from gptlab.errors import GptlabError

ARCHITECTURE = "GPTBigCodeForCausalLM"
ACTIVATIONS = {"gelu_tanh": "gelu_pytorch_tanh"}
FIELDS = {
    **{name: field for name, field in gpt2.FIELDS.items() if name != "scale_attn_by_inverse_layer_idx"},
    "activation": Field(("activation_function",), "gelu_pytorch_tanh"),
    "multi_query": Field(("multi_query",), True),
    "kv": Field(("num_key_value_heads",), None),
}


def read_config(path: Path, values: Mapping[str, Any]) -> ModelConfig:
    """Translate the contents of a `config.json`."""
    settings = read_fields(path, values, FIELDS, "GPTBigCode's configuration")
    multi_query, kv = settings.pop("multi_query"), settings.pop("kv")
    if not isinstance(multi_query, bool):
        raise GptlabError(f"{path}: multi_query must be true or false, got {multi_query!r}")
    heads = 1 if multi_query else settings["n_head"]
    if kv not in (None, heads):
        raise GptlabError(
            f"{path} has num_key_value_heads={kv!r} beside multi_query={multi_query}; delete the wrong one"
        )
    chosen = activation(path, "activation_function", settings["activation"])
    return ModelConfig.from_dict({**settings, "n_kv_head": heads, "activation": chosen})


def read_tensors(readers: Lazy, config: ModelConfig) -> Lazy:
    """Return the tensors by gptlab's names and in its layout."""
    by_head = config.kv_heads > 1
    return {
        name: _sorted(get, config.n_head) if by_head and re.fullmatch(r"h\.\d+\.attn\.c_attn\.\w+", name) else get
        for name, get in readers.items()
        if not gpt2.LEGACY.fullmatch(name)
    }


def _sorted(get: Callable[[], Tensor], n_head: int) -> Callable[[], Tensor]:
    """Rows of q, k and v for each head in turn -> all of q, then all of k, then all of v."""

    def read() -> Tensor:
        rows = get()
        if rows.ndim == 0 or len(rows) % (3 * n_head):
            return rows  # refused with the other wrong shapes
        return rows.unflatten(0, (n_head, 3, -1)).transpose(0, 1).flatten(0, 2)

    return read


def write_config(config: ModelConfig) -> dict[str, Any]:
    """Return what `config.json` says of a model with one key/value head."""
    values = gpt2.write_config(config)
    del values["scale_attn_by_inverse_layer_idx"], values["reorder_and_upcast_attn"]
    return {
        **values,
        "activation_function": ACTIVATIONS.get(config.activation, config.activation),
        "multi_query": True,
        "attention_softmax_in_fp32": True,
        "scale_attention_softmax_in_fp32": True,
    }


def write_tensors(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Return the tensors by the family's names and in its layout."""
    return {name if name.startswith("lm_head") else f"transformer.{name}": tensor for name, tensor in state.items()}
