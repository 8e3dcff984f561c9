"""What all formats share: lazy tensors, complete states, and writing that never loses the old file."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gptlab.config import ModelConfig
from gptlab.errors import GptlabError
from gptlab.model.gpt import GPT, SCALES
from gptlab.placeholders import refuse_placeholder
from gptlab.text.tokenizers import Tokenizer

Lazy = dict[str, Callable[[], Tensor]]
"""Tensors by name, each read from disk when it is called for."""


class Checkpoint(NamedTuple):
    """What a reader returns: the configuration, every parameter by name, and the tokenizer if there is one.

    Where there is one of a kind that is not supported, ``no_tokenizer`` says so. ``bits`` is 8 or 4 where the weights
    were saved as whole numbers of so many (`gptlab.model.quantised`).
    """

    config: ModelConfig
    state: dict[str, Tensor]
    tokenizer: Tokenizer | None
    no_tokenizer: str = ""
    bits: Literal[8, 4] | None = None


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        GptlabError: no such file, or not JSON.
    """
    refuse_placeholder(path)
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise GptlabError(f"{path.parent} has no {path.name}; copy it there too") from None
    except OSError as error:
        raise GptlabError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # the second where brackets are nested ten thousand deep
        raise GptlabError(f"{path} is damaged (not valid JSON: {error}); restore it") from None
    if not isinstance(values, dict):
        raise GptlabError(f"{path} is damaged (not a JSON object); restore it")
    return values


def open_safetensors(path: Path) -> tuple[Lazy, dict[str, str]]:
    """Open a safetensors file; return its tensors, still on disk, and its metadata.

    A file in the hub's cache is named by the sha256 of what it should hold, and is checked against it.

    Raises:
        GptlabError: the file is empty, truncated or damaged.
    """
    refuse_placeholder(path)
    refuse_bytes(path)
    # One link only: the blob may itself be a link into the hub's shared store, whose names are other hashes.
    blob = Path(os.readlink(path)) if path.is_symlink() else path
    named = blob.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", blob.name)
    if named and path.exists() and sha256_of(path) != blob.name:
        raise GptlabError(f"{path} is damaged: its sha256 differs from the hub's; delete it and download it again")
    try:
        handle = safe_open(path, framework="pt")
        metadata = handle.metadata() or {}
        names = list(handle.keys())
    except (SafetensorError, OSError) as error:
        reason = "the file is empty" if path.exists() and path.stat().st_size == 0 else error
        raise GptlabError(f"{path} is not an intact safetensors file ({reason}); copy or download it again") from None

    def reader(name: str) -> Callable[[], Tensor]:
        def get() -> Tensor:
            tensor: Tensor = handle.get_tensor(name)
            return tensor

        return get

    return {name: reader(name) for name in names}, metadata


def refuse_bytes(path: Path) -> None:
    """Raise GptlabError where a path is not UTF-8, which a file system allows and safetensors cannot open."""
    try:
        if os.name == "posix":
            os.fsencode(path).decode()
    except UnicodeDecodeError:
        raise GptlabError(f"{path} is not a UTF-8 path, and safetensors opens no other; give it another name") from None


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file's contents, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tensor_sha256(tensor: Tensor) -> str:
    """Return the sha256 of a tensor's bytes as safetensors stores them, in hexadecimal."""
    return hashlib.sha256(tensor.contiguous().view(-1).view(torch.uint8).numpy().data).hexdigest()


def expected_shapes(config: ModelConfig) -> dict[str, torch.Size]:
    """Return the shape of every tensor that defines a model of this configuration."""
    with torch.device("meta"):
        model = GPT(config)
    return {name: tensor.shape for name, tensor in model.tensors().items()}


