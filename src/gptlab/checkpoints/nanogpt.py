"""nanoGPT's `ckpt.pt`, and those of its forks: one file with the weights, `model_args`, and the state of training.

Projections are (out, in) there, as they are here. What the file does not say:

- The activation. nanoGPT computes the erf form of the GELU, its earliest versions the tanh form. A file that does not
  say whether its model has biases is of those; for others `gptlab import --activation gelu_tanh` states it.
- The characters of a character-level model: they are in `meta.pkl`, a pickle, which is never opened. A `tokenizer.json`
  beside `ckpt.pt` is used, and `gptlab import --characters FILE` makes one from the training text, or from a text that
  holds each character once.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptlab.checkpoints.files import Checkpoint, Lazy, complete_state
from gptlab.checkpoints.pickles import load_pickle
from gptlab.config import ModelConfig
from gptlab.errors import GptlabError
from gptlab.text.tokenizers import GPT2Tokenizer, read_tokenizer

ABOUT = "nanoGPT's ckpt.pt"
_FIELDS = {
    "vocab_size": "vocab_size",
    "block_size": "context_length",
    "n_layer": "n_layer",
    "n_head": "n_head",
    "n_embd": "n_embd",
}
_ALSO_KNOWN = ("bias", "dropout")
_WEIGHTS = ("model", "model_state_dict", "state_dict")
_SETTINGS = ("model_args", "config", "model_config")
# What compilers, data-parallel wrappers and the model itself put before a name.
_PREFIX = re.compile(r"(_orig_mod\.|module\.|transformer\.)*")
_MASK = re.compile(r"h\.\d+\.attn\.(bias|mask|tril)")
GPT2_VOCABULARY = 50257
MOST_PADDING = 512
"""Rows that are added to the vocabulary for speed."""


def recognises(path: Path) -> bool:
    """Is this a PyTorch file, or a directory with a `ckpt.pt`?"""
    if path.is_dir():
        return (path / "ckpt.pt").is_file()
    return path.suffix in (".pt", ".pth", ".ckpt") and path.is_file()


def read_config(path: Path) -> ModelConfig:
    """Translate `model_args`. A vocabulary that is GPT-2's, padded to a multiple of 64, becomes GPT-2's.

    Raises:
        GptlabError: the file is damaged, could run code, or does not say how large its model is.
    """
    return _opened(path)[0]


NO_TOKENIZER = (
    "{file} came without a tokenizer, and the characters in nanoGPT's meta.pkl are a pickle, which is never opened:"
    " `gptlab import {file} --characters input.txt --out model` takes them from the training text"
)


def read(path: Path, dtype: torch.dtype) -> Checkpoint:
    """Read the model in a `ckpt.pt`; the optimizer's state is left aside.

    Raises:
        GptlabError: as `read_config`, and for tensors that are missing, left over or of a wrong shape.
    """
    config, readers = _opened(path)
    file = _file(path)
    tokenizer = read_tokenizer(file.parent)
    if tokenizer is None and config.vocab_size == GPT2_VOCABULARY:
        tokenizer = GPT2Tokenizer()
    state = complete_state(config, readers, dtype, file, described_by="model_args")
    return Checkpoint(config, state, tokenizer, "" if tokenizer else NO_TOKENIZER.format(file=file))


def _file(path: Path) -> Path:
    return path / "ckpt.pt" if path.is_dir() else path


def _opened(path: Path) -> tuple[ModelConfig, Lazy]:
    file = _file(path)
    values = load_pickle(file)
    weights, settings = (_first(values, names) for names in (_WEIGHTS, _SETTINGS))
    if weights is None or not all(isinstance(tensor, Tensor) for tensor in weights.values()):
        raise GptlabError(f"{file} holds no weights as nanoGPT stores them (tensors under 'model')")
    if settings is None:
        raise GptlabError(
            f"{file} does not say how its model is built (no 'model_args'); its number of heads is in no tensor"
        )
    tensors: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        ours = _PREFIX.sub("", str(name), count=1)
        if ours in tensors:
            raise GptlabError(f"{file} holds {ours} twice, under different prefixes; restore it")
        if not _MASK.fullmatch(ours):
            tensors[ours] = tensor
    embedding, head = tensors.get("wte.weight"), tensors.get("lm_head.weight")
    tied = embedding is None or head is None or (embedding.shape == head.shape and torch.equal(embedding, head))
    if tied:
        tensors.pop("lm_head.weight", None)
    config = _config(file, settings, tied)
    readers: Lazy = {name: functools.partial(_get, tensor) for name, tensor in tensors.items()}
    for name in ("wte.weight", "lm_head.weight"):
        if name in tensors and len(tensors[name]) == settings["vocab_size"] > config.vocab_size:
            readers[name] = functools.partial(_get, tensors[name][: config.vocab_size])
    return config, readers


def _get(tensor: Tensor) -> Tensor:
    return tensor


def _first(values: Any, names: tuple[str, ...]) -> Mapping[str, Any] | None:
    candidates = (values[name] for name in names if isinstance(values, dict) and isinstance(values.get(name), dict))
    return next(candidates, None)


def _config(file: Path, settings: Mapping[str, Any], tied: bool) -> ModelConfig:
    if lost := [name for name in _FIELDS if name not in settings]:
        raise GptlabError(f"{file} is not a checkpoint of nanoGPT or of a fork like it: its settings lack {lost[0]}")
    unknown = [name for name, value in settings.items() if value and name not in (*_FIELDS, *_ALSO_KNOWN)]
    if unknown and "learning_rate" not in settings:  # else they are those of the whole training
        raise GptlabError(
            f"{file} was made with {unknown[0]}={settings[unknown[0]]!r}, a setting of a fork that gptlab does not know"
        )
    fields = {ours: settings[theirs] for theirs, ours in _FIELDS.items()}
    padding = fields["vocab_size"] - GPT2_VOCABULARY if isinstance(fields["vocab_size"], int) else 0
    if 0 < padding < MOST_PADDING and fields["vocab_size"] % 64 == 0:
        fields["vocab_size"] = GPT2_VOCABULARY
    bias = settings.get("bias", True)
    activation = "gelu" if "bias" in settings else "gelu_tanh"
    try:
        return ModelConfig.from_dict({**fields, "bias": bias, "activation": activation, "tie_embeddings": tied})
    except GptlabError as error:
        raise GptlabError(f"{file}: {error}") from None
