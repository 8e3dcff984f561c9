"""The GGUF file itself: metadata, then the places of tensors, then their numbers (`ggml/docs/gguf.md`).

Parsed here, since the `gguf` package's reader trusts the counts in a file; nothing here recurses, and every loop
consumes bytes. Numbers in blocks are left to that package, which knows all of their types.
"""

from __future__ import annotations

import functools
import math
import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gptlab.checkpoints.files import Lazy
from gptlab.errors import GptlabError

MAGIC = b"GGUF"
LONGEST_NAME = 1000
LONGEST_STRING = 2**24
MOST_ENTRIES = 2**22
"""Of an array; the largest vocabularies have a tenth of that."""
_SCALARS = {0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 10: "<u8", 11: "<i8", 12: "<f8"}
_BOOL, _STRING, _ARRAY = 7, 8, 9
_PLAIN = {0: torch.float32, 1: torch.float16, 28: torch.float64, 30: torch.bfloat16}


class Damaged(Exception):
    """What is wrong with a file, for the message that names it."""


class Place(NamedTuple):
    """Where a tensor lies: its shape as PyTorch has it, the number of its type, first byte and bytes."""

    shape: tuple[int, ...]
    kind: int
    offset: int
    size: int


def open_gguf(path: Path) -> tuple[dict[str, Any], Lazy]:
    """Open a GGUF file: its metadata, and its tensors, each read and dequantised when it is called for.

    Raises:
        GptlabError: damaged, a version that is not supported, or a type that needs the `gguf` package.
    """
    try:
        data = np.memmap(path, dtype=np.uint8, mode="c")
        metadata, places = _parse(_Reader(data))
    except Damaged as error:
        raise GptlabError(f"{path} is not an intact GGUF file ({error}); copy or download it again") from None
    except (OSError, ValueError) as error:  # the second of an empty file, or of text that is not UTF-8
        raise GptlabError(f"{path} cannot be read as a GGUF file ({error}); copy or download it again") from None
    return metadata, {name: functools.partial(_read, path, data, name, place) for name, place in places.items()}


def _read(path: Path, data: np.memmap, name: str, place: Place) -> Tensor:
    part = np.asarray(data[place.offset : place.offset + place.size])
    if place.kind in _PLAIN:
        dtype = _PLAIN[place.kind]
        aligned = part if place.offset % dtype.itemsize == 0 else part.copy()
        return torch.from_numpy(aligned).view(dtype).reshape(place.shape)
    from gguf import GGMLQuantizationType, quants

    kind = GGMLQuantizationType(place.kind)
    try:
        with np.errstate(all="ignore"):  # what overflows here is refused as no number
            numbers = quants.dequantize(part.reshape(*place.shape[:-1], -1), kind)
    except NotImplementedError:
        raise GptlabError(f"{path} has {name} in the type {kind.name}, which the gguf package cannot read") from None
    return torch.from_numpy(np.ascontiguousarray(numbers, dtype=np.float32)).reshape(place.shape)


def _parse(reader: _Reader) -> tuple[dict[str, Any], dict[str, Place]]:
    if reader.take(4) != MAGIC:
        raise Damaged("it does not begin as one does")
    version = reader.number("<u4")
    if version not in (2, 3):
        raise Damaged(f"version {version}, or the other byte order; versions 2 and 3 can be read")
    n_tensors, n_keys = reader.number("<u8"), reader.number("<u8")
    metadata: dict[str, Any] = {}
    for _ in range(n_keys):
        key = reader.string(LONGEST_NAME)
        if key in metadata:
            raise Damaged(f"the key {key!r} is there twice")
        metadata[key] = _value(reader)
    listed: dict[str, tuple[tuple[int, ...], int, int]] = {}
    for _ in range(n_tensors):
        name, n_dimensions = reader.string(LONGEST_NAME), reader.number("<u4")
        if name in listed or n_dimensions > 4:
            raise Damaged(f"the tensor {name!r} is there twice, or has more than four dimensions")
        shape = tuple(reversed([reader.number("<u8") for _ in range(n_dimensions)]))
        listed[name] = shape, reader.number("<u4"), reader.number("<u8")
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 1 <= alignment <= 2**16:
        raise Damaged(f"an alignment of {alignment!r}")
    start = -(-reader.at // alignment) * alignment
    places = {
        name: Place(shape, kind, start + offset, _size(name, shape, kind))
        for name, (shape, kind, offset) in listed.items()
    }
    for name, place in places.items():
        if place.offset + place.size > reader.end:
            raise Damaged(f"{name} lies behind its end, so it is cut short")
    if sum(place.size for place in places.values()) > reader.end:
        raise Damaged("its tensors overlap")
    return metadata, places


def _size(name: str, shape: tuple[int, ...], kind: int) -> int:
    """Return the bytes of a tensor."""
    n = math.prod(shape)
    if kind in _PLAIN:
        return n * _PLAIN[kind].itemsize
    try:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
    except ImportError:
        raise GptlabError(
            f"the tensor {name} is quantised, which needs the gguf package: pip install 'gptlab[gguf]'"
        ) from None
    if kind not in {known.value for known in GGML_QUANT_SIZES}:
        raise Damaged(f"{name} has the unknown type {kind}")
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    if not shape or shape[-1] % block:
        raise Damaged(f"{name} has rows that are not whole blocks of {block}")
    return n // block * size


def _value(reader: _Reader) -> Any:
    kind = reader.number("<u4")
    if kind != _ARRAY:
        return _scalar(reader, kind)
    of, n = reader.number("<u4"), reader.number("<u8")
    if n > MOST_ENTRIES:
        raise Damaged(f"an array of {n:,} entries")
    if of == _STRING:
        return [reader.string(LONGEST_STRING) for _ in range(n)]
    if of in _SCALARS:
        return np.frombuffer(reader.take(n * np.dtype(_SCALARS[of]).itemsize), dtype=_SCALARS[of]).tolist()
    if of == _BOOL:
        return [byte != 0 for byte in reader.take(n)]
    raise Damaged("an array of arrays, or of an unknown type")


def _scalar(reader: _Reader, kind: int) -> Any:
    if kind == _STRING:
        return reader.string(LONGEST_STRING)
    if kind == _BOOL:
        return reader.take(1) != b"\0"
    if kind not in _SCALARS:
        raise Damaged(f"a value of the unknown type {kind}")
    return reader.number(_SCALARS[kind])


class _Reader:
    """A file, read from the front; raises `Damaged` at its end."""

    def __init__(self, data: np.memmap) -> None:
        self._data: memoryview = np.asarray(data).data
        self.at, self.end = 0, len(data)

    def take(self, n: int) -> bytes:
        if n > self.end - self.at:
            raise Damaged("it is cut short")
        self.at += n
        return bytes(self._data[self.at - n : self.at])

    def number(self, kind: str) -> Any:
        value = np.frombuffer(self.take(np.dtype(kind).itemsize), dtype=kind)[0]
        # Of the numbers that are this float32, the one with the fewest digits: 1e-05, and not 9.999999747378752e-06.
        return float(str(value)) if kind == "<f4" else value.item()

    def string(self, longest: int) -> str:
        (n,) = struct.unpack("<Q", self.take(8))
        if n > longest:
            raise Damaged(f"a text of {n:,} bytes")
        return self.take(n).decode()
