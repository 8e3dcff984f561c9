"""Reading a `config.json` of transformers so that nothing in it that changes the function goes unnoticed.

A field may stand there under its own name or an alias of transformers' `attribute_map`. transformers takes any other
name silently and computes with the field's default; here a name that could mean a field that is not stated is refused,
and so is a name of something that the family does not have.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from gptlab.errors import GptlabError

ACTIVATIONS = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
"""transformers' names of the activations (all its spellings of the tanh form are one formula), and gptlab's."""


class Field(NamedTuple):
    """A field of a family's configuration: its own name and its aliases, and the default of the family."""

    names: tuple[str, ...]
    default: Any

    def stated(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return what a configuration says of this field, by the names that it uses; a null beside a value is none."""
        stated = {name: values[name] for name in self.names if name in values}
        return {name: value for name, value in stated.items() if value is not None} or stated


Fields = Mapping[str, Field]
"""Fields of a family by their names in `ModelConfig`."""

NEUTRAL = {
    "add_cross_attention": False,
    "is_encoder_decoder": False,
    "pruned_heads": {},
    "per_layer_config": None,
    "quantization_config": None,
    "layer_types": None,
}
"""Fields of every family that leave the function as it is at these values only (or null)."""

_HARMLESS = re.compile(
    r"_.*|.*(dropout|pdrop|drop|token_id|token_ids|parallel|implementation|initializer\w*|init_std|std)(_prob|_rate)?"
    r"|summary_.*|task_.*|num_beam\w*|.*(penalty|ngram_size)|(max|min)_(new_)?(length|tokens)|output_\w+"
    r"|use_(flash|sdpa|memory_efficient|cuda|xformers)\w*|flash_attn\w*|reorder_and_upcast_attn|tie_encoder_decoder"
    r"|tie_last_hidden_states|(scale_)?attention_softmax_in_fp32|gradient_checkpointing\w*|max_batch_size"
    r"|cross_attention_hidden_size|chunk_size_feed_forward|model_type|architectures|n_special|auto_map|pad_\w+"
)
"""Names of training, generation and bookkeeping, which `_MEANINGS` would take for something else."""
_MEANINGS = {
    "activation": {"act", "activation", "nonlinearity", "afn"},
    "norm_eps": {"eps", "epsilon"},
    "tie_embeddings": {"tie", "tied", "share", "shared", "tying"},
    "n_inner": {"inner", "intermediate", "ffn", "ff", "mlp", "feedforward", "dff"},
    "n_head": {"head", "heads"},
    "n_layer": {"layer", "layers", "block", "blocks", "depth"},
    "vocab_size": {"vocab", "vocabulary"},
    "context_length": {
        "ctx",
        "context",
        "position",
        "positions",
        "seq",
        "sequence",
        "length",
        "len",
        "seqlen",
        "block",
    },
    "n_embd": {"embd", "embed", "emb", "embedding", "hidden", "width", "dim", "dmodel", "model"},
}
_WITHOUT_SPACE = {
    *("head", "layer", "embd", "hidden", "vocab", "inner", "activation", "nonlinearity", "position", "epsilon"),
    *("eps", "act", "ctx", "embed", "tied", "tying", "width", "depth", "dmodel"),
}
"""Of these names those that other words hardly ever hold."""
_FOREIGN = {
    *("kv", "query", "groups", "window", "windows", "sliding", "local", "sink", "sinks", "dilation", "types"),
    *("rope", "rotary", "alibi", "theta", "softcap", "softcapping", "experts", "moe", "rms", "rmsnorm", "glu"),
    *("swiglu", "gated", "scale", "scaling", "multiplier", "quantization", "lora"),
}
_KINDS = {
    "position": {"position", "positional", "pos"},
    "norm": {"norm", "normalization", "layernorm", "ln"},
    "mlp": {"mlp", "ffn"},
    "attention": {"attention", "attn"},
}
_USUAL_KINDS = {
    "absolute",
    "learned",
    "learned_absolute",
    "layer_norm",
    "layernorm",
    "default",
    "gelu",
    "full",
    "global",
}


def read_fields(path: Path, values: Mapping[str, Any], fields: Fields, family: str) -> dict[str, Any]:
    """Return the value of every field by its name in `ModelConfig`; what is not stated is the family's default.

    Args:
        path: the file, for messages.
        values: its contents.
        fields: of the family.
        family: its name, for messages.

    Raises:
        GptlabError: two names of one field disagree, or a name that may mean something is not known.
    """
    settings = {}
    for ours, field in fields.items():
        stated = field.stated(values)
        if len(stated) > 1 and len({repr(value) for value in stated.values()}) > 1:
            both = " and ".join(f"{name}={value!r}" for name, value in stated.items())
            raise GptlabError(f"{path} has {both}, which are two names of one field; delete the wrong one")
        settings[ours] = next(iter(stated.values()), field.default)
    for name, neutral in NEUTRAL.items():
        value = values.get(name)
        usual = name == "layer_types" and isinstance(value, list) and set(map(str, value)) == {"full_attention"}
        if value is not None and value != neutral and not usual:
            raise GptlabError(
                f"{path} has {name}={_short(value)}, which gptlab does not compute (only {neutral!r});"
                " get a checkpoint without it"
            )
    known = {name for field in fields.values() for name in field.names}
    for name, value in values.items():
        if name not in known and name not in NEUTRAL and not _HARMLESS.fullmatch(name):
            _refuse_look_alike(path, name, value, values, fields, family)
    return settings


def _refuse_look_alike(
    path: Path, name: str, value: Any, values: Mapping[str, Any], fields: Fields, family: str
) -> None:
    words = set(re.findall(r"[a-z]+", re.sub(r"([a-z])([A-Z])", r"\1_\2", name).lower()))
    unscaled = value is False and bool(words & {"scale", "scaled"}) and bool(words & {"attn", "attention"})
    if (words & _FOREIGN or {"key", "value"} <= words) and not unscaled:
        one = value == 1 and value is not True and bool(words & {"scale", "multiplier", "scaling", "groups"})
        heads = bool(words & {"heads", "head"}) and value in fields["n_head"].stated(values).values()
        if value and not one and not heads:
            raise GptlabError(
                f"{path} has {name}={_short(value)}, which is not a field of {family} and may change what it computes;"
                " delete it if it has no meaning"
            )
        return
    if isinstance(value, str):
        kind = next((kind for kind, names in _KINDS.items() if words & names), None)
        if kind and "type" in words and value.lower() not in _USUAL_KINDS:
            raise GptlabError(
                f"{path} has {name}={_short(value)}, a kind of {kind} that {family} does not have;"
                " delete it if it has no meaning"
            )
    meant = [ours for ours, names in _MEANINGS.items() if _means(words, names) and ours in fields]
    meant = ["scale_attn_weights"] if unscaled and "scale_attn_weights" in fields else meant
    silent = [ours for ours in meant if not fields[ours].stated(values)]
    if silent and value is not None:
        raise GptlabError(
            f"{path} has {name}={_short(value)}, which is not a field of {family}, and not"
            f" {fields[silent[0]].names[0]}, which it may mean; rename it, or delete it if it has no meaning"
        )


def _means(words: set[str], names: set[str]) -> bool:
    """Is one of the words a name, or does it hold one, written without a space as in ``nhead``?"""
    return bool(words & names) or any(
        name in word if len(name) > 3 else word.removeprefix("n").startswith(name) or word.endswith(name)
        for word in words
        for name in names & _WITHOUT_SPACE
    )


def activation(path: Path, name: str, value: object) -> str:
    """Translate the name of an activation.

    Raises:
        GptlabError: gptlab does not compute it.
    """
    if not isinstance(value, str) or value not in ACTIVATIONS:
        raise GptlabError(f"{path} has {name}={_short(value)}; gptlab computes {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[value]


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
