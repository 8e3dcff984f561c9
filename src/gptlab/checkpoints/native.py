"""gptlab's own format: `config.json`, `model.safetensors` with a checksum per tensor, and the tokenizer.

The weights file also carries the configuration and the tokenizer's hash, so that files of two different
saves are never taken for one model.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from gptlab.checkpoints.files import Checkpoint, complete_state, open_safetensors, tensor_sha256, write_files
from gptlab.config import ModelConfig
from gptlab.errors import GptlabError
from gptlab.text.tokenizers import Tokenizer, read_tokenizer

FORMAT = "gptlab"
VERSION = 1
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "merges.txt")


def recognises(values: Mapping[str, Any]) -> bool:
    """Is this `config.json` of gptlab's own format?"""
    return values.get("format") == FORMAT


def config_of(directory: Path, values: Mapping[str, Any]) -> ModelConfig:
    """Return the configuration in the contents of `config.json`.

    Raises:
        GptlabError: a later version of the format, or impossible settings.
    """
    if values.get("version") != VERSION:
        raise GptlabError(
            f"{directory} is in version {values.get('version')!r} of gptlab's format, this program reads"
            f" version {VERSION}; install a newer gptlab"
        )
    try:
        return ModelConfig.from_dict(values["model"])
    except (KeyError, TypeError) as error:
        raise GptlabError(f"{directory / 'config.json'} is damaged ({error}); restore it") from None
    except GptlabError as error:
        raise GptlabError(f"{directory / 'config.json'}: {error}") from None


def read(directory: Path, values: Mapping[str, Any], dtype: torch.dtype) -> Checkpoint:
    """Read a model directory that `write` made, checking every tensor against its checksum."""
    config = config_of(directory, values)
    path = directory / "model.safetensors"
    lazy, metadata = open_safetensors(path)
    try:
        sums = dict(json.loads(metadata["sha256"]))
        saved_config, saved_tokenizer = json.loads(metadata["config"]), metadata["tokenizer"]
    except (KeyError, TypeError, ValueError):
        raise GptlabError(f"{path} was not written by gptlab, though its config.json says so; restore it") from None
    tokenizer = read_tokenizer(directory)
    if saved_config != json.loads(json.dumps(config.to_dict())) or saved_tokenizer != _identity(tokenizer):
        raise GptlabError(
            f"the files in {directory} belong to different saves: config.json, the tokenizer and model.safetensors"
            " do not match; restore them together"
        )

    def checked(name: str, get: Callable[[], Tensor]) -> Callable[[], Tensor]:
        def read_one() -> Tensor:
            tensor = get()
            if tensor_sha256(tensor) != sums.get(name):
                raise GptlabError(f"{path} is damaged: {name} fails its checksum; restore the file")
            return tensor

        return read_one

    readers = {name: checked(name, get) for name, get in lazy.items()}
    return Checkpoint(config, complete_state(config, readers, dtype, directory), tokenizer)


def write(
    directory: Path,
    config: ModelConfig,
    state: Mapping[str, Tensor],
    tokenizer: Tokenizer | None,
    extra: Mapping[str, bytes] | None = None,
) -> None:
    """Write a model directory, replacing the one that may be there only once all is on disk.

    Args:
        directory: made when it does not exist; other files in it stay.
        config: the model's configuration.
        state: every tensor of `GPT.tensors` by name, in the dtype to store.
        tokenizer: written beside the weights.
        extra: further files, by name.

    Raises:
        GptlabError: the directory cannot be written, or the disk is full.
    """
    values = config.to_dict()
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    metadata = {
        "format": "pt",
        "config": json.dumps(values),
        "tokenizer": _identity(tokenizer),
        "sha256": json.dumps({name: tensor_sha256(tensor) for name, tensor in tensors.items()}),
    }
    header = {"format": FORMAT, "version": VERSION, "model": values}
    files: dict[str, bytes | Callable[[Path], None]] = dict(tokenizer.files() if tokenizer else {})
    files.update(extra or {})
    files["config.json"] = json.dumps(header, indent=2).encode() + b"\n"
    files["model.safetensors"] = lambda path: save_file(tensors, path, metadata)
    write_files(directory, files, stale=[name for name in TOKENIZER_FILES if name not in files])


def _identity(tokenizer: Tokenizer | None) -> str:
    return "" if tokenizer is None else hashlib.sha256(tokenizer.files()["tokenizer.json"]).hexdigest()