def complete_state(
    config: ModelConfig,
    tensors: Mapping[str, Callable[[], Tensor]],
    dtype: torch.dtype,
    where: Path,
    described_by: str = "config.json",
) -> dict[str, Tensor]:
    """Read every tensor that the configuration asks for, one at a time, into memory of its own.

    Args:
        config: what the model should hold.
        tensors: a reader for each tensor, by gptlab's names and in gptlab's layout.
        dtype: of the result.
        where: the directory or file, for messages.
        described_by: what holds the configuration, for messages.

    Raises:
        GptlabError: a tensor missing, left over, of a wrong shape, or with values that are not numbers.
    """
    shapes = expected_shapes(config)
    if missing := [name for name in shapes if name not in tensors]:
        raise GptlabError(f"the checkpoint {where} lacks {_list(missing)}; it is incomplete, copy or download it again")
    if extra := [name for name in tensors if name not in shapes]:
        raise GptlabError(
            f"the checkpoint {where} holds {_list(extra)}, which a model of its {described_by} does not have;"
            f" {described_by} and weights do not belong together"
        )
    return {
        name: checked_tensor(
            name, tensors[name](), shape, torch.float32 if name in SCALES else dtype, where, described_by
        )
        for name, shape in shapes.items()
    }


def checked_tensor(
    name: str, tensor: Tensor, shape: torch.Size, dtype: torch.dtype, where: Path, described_by: str = "config.json"
) -> Tensor:
    """Return a tensor of a checkpoint in memory of its own; arguments and errors as `complete_state` has them."""
    if tensor.shape != shape:
        raise GptlabError(
            f"the checkpoint {where} has {name} of shape {tuple(tensor.shape)} where its {described_by} asks for"
            f" {tuple(shape)}; {described_by} and weights do not belong together"
        )
    if not tensor.is_floating_point():
        raise GptlabError(f"the checkpoint {where} has {name} in {tensor.dtype}, which weights never are; restore it")
    # A copy, so that the model does not hang on a file that may change under it.
    tensor = torch.empty(shape, dtype=dtype).copy_(tensor)
    if not torch.isfinite(tensor.sum()) and not torch.isfinite(tensor).all():
        raise GptlabError(f"the checkpoint {where} is damaged: {name} holds values that are not numbers (nan or inf)")
    return tensor


def _list(names: Iterable[str], most: int = 3) -> str:
    names = list(names)
    rest = f" and {len(names) - most} more tensors" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def write_files(
    directory: Path, files: Mapping[str, bytes | Callable[[Path], None]], stale: Iterable[str] = ()
) -> None:
    """Write files into a directory so that a failure leaves the old ones as they were.

    Everything is first written and synced under temporary names in the same directory; only when all of it
    is on disk are the files moved into place, in the order given.

    Args:
        directory: made when it does not exist.
        files: contents by name, or a function that writes the file at a path.
        stale: names that must not stay behind from an earlier save; removed last.

    Raises:
        GptlabError: the directory cannot be written, or the disk is full.
    """
    written: dict[Path, Path] = {}
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            handle, temporary = tempfile.mkstemp(dir=directory, prefix=f".{name}.", suffix=".partial")
            os.close(handle)
            path = Path(temporary)
            written[path] = directory / name
            if isinstance(content, bytes):
                path.write_bytes(content)
            else:
                content(path)
            os.chmod(path, 0o666 & ~_umask())
            with path.open("rb") as file:
                os.fsync(file.fileno())
        for temporary_path, final in written.items():
            os.replace(temporary_path, final)
        for name in stale:
            (directory / name).unlink(missing_ok=True)
        _sync_directory(directory)
    except (OSError, SafetensorError) as error:
        full = (
            getattr(error, "errno", None) == errno.ENOSPC
            or "No space left" in str(error)
            or "StorageFull" in str(error)
        )
        reason = "the disk is full" if full else getattr(error, "strerror", None) or str(error)
        raise GptlabError(
            f"cannot write to {directory}: {reason}; what was there before is unchanged, choose another place"
        ) from None
    finally:
        for path in written:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)


def _sync_directory(directory: Path) -> None:
    """Let the moves survive a power cut, on systems where a directory can be synced."""
    if os.name == "posix":
        handle = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
