"""Reading GGUF: llama.cpp's names and settings in gptlab's terms."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptlab.checkpoints.files import Checkpoint, Lazy, complete_state
from gptlab.checkpoints.gguf.container import MAGIC, open_gguf
from gptlab.checkpoints.gguf.names import ARCHITECTURES, NAMES
from gptlab.checkpoints.gguf.vocabulary import read_vocabulary
from gptlab.config import ModelConfig
from gptlab.errors import GptlabError

_OURS = {theirs: ours for ours, theirs in NAMES.items()}
_BLOCK = re.compile(r"blk\.(\d{1,4})\.(\w+)\.(weight|bias)")


def recognises(path: Path) -> bool:
    """Is this a GGUF file, or a directory with exactly one?"""
    if path.is_dir():
        return len(list(path.glob("*.gguf"))) == 1
    try:
        with path.open("rb") as file:
            return path.suffix == ".gguf" or file.read(4) == MAGIC
    except OSError:
        return False


def _file(path: Path) -> Path:
    return next(path.glob("*.gguf")) if path.is_dir() else path


def read_config(path: Path) -> ModelConfig:
    """Translate the metadata of a GGUF file.

    Raises:
        GptlabError: damaged, another architecture, or a setting that gptlab does not compute.
    """
    file = _file(path)
    metadata, tensors = open_gguf(file)
    return _config(file, metadata, tensors)


def read(path: Path, dtype: torch.dtype) -> Checkpoint:
    """Read a GGUF file, each tensor dequantised to ``dtype``.

    Raises:
        GptlabError: as `read_config`, tensors missing or left over, or a tokenizer that is not supported.
    """
    file = _file(path)
    metadata, tensors = open_gguf(file)
    config = _config(file, metadata, tensors)
    state = complete_state(config, _renamed(tensors), dtype, file, described_by="metadata")
    return Checkpoint(config, state, read_vocabulary(metadata, file))


def read_card(path: Path) -> str:
    """Return the model card in a file, its ``general.description``; empty where there is none."""
    description = open_gguf(_file(path))[0].get("general.description")
    return description if isinstance(description, str) else ""


def _config(file: Path, metadata: Mapping[str, Any], tensors: Lazy) -> ModelConfig:
    family = metadata.get("general.architecture")
    if not isinstance(family, str) or family not in ARCHITECTURES:
        raise GptlabError(f"{file} has the architecture {family!r}; gptlab reads {' and '.join(ARCHITECTURES)}")
    get = {key.removeprefix(f"{family}."): value for key, value in metadata.items()}
    width, heads = get.get("embedding_length"), get.get("attention.head_count")
    vocabulary = metadata.get("tokenizer.ggml.tokens")
    rope: dict[str, Any] | None = None
    if family == "starcoder2":
        rope = {"theta": get.get("rope.freq_base", 10000.0)}
        scaling = get.get("rope.scaling.type", "none")
        if scaling == "linear":
            rope |= {"scaling": "linear", "factor": get.get("rope.scaling.factor", 1.0)}
        elif scaling != "none":
            raise GptlabError(f"{file} has rope.scaling.type={scaling!r}, which gptlab does not read from GGUF")
        dimensions = get.get("rope.dimension_count")
        whole = width // heads if isinstance(width, int) and isinstance(heads, int) and heads else None
        if dimensions not in (None, whole):
            raise GptlabError(f"{file} rotates {dimensions} channels of a head of {whole}; gptlab rotates all of them")
        if rope == {"theta": 10000.0}:
            rope = None
    values: dict[str, Any] = {
        "vocab_size": get.get("vocab_size") if vocabulary is None else len(vocabulary),
        "context_length": get.get("context_length"),
        "n_layer": get.get("block_count"),
        "n_head": heads,
        "n_kv_head": get.get("attention.head_count_kv"),
        "n_embd": width,
        "n_inner": get.get("feed_forward_length"),
        "norm_eps": get.get("attention.layer_norm_epsilon", 1e-5),
        "position": ARCHITECTURES[family],
        "rope": rope,
        "window": get.get("attention.sliding_window") or None,
        "tie_embeddings": "output.weight" not in tensors,
    }
    try:
        return ModelConfig.from_dict(values)
    except GptlabError as error:
        raise GptlabError(f"{file}: {error}") from None


def _renamed(tensors: Lazy) -> Lazy:
    renamed: Lazy = {}
    for name, get in tensors.items():
        block = _BLOCK.fullmatch(name)
        stem, _, leaf = name.rpartition(".")
        if block is not None:
            layer, part, leaf = block.groups()
            ours = f"h.{layer}.{_OURS.get(part, part)}.{leaf}"
        else:
            ours = _OURS.get(name) or f"{_OURS.get(stem, stem)}.{leaf}"
        renamed[ours] = get
    for name in [name for name in renamed if re.fullmatch(r"h\.\d+\.attn_q\.(weight|bias)", name)]:
        parts = [name.replace("attn_q", f"attn_{letter}") for letter in "qkv"]
        if all(part in renamed for part in parts):
            renamed[name.replace("attn_q", "attn.c_attn")] = functools.partial(_joined, [renamed.pop(p) for p in parts])
    return renamed


def _joined(parts: list[Callable[[], Tensor]]) -> Tensor:
    read_parts = [get().float() for get in parts]
    if any(part.ndim != read_parts[0].ndim or part.shape[1:] != read_parts[0].shape[1:] for part in read_parts):
        return read_parts[0]  # refused with the other wrong shapes
    return torch.cat(read_parts)
