"""GPT-2 as Hugging Face stores it: one safetensors file, shards of it, or `pytorch_model.bin`.

The four projections of a block are "Conv1D" there: (in, out), the transpose of a Linear's weight. `attn.c_proj`
is square, so a forgotten transpose would go unnoticed by any check of shapes.
"""

from __future__ import annotations

import functools
import pickle
import re
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from gptlab.checkpoints.files import Checkpoint, Lazy, complete_state, open_safetensors, read_json
from gptlab.config import ModelConfig
from gptlab.errors import GptlabError
from gptlab.text.tokenizers import UnsupportedTokenizer, read_tokenizer

ABOUT = "a directory in Hugging Face's layout with config.json and the weights"
ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}
# Values under which a field leaves the function as gptlab computes it; any other is refused.
NEUTRAL = {
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
}
CONV1D = re.compile(r"h\.\d+\.(attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)\.weight")
# Causal masks that old versions stored as if they were weights.
LEGACY = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")


def recognises(path: Path) -> bool:
    """Does a `config.json` lie in this directory?"""
    return (path / "config.json").exists()


def read_config(directory: Path) -> ModelConfig:
    """Translate a Hugging Face `config.json`.

    `reorder_and_upcast_attn` only changes rounding (softmax is always float32 here) and is ignored, as are
    dropouts, which belong to training.

    Raises:
        GptlabError: another architecture, or a setting that changes the function in a way not offered.
    """
    path = directory / "config.json"
    values = read_json(path)
    if values.get("model_type") != "gpt2":
        raise GptlabError(
            f"{path} describes model_type {values.get('model_type')!r}; only 'gpt2' and gptlab's own format can be read"
        )
    for name, neutral in NEUTRAL.items():
        if values.get(name, neutral) != neutral:
            raise GptlabError(f"{path} has {name}={values[name]!r}, which gptlab does not compute (only {neutral!r})")
    activation = values.get("activation_function", "gelu_new")
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        raise GptlabError(f"{path} has activation_function={activation!r}; gptlab computes {', '.join(ACTIVATIONS)}")
    names = {
        "vocab_size": ("vocab_size", 50257),
        "context_length": ("n_positions", values.get("n_ctx", 1024)),
        "n_layer": ("n_layer", 12),
        "n_head": ("n_head", 12),
        "n_embd": ("n_embd", 768),
        "n_inner": ("n_inner", None),
        "norm_eps": ("layer_norm_epsilon", 1e-5),
        "tie_embeddings": ("tie_word_embeddings", True),
    }
    try:
        fields = {ours: values.get(theirs, default) for ours, (theirs, default) in names.items()}
        return ModelConfig.from_dict({**fields, "activation": ACTIVATIONS[activation]})
    except GptlabError as error:
        raise GptlabError(f"{path}: {error}") from None


def read(directory: Path, dtype: torch.dtype) -> Checkpoint:
    """Read a Hugging Face GPT-2 directory.

    Raises:
        GptlabError: files missing or damaged, tensors missing, left over or of a wrong shape, or a pickle
            that holds anything but tensors.
    """
    config = read_config(directory)
    readers: Lazy = {}
    for key, get in _open_weights(directory).items():
        name = key.removeprefix("transformer.")
        if name in readers:
            raise GptlabError(f"the checkpoint {directory} holds {name} twice, with and without a prefix; restore it")
        if not LEGACY.fullmatch(name):
            readers[name] = _transposed(get) if CONV1D.fullmatch(name) else get
    if config.tie_embeddings and "lm_head.weight" in readers and "wte.weight" in readers:
        head, embedding = readers.pop("lm_head.weight")(), readers["wte.weight"]()
        if head.shape != embedding.shape or not torch.equal(head, embedding):
            raise GptlabError(
                f"the checkpoint {directory} has an lm_head.weight that differs from wte.weight, but its config.json"
                " ties them; set tie_word_embeddings to false there"
            )
    state = complete_state(config, readers, dtype, directory)
    try:
        return Checkpoint(config, state, read_tokenizer(directory))
    except UnsupportedTokenizer as error:  # the weights are of use without it
        return Checkpoint(config, state, None, str(error))


def _transposed(get: Callable[[], Tensor]) -> Callable[[], Tensor]:
    return lambda: get().transpose(0, -1)  # of any rank: a wrong one is refused with the other wrong shapes


def _open_weights(directory: Path) -> Lazy:
    if (directory / "model.safetensors").exists():
        return open_safetensors(directory / "model.safetensors")[0]
    if (directory / "model.safetensors.index.json").exists():
        return _merge(directory, "model.safetensors.index.json", lambda path: open_safetensors(path)[0])
    if (directory / "pytorch_model.bin").exists():
        return _open_bin(directory / "pytorch_model.bin")
    if (directory / "pytorch_model.bin.index.json").exists():
        return _merge(directory, "pytorch_model.bin.index.json", _open_bin)
    raise GptlabError(
        f"{directory} holds no weights; it needs model.safetensors, model.safetensors.index.json with its"
        " shards, or pytorch_model.bin"
    )


def _merge(directory: Path, index: str, open_one: Callable[[Path], Lazy]) -> Lazy:
    """Open the shards that an index names; each tensor must be in the shard that the index says."""
    weight_map = read_json(directory / index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise GptlabError(f"{directory / index} is damaged (no weight_map); restore it")
    merged: Lazy = {}
    for shard in sorted(set(map(str, weight_map.values()))):
        if Path(shard).name != shard or not (directory / shard).is_file():
            raise GptlabError(f"{directory / index} names the shard {shard!r}, which is not there; copy it too")
        opened = open_one(directory / shard)
        merged.update({name: get for name, get in opened.items() if weight_map.get(name, shard) == shard})
    if lost := sorted(set(weight_map) - set(merged)):
        raise GptlabError(f"the shards in {directory} lack {lost[0]}, which {index} promises; copy them again")
    return merged


def _open_bin(path: Path) -> Lazy:
    """Open a PyTorch file of tensors; never unpickle anything else, which could run code."""
    try:
        # Files of before torch 1.6 are no zip archives and cannot be memory-mapped.
        with warnings.catch_warnings(action="ignore"):  # about pickle protocols; what counts is said below
            tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError:
        raise GptlabError(
            f"{path} is no file of tensors alone: loading it could run code, so it was not loaded; get the"
            " model as safetensors"
        ) from None
    except Exception as error:  # a damaged pickle can stumble in any way
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise GptlabError(f"{path} is damaged ({reason}); copy or download it again") from None
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise GptlabError(f"{path} holds something else than tensors by name; it is no pytorch_model.bin")
    return {str(name): functools.partial(tensors.__getitem__, name) for name in tensors}
