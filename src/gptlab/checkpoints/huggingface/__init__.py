"""Hugging Face's layout: `config.json`, and the weights as one safetensors file, shards of it, or `pytorch_model.bin`.

One module per family of transformers; what they share is in `fields` (the configuration) and `weights` (the files).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import torch

from gptlab.checkpoints.files import Checkpoint, Lazy, complete_state, read_json
from gptlab.checkpoints.huggingface import bigcode, custom, gpt2, llama, mistral, starcoder2
from gptlab.checkpoints.huggingface.weights import open_weights
from gptlab.checkpoints.huggingface.write import plan, write
from gptlab.config import ModelConfig
from gptlab.errors import GptlabError
from gptlab.text.tokenizers import UnsupportedTokenizer, read_tokenizer

__all__ = ["ABOUT", "FAMILIES", "Family", "plan", "read", "read_config", "recognises", "write"]

ABOUT = "a directory in Hugging Face's layout with config.json and the weights"


class Family(Protocol):
    """What the module of a family offers."""

    def read_config(self, path: Path, values: Mapping[str, Any]) -> ModelConfig:
        """Translate the contents of a `config.json`; GptlabError where it asks for what gptlab does not compute."""

    def read_tensors(self, readers: Lazy, config: ModelConfig) -> Lazy:
        """Return the tensors by gptlab's names and in its layout; names that it does not know stay as they are."""


FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "gpt2": gpt2,
        "gpt_bigcode": bigcode,
        "starcoder2": starcoder2,
        "llama": llama,
        "mistral": mistral,
        "gptlab": custom,
    }
)
"""The families by transformers' ``model_type``."""


def recognises(path: Path) -> bool:
    """Does a `config.json` lie in this directory?"""
    return (path / "config.json").exists()


def read_config(directory: Path) -> ModelConfig:
    """Translate a Hugging Face `config.json`.

    Raises:
        GptlabError: another architecture, or a setting that changes the function in a way not offered.
    """
    return _describe(directory)[1]


def read(directory: Path, dtype: torch.dtype) -> Checkpoint:
    """Read a Hugging Face directory.

    Raises:
        GptlabError: files missing or damaged, tensors missing, left over or of a wrong shape, or a pickle
            that holds anything but tensors.
    """
    family, config = _describe(directory)
    readers = family.read_tensors(open_weights(directory), config)
    if config.tie_embeddings and "lm_head.weight" in readers:
        if "wte.weight" not in readers:  # of a tied pair either may be the one that was saved
            readers["wte.weight"] = readers["lm_head.weight"]
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


def _describe(directory: Path) -> tuple[Family, ModelConfig]:
    path = directory / "config.json"
    values = read_json(path)
    kind = values.get("model_type")
    if kind is None and str(values.get("architectures", "")).startswith("['GPT2"):  # before transformers 3
        kind = "gpt2"
    if not isinstance(kind, str) or kind not in FAMILIES:
        readable = ", ".join(map(repr, FAMILIES))
        raise GptlabError(f"{path} describes model_type {kind!r}; only {readable} and gptlab's own format can be read")
    if values.get("auto_map") and kind != "gptlab":
        warnings.warn(
            f"{path} names code of its own (auto_map), which gptlab does not run: it is read as plain {kind}",
            stacklevel=4,
        )
    family = FAMILIES[kind]
    try:
        return family, family.read_config(path, values)
    except GptlabError as error:
        raise error if str(error).startswith(str(path)) else GptlabError(f"{path}: {error}") from None
