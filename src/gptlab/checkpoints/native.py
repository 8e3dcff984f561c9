"""gptlab's own format: `config.json`, `model.safetensors` with a checksum per tensor, and the tokenizer.

The weights file also carries the configuration and the tokenizer's hash, so that files of two different
saves are never taken for one model.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from gptlab.checkpoints.files import (
    Checkpoint,
    checked_tensor,
    complete_state,
    expected_shapes,
    open_safetensors,
    read_json,
    refuse_bytes,
    tensor_sha256,
    write_files,
)
from gptlab.config import ModelConfig
from gptlab.devices import BITS
from gptlab.errors import GptlabError
from gptlab.model.quantised import GROUP, dequantise
from gptlab.text.tokenizers import TOKENIZER_FILES, Tokenizer, read_tokenizer

ABOUT = "a directory that gptlab saved"
FORMAT = "gptlab"
VERSION = 1
QUANTISED = 2
"""The version of directories with weights in whole numbers, which earlier programs do not read."""


def recognises(path: Path) -> bool:
    """Does a `config.json` of gptlab's own format lie in this directory?"""
    return (path / "config.json").exists() and read_json(path / "config.json").get("format") == FORMAT


def read_config(directory: Path) -> ModelConfig:
    """Return the configuration in `config.json`.

    Raises:
        GptlabError: it is damaged, of a later version of the format, or holds impossible settings.
    """
    values = read_json(directory / "config.json")
    if values.get("version") not in (VERSION, QUANTISED):
        raise GptlabError(
            f"{directory} is in version {values.get('version')!r} of gptlab's format, this program reads"
            f" versions {VERSION} and {QUANTISED}; install a newer gptlab"
        )
    try:
        return ModelConfig.from_dict(values["model"])
    except (KeyError, TypeError) as error:
        raise GptlabError(f"{directory / 'config.json'} is damaged ({error}); restore it") from None
    except GptlabError as error:
        raise GptlabError(f"{directory / 'config.json'}: {error}") from None


def read(directory: Path, dtype: torch.dtype | None) -> Checkpoint:
    """Read a model directory that `write` made, checking every tensor against its checksum.

    Weights in whole numbers stay what they are where ``dtype`` is None, else they become floats.
    """
    config = read_config(directory)
    path = directory / "model.safetensors"
    lazy, metadata = open_safetensors(path)
    try:
        sums = dict(json.loads(metadata["sha256"]))
        saved_config, saved_tokenizer = json.loads(metadata["config"]), metadata["tokenizer"]
        precision = metadata.get("precision")
        bits = None if precision is None else BITS[precision]
    except (KeyError, TypeError, ValueError):
        raise GptlabError(f"{path} was not written by gptlab, though its config.json says so; restore it") from None
    tokenizer = read_tokenizer(directory)
    # Where none was saved, one may be put there.
    other = saved_tokenizer not in ("", _identity(tokenizer))
    header = read_json(directory / "config.json")
    other |= (header["version"], header.get("precision")) != (VERSION if bits is None else QUANTISED, precision)
    if other or saved_config != json.loads(json.dumps(config.to_dict())):
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
    if bits is None:
        return Checkpoint(config, complete_state(config, readers, dtype or torch.float32, directory), tokenizer)
    shapes = expected_shapes(config)
    # Every matrix but the table of positions is in whole numbers.
    factors = {name: _factors(name) for name, shape in shapes.items() if len(shape) == 2 and name != "wpe.weight"}
    if missing := [name for name in factors.values() if name not in readers]:
        raise GptlabError(f"the checkpoint {directory} lacks {missing[0]}; it is incomplete, copy it again")
    matrices = {name: partial(_matrix, name, shapes[name], readers, directory) for name in factors if name in readers}
    others = {name: get for name, get in readers.items() if name not in {*matrices, *factors.values()}}
    if dtype is not None or {*matrices, *others} != {*shapes}:
        floats = {name: partial(lambda get: dequantise(*get()), get) for name, get in matrices.items()}
        state = complete_state(config, others | floats, dtype or torch.float32, directory)
        return Checkpoint(config, state, tokenizer)
    state = {}
    for name, get in others.items():
        tensor = get()
        state[name] = checked_tensor(name, tensor, shapes[name], tensor.dtype, directory)
    for name, both in matrices.items():
        state[name], state[factors[name]] = both()
    return Checkpoint(config, state, tokenizer, bits=bits)


def _factors(name: str) -> str:
    """Return the name of the factors of a weight matrix."""
    return f"{name.removesuffix('weight')}factors"


def _matrix(
    name: str, shape: torch.Size, readers: Mapping[str, Callable[[], Tensor]], where: Path
) -> tuple[Tensor, Tensor]:
    """Return whole numbers and factors that stand for a matrix of this shape, in memory of their own."""
    weight, factors = readers[name](), readers[_factors(name)]()
    n_out, n_in = shape
    stored = (tuple(weight.shape), tuple(factors.shape))
    in_8 = stored == ((n_out, n_in), (n_out,))
    in_4 = stored == ((n_out, n_in // 2), (n_out, n_in // GROUP)) and n_in % GROUP == 0
    if not (in_8 or in_4) or (weight.dtype, factors.dtype) != (torch.int8, torch.float32):
        raise GptlabError(
            f"the checkpoint {where} has {name} as {weight.dtype} {stored[0]} with factors {factors.dtype} {stored[1]},"
            f" which make no matrix {tuple(shape)}; restore it"
        )
    if not torch.isfinite(factors).all():
        raise GptlabError(f"the checkpoint {where} is damaged: {_factors(name)} holds values that are not numbers")
    return weight.clone(), factors.clone()


def write(directory: Path, checkpoint: Checkpoint, extra: Mapping[str, bytes] | None = None) -> None:
    """Write a model directory, replacing the one that may be there only once all is on disk.

    Args:
        directory: made when it does not exist; other files in it stay.
        checkpoint: the configuration, every tensor of `GPT.tensors` by name in the dtype to store (of quantised weights
            the whole numbers and their factors), and the tokenizer.
        extra: further files, by name.

    Raises:
        GptlabError: the directory cannot be written, its path is not UTF-8, or the disk is full.
    """
    refuse_bytes(directory)
    config, state, tokenizer, _, bits = checkpoint
    values = config.to_dict()
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    metadata = {
        "format": "pt",
        "config": json.dumps(values),
        "tokenizer": _identity(tokenizer),
        "sha256": json.dumps({name: tensor_sha256(tensor) for name, tensor in tensors.items()}),
    }
    header: dict[str, Any] = {"format": FORMAT, "version": VERSION if bits is None else QUANTISED, "model": values}
    if bits is not None:
        metadata["precision"] = header["precision"] = f"int{bits}"
    files: dict[str, bytes | Callable[[Path], None]] = dict(tokenizer.files() if tokenizer else {})
    files.update(extra or {})
    files["config.json"] = json.dumps(header, indent=2).encode() + b"\n"
    files["model.safetensors"] = lambda path: save_file(tensors, path, metadata)
    write_files(directory, files, stale=[name for name in TOKENIZER_FILES if name not in files])


def _identity(tokenizer: Tokenizer | None) -> str:
    """What tells one tokenizer from another, the ids at which its texts begin and end included."""
    if tokenizer is None:
        return ""
    files = tokenizer.files()
    return hashlib.sha256(files["tokenizer.json"] + files.get("generation_config.json", b"")).hexdigest()
