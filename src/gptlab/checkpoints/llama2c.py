"""llama2.c's `model.bin`: a header of seven whole numbers, then the weights in float32 (its `export.py`).

Versions 0 and 1 are read; version 2 holds 8-bit blocks and is refused. In queries and keys the two channels
of a rotated pair stand side by side, as in Meta's own Llama. The tokenizer is SentencePiece's, in a file of its own.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from gptlab.checkpoints.files import Checkpoint, Lazy, complete_state
from gptlab.checkpoints.gguf.names import halved
from gptlab.config import LARGEST, ModelConfig
from gptlab.errors import GptlabError
from gptlab.text.tokenizers import read_tokenizer

ABOUT = "a model.bin of llama2.c"
MAGIC = 0x616B3432
"""At the beginning of version 1 and later; version 0 begins with the width."""
_FIELDS = ("n_embd", "n_inner", "n_layer", "n_head", "n_kv_head", "vocab_size", "context_length")
_NO_TOKENIZER = (
    "llama2.c keeps its tokenizer in a file of its own, of a kind that gptlab does not read (SentencePiece); put the"
    " model's tokenizer.json beside the weights"
)


class Header(NamedTuple):
    """What a file says of itself: version, sizes by their names in `ModelConfig`, and at which byte weights begin."""

    version: int
    sizes: dict[str, int]
    tied: bool
    start: int


def recognises(path: Path) -> bool:
    """Is this a `.bin` file whose first bytes are a header of llama2.c?"""
    if path.suffix != ".bin" or not path.is_file():
        return False
    try:
        header = _header(path)
    except (OSError, struct.error):
        return False
    return header.version > 0 or _plausible(header)


def _header(path: Path) -> Header:
    with path.open("rb") as file:
        head = file.read(256)
    magic, version = struct.unpack_from("<Ii", head)
    if magic == MAGIC:
        sizes = dict(zip(_FIELDS, struct.unpack_from("<7i", head, 8), strict=True))
        return Header(version, sizes, head[36:37] != b"\0", 256)
    sizes = dict(zip(_FIELDS, struct.unpack_from("<7i", head), strict=True))
    tied = sizes["vocab_size"] > 0  # an output head of its own is told by a negative number
    return Header(0, {**sizes, "vocab_size": abs(sizes["vocab_size"])}, tied, 28)


def _plausible(header: Header) -> bool:
    """Could these be the sizes of a model? Other files begin with other numbers."""
    sizes = header.sizes
    if not all(1 <= sizes[name] <= LARGEST[name] for name in _FIELDS):
        return False
    return sizes["n_embd"] % sizes["n_head"] == 0 and sizes["n_head"] % sizes["n_kv_head"] == 0


def read_config(path: Path) -> ModelConfig:
    """Translate the header of a file.

    Raises:
        GptlabError: 8-bit weights, or impossible sizes.
    """
    return _config(path, _header_of(path))


def _header_of(path: Path) -> Header:
    try:
        header = _header(path)
    except (OSError, struct.error):
        raise GptlabError(f"{path} is cut short: it ends inside its header; copy or download it again") from None
    if header.version not in (0, 1):
        raise GptlabError(
            f"{path} is in version {header.version} of llama2.c's format, and gptlab reads versions 0 and 1, in"
            " float32: export the model again with --version 1"
        )
    return header


def _config(path: Path, header: Header) -> ModelConfig:
    form = {"position": "rope", "norm": "rms", "mlp": "swiglu", "bias": False, "tie_embeddings": header.tied}
    try:
        return ModelConfig.from_dict({**header.sizes, **form})
    except GptlabError as error:
        raise GptlabError(f"{path}: {error}") from None


def read(path: Path, dtype: torch.dtype) -> Checkpoint:
    """Read a file, and the tokenizer that may lie beside it.

    Raises:
        GptlabError: as `read_config`, or a file that is shorter or longer than its header says.
    """
    header = _header_of(path)
    config = _config(path, header)
    size = header.start + 4 * sum(math.prod(shape) for _, shape in _parts(config, header.version))
    if path.stat().st_size != size:
        raise GptlabError(
            f"{path} has {path.stat().st_size:,} bytes where its header asks for {size:,}; copy or download it again"
        )
    state = complete_state(config, _tensors(path, config, header), dtype, path, described_by="header")
    tokenizer = read_tokenizer(path.parent) if (path.parent / "tokenizer.json").exists() else None
    return Checkpoint(config, state, tokenizer, "" if tokenizer else _NO_TOKENIZER)


def _parts(config: ModelConfig, version: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the arrays of a file in their order, those of all layers in one: gptlab's name, and the shape."""
    layers, width, inner = config.n_layer, config.n_embd, config.inner
    kv = config.kv_heads * config.head_dim
    embedding, first_norm = ("wte", (config.vocab_size, width)), ("ln_1", (layers, width))
    second_norm, last_norm = ("ln_2", (layers, width)), ("ln_f", (width,))
    attention = [(f"attn.{x}", (layers, rows, width)) for x, rows in (("q", width), ("k", kv), ("v", kv))]
    attention.append(("attn.c_proj", (layers, width, width)))
    shapes = {"c_gate": (layers, inner, width), "c_proj": (layers, width, inner), "c_fc": (layers, inner, width)}
    mlp = [(f"mlp.{name}", shape) for name, shape in shapes.items()]
    if version == 0:
        angles = [("", (2, config.context_length, config.head_dim // 2))]  # cosines and sines, which are computed here
        yield from (embedding, first_norm, *attention, second_norm, *mlp, last_norm, *angles)
    else:
        yield from (first_norm, second_norm, last_norm, embedding, *attention, *mlp)
    if not config.tie_embeddings:
        yield "lm_head", (config.vocab_size, width)


def _tensors(path: Path, config: ModelConfig, header: Header) -> Lazy:
    data = np.memmap(path, dtype=np.uint8, mode="c")
    arrays: dict[str, Tensor] = {}
    at = header.start
    for name, shape in _parts(config, header.version):
        size = 4 * math.prod(shape)
        arrays[name] = torch.from_numpy(data[at : at + size].view("<f4")).view(shape)
        at += size
    readers: Lazy = {}
    for name in arrays:
        if name in ("wte", "ln_f", "lm_head"):
            readers[f"{name}.weight"] = _reader(arrays[name])
        elif name.startswith(("ln_", "mlp.")) or name == "attn.c_proj":
            for layer in range(config.n_layer):
                readers[f"h.{layer}.{name}.weight"] = _reader(arrays[name][layer])
    for layer in range(config.n_layer):
        parts = [arrays[f"attn.{x}"][layer] for x in "qkv"]
        readers[f"h.{layer}.attn.c_attn.weight"] = _joined(parts, config.head_dim)
    return readers


def _reader(tensor: Tensor) -> Callable[[], Tensor]:
    return lambda: tensor


def _joined(parts: list[Tensor], head_dim: int) -> Callable[[], Tensor]:
    return lambda: torch.cat([halved(parts[0], head_dim), halved(parts[1], head_dim), parts[2]])
