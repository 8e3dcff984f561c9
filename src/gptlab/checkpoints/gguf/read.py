"""Reading GGUF: llama.cpp's names and settings in gptlab's terms."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptlab.checkpoints.files import Checkpoint, Lazy, complete_state
from gptlab.checkpoints.gguf.container import MAGIC, open_gguf
from gptlab.checkpoints.gguf.names import ARCHITECTURES, NAMES, halved
from gptlab.checkpoints.gguf.vocabulary import read_vocabulary
from gptlab.checkpoints.huggingface.rotary import no_biases
from gptlab.config import ModelConfig, RopeConfig
from gptlab.errors import GptlabError
from gptlab.model.rope import frequencies
from gptlab.text.tokenizers import Tokenizer

_OURS = {theirs: ours for ours, theirs in NAMES.items()}
NORM_EPS = {"layer": "attention.layer_norm_epsilon", "rms": "attention.layer_norm_rms_epsilon"}
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
    state = complete_state(config, _renamed(tensors, config), dtype, file, described_by="metadata")
    return Checkpoint(config, state, read_vocabulary(metadata, file))


def read_tokenizer(path: Path) -> Tokenizer | None:
    """Read only the tokenizer of a GGUF file; arguments and errors as `read`."""
    file = _file(path)
    return read_vocabulary(open_gguf(file)[0], file)


def read_card(path: Path) -> str:
    """Return the model card in a file, its ``general.description``; empty where there is none."""
    description = open_gguf(_file(path))[0].get("general.description")
    return description if isinstance(description, str) else ""


def _config(file: Path, metadata: Mapping[str, Any], tensors: Lazy) -> ModelConfig:
    family = metadata.get("general.architecture")
    if not isinstance(family, str) or family not in ARCHITECTURES:
        raise GptlabError(f"{file} has the architecture {family!r}; gptlab reads {', '.join(ARCHITECTURES)}")
    get = {key.removeprefix(f"{family}."): value for key, value in metadata.items()}
    vocabulary = metadata.get("tokenizer.ggml.tokens")
    kind = ARCHITECTURES[family]
    if get.get("expert_count"):
        raise GptlabError(f"{file} is a mixture of {get['expert_count']} experts, which gptlab does not compute")
    values: dict[str, Any] = {
        "vocab_size": get.get("vocab_size") if vocabulary is None else len(vocabulary),
        "context_length": get.get("context_length"),
        "n_layer": get.get("block_count"),
        "n_head": get.get("attention.head_count"),
        "n_kv_head": get.get("attention.head_count_kv"),
        "n_embd": get.get("embedding_length"),
        "n_inner": get.get("feed_forward_length"),
        "norm_eps": get.get(NORM_EPS[kind["norm"]], 1e-5),
        **kind,
        "bias": kind["norm"] == "layer" or any(re.fullmatch(r"blk\.0\.\w+\.bias", name) for name in tensors),
        "rope": _rope(file, get, tensors) if kind["position"] == "rope" else None,
        "window": get.get("attention.sliding_window") or None,
        "tie_embeddings": "output.weight" not in tensors,
    }
    try:
        return ModelConfig.from_dict(values)
    except GptlabError as error:
        raise GptlabError(f"{file}: {error}") from None


def _rope(file: Path, get: Mapping[str, Any], tensors: Lazy) -> dict[str, Any] | None:
    """Return the settings of rotary positions, or None where they are the usual ones.

    Raises:
        GptlabError: a way to rotate that gptlab does not compute.
    """
    rope: dict[str, Any] = {"theta": get.get("rope.freq_base", 10000.0)}
    scaling, factor = get.get("rope.scaling.type"), get.get("rope.scaling.factor", get.get("rope.scale_linear", 1.0))
    if scaling is None and factor != 1.0:  # as files had it before they named the type
        scaling = "linear"
    if scaling == "linear" and factor != 1.0:
        rope |= {"scaling": "linear", "factor": factor}
    elif scaling not in (None, "none", "linear"):
        raise GptlabError(f"{file} has rope.scaling.type={scaling!r}, which gptlab does not read from GGUF")
    if "rope_freqs.weight" in tensors:
        rope |= _llama3(file, rope["theta"], tensors["rope_freqs.weight"]().double())
    width, heads = get.get("embedding_length"), get.get("attention.head_count")
    whole = width // heads if isinstance(width, int) and isinstance(heads, int) and heads else None
    dimensions, length = get.get("rope.dimension_count"), get.get("attention.key_length")
    if dimensions not in (None, whole):
        raise GptlabError(f"{file} rotates {dimensions} channels of a head of {whole}; gptlab rotates all of them")
    if length not in (None, whole):
        raise GptlabError(f"{file} has heads of {length} channels, which gptlab computes with {whole} only")
    return None if rope == {"theta": 10000.0} else rope


def _llama3(file: Path, theta: float, divisors: Tensor) -> dict[str, Any]:
    """Return the settings of Llama 3.1's scaling, of which a file holds the divisor of each pair's angle (D/2,) alone.

    Raises:
        GptlabError: divisors that no such settings give.
    """
    angles = theta ** (-torch.arange(len(divisors), dtype=torch.float64) / len(divisors))
    factor = float(divisors.max())
    between = (divisors > 1.001) & (divisors < factor * 0.999)
    if factor > 1 and between.any():
        # On the ramp 1 / divisor = fast + (1 - fast) / factor, where fast = (rotations - 1) / 3.
        fast = (1 / divisors[between] - 1 / factor) / (1 - 1 / factor)
        length = round(float(((3 * fast + 1) * 2 * math.pi / angles[between]).median()))
        rope = RopeConfig(theta=theta, scaling="llama3", factor=factor, trained_length=length)
        if torch.allclose(angles / frequencies(rope, 2 * len(divisors), length)[0], divisors, rtol=1e-4):
            return {"scaling": "llama3", "factor": factor, "trained_length": length}
    raise GptlabError(
        f"{file} divides each rotation by a number of its own, but not as Llama 3.1; gptlab cannot read that"
    )


def _renamed(tensors: Lazy, config: ModelConfig) -> Lazy:
    renamed: Lazy = {}
    for name, get in tensors.items():
        if name == "rope_freqs.weight":  # `_rope`
            continue
        block = _BLOCK.fullmatch(name)
        stem, _, leaf = name.rpartition(".")
        if block is not None:
            layer, part, leaf = block.groups()
            ours = f"h.{layer}.{_OURS.get(part, part)}.{leaf}"
        else:
            ours = _OURS.get(name) or f"{_OURS.get(stem, stem)}.{leaf}"
        renamed[ours] = get
    pairs = config.head_dim if config.norm == "rms" else None
    for name in [name for name in renamed if re.fullmatch(r"h\.\d+\.attn_q\.(weight|bias)", name)]:
        parts = [name.replace("attn_q", f"attn_{letter}") for letter in "qkv"]
        if all(part in renamed for part in parts):
            joined = functools.partial(_joined, [renamed.pop(part) for part in parts], pairs)
            renamed[name.replace("attn_q", "attn.c_attn")] = joined
    if config.norm == "rms" and config.bias:  # it has them in attention, or in the feed-forward, or in both
        for part in ("attn", "mlp"):
            if not any(re.fullmatch(rf"h\.0\.{part}\.\w+\.bias", name) for name in renamed):
                renamed |= no_biases(config, part)
    return renamed


def _joined(parts: list[Callable[[], Tensor]], head_dim: int | None) -> Tensor:
    """Return queries, keys and values one below the other.

    Args:
        parts: the three.
        head_dim: channels of a head where the first two are `interleaved`.
    """
    read_parts = [get().float() for get in parts]
    if any(part.ndim != read_parts[0].ndim or part.shape[1:] != read_parts[0].shape[1:] for part in read_parts):
        return read_parts[0]  # refused with the other wrong shapes
    if head_dim is not None and not any(len(part) % head_dim for part in read_parts):
        read_parts[:2] = [halved(part, head_dim) for part in read_parts[:2]]
    return torch.cat(read_parts)
