"""TensorFlow's "tensor bundle" (the V2 checkpoint), without TensorFlow.

`PREFIX.index` is a sorted table as LevelDB writes it (`table_format.md` there): blocks of records whose keys leave out
what they share with the key before, an index of the blocks, and a footer. Its records are protocol buffers: under the
empty key a `BundleHeaderProto`, under each tensor's name a `BundleEntryProto` (`tensor_bundle.proto`).
`PREFIX.data-00000-of-00001` holds the tensors' bytes and nothing else. Everything carries a CRC-32C, and all of them
are checked.

Nothing here recurses, and every loop consumes bytes of a file of at most `LARGEST_INDEX`.
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

from gptlab.checkpoints.crc32c import masked_crc32c
from gptlab.checkpoints.files import Lazy
from gptlab.errors import GptlabError
from gptlab.placeholders import refuse_placeholder

LARGEST_INDEX = 2**20
"""Bytes; that of GPT-2 XL, with 580 tensors, has 20,000."""
LONGEST_NAME = 1000
_MAGIC = 0xDB4775248B80FB57
_FOOTER = 48
_TRAILER = 5  # of a block: how it is compressed, and its checksum
_DTYPES = {1: torch.float32, 2: torch.float64, 14: torch.bfloat16, 19: torch.float16}


class Damaged(Exception):
    """What is wrong with an index, for the message that names the file."""


class Entry(NamedTuple):
    """Where a tensor lies: its number of TensorFlow's for the type, its shape, file, first byte, bytes and checksum."""

    dtype: int
    shape: tuple[int, ...]
    shard: int
    offset: int
    size: int
    crc32c: int


def open_bundle(prefix: Path) -> Lazy:
    """Open a checkpoint by what its files' names begin with; its tensors stay on disk until they are called for.

    Whole numbers and strings, such as a step, are left out.

    Raises:
        GptlabError: a file is missing or damaged, or in a variant of the format that is not supported.
    """
    index = prefix.with_name(prefix.name + ".index")
    refuse_placeholder(index)
    try:
        if index.stat().st_size > LARGEST_INDEX:
            raise Damaged(f"it has more than {LARGEST_INDEX:,} bytes")
        n_shards, entries = _entries(index.read_bytes())
    except OSError as error:
        raise GptlabError(f"{index} cannot be read: {error.strerror}") from None
    except Damaged as error:
        raise GptlabError(
            f"{index} is not an intact index of a TensorFlow checkpoint ({error}); copy it again"
        ) from None
    shards: dict[int, np.memmap] = {}
    tensors: Lazy = {}
    for name, entry in entries.items():
        if entry.shard not in shards:
            shards[entry.shard] = _map(prefix.with_name(f"{prefix.name}.data-{entry.shard:05}-of-{n_shards:05}"))
        tensors[name] = _reader(name, entry, shards[entry.shard])
    if sum(entry.size for entry in entries.values()) > sum(map(len, shards.values())):
        raise GptlabError(f"{index} is damaged: its tensors overlap; copy it again")
    return tensors


def _map(path: Path) -> np.memmap:
    refuse_placeholder(path)
    try:
        # Copy on write: PyTorch warns of memory that cannot be written, and nobody writes to it.
        return np.memmap(path, dtype=np.uint8, mode="c")
    except FileNotFoundError:
        raise GptlabError(f"{path} is missing; copy it beside the index") from None
    except (OSError, ValueError) as error:  # the second of an empty file
        raise GptlabError(f"{path} cannot be read ({error}); copy it again") from None


def _reader(name: str, entry: Entry, shard: np.memmap) -> Callable[[], Tensor]:
    if entry.offset + entry.size > len(shard):
        raise GptlabError(f"{shard.filename} is cut short: {name} lies behind its end; copy it again")

    def read() -> Tensor:
        part = np.asarray(shard[entry.offset : entry.offset + entry.size])
        if masked_crc32c(part) != entry.crc32c:
            raise GptlabError(f"{shard.filename} is damaged: {name} fails its checksum; copy it again")
        dtype = _DTYPES[entry.dtype]
        # A tensor may stand behind a string of any length, but must not be read from such a place.
        aligned = part if entry.offset % dtype.itemsize == 0 else part.copy()
        return torch.from_numpy(aligned).view(dtype).reshape(entry.shape)

    return read


def _entries(data: bytes) -> tuple[int, dict[str, Entry]]:
    """Parse an index: the number of data files, and an entry for each tensor of floating-point numbers."""
    if len(data) < _FOOTER:
        raise Damaged("it is cut short")
    (magic,) = struct.unpack_from("<Q", data, len(data) - 8)
    if magic != _MAGIC:
        raise Damaged("it does not end as one does")
    footer = Reader(data[-_FOOTER:-8])
    _block(data, footer)  # an index of further information, of which there is none
    header: bytes | None = None
    entries: dict[str, Entry] = {}
    last: bytes | None = None
    for _, handle in _records(_block(data, footer)):
        for key, value in _records(_block(data, Reader(handle))):
            if last is not None and key <= last:
                raise Damaged("its keys are out of order")
            last = key
            if key == b"":
                header = value
                continue
            try:
                name = key.decode()
            except UnicodeDecodeError:
                raise Damaged("a name is not text, as in a checkpoint of variables cut into parts") from None
            entry = _entry(value, name)
            if entry is not None:
                entries[name] = entry
    if header is None:
        raise Damaged("it has no header")
    return _header(header, entries), entries


def _block(data: bytes, handle: Reader) -> bytes:
    offset, size = handle.varint(), handle.varint()
    if offset + size + _TRAILER > len(data):
        raise Damaged("a block lies behind the end")
    kind, checksum = struct.unpack_from("<BI", data, offset + size)
    if masked_crc32c(data[offset : offset + size + 1]) != checksum:
        raise Damaged("a block fails its checksum")
    if kind:
        raise Damaged("a block is compressed, which TensorFlow's own saver never does")
    return data[offset : offset + size]


def _records(block: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield the keys and values of a block, in its order."""
    if len(block) < 4:
        raise Damaged("a block is cut short")
    (n_restarts,) = struct.unpack_from("<I", block, len(block) - 4)
    end = len(block) - 4 - 4 * n_restarts
    if end < 0:
        raise Damaged("a block is shorter than it says")
    # The restart points serve a search; whoever reads all has no use for them.
    reader = Reader(block[:end])
    key: bytes | None = None
    while not reader.at_end:
        n_shared, n_own, n_value = reader.varint(), reader.varint(), reader.varint()
        if n_shared > len(key or b"") or n_shared + n_own > LONGEST_NAME:
            raise Damaged("a key is longer than any name")
        new = (key or b"")[:n_shared] + reader.take(n_own)
        if key is not None and new <= key:
            raise Damaged("its keys are out of order")
        key = new
        yield key, reader.take(n_value)


def _header(value: bytes, entries: dict[str, Entry]) -> int:
    fields = dict(_fields(value))
    n_shards = fields.get(1, 0)
    if fields.get(2, 0) != 0:
        raise Damaged("its tensors are big-endian, which is not supported")
    if not isinstance(n_shards, int) or any(entry.shard >= n_shards for entry in entries.values()):
        raise Damaged("it names data files beyond those that it counts")
    return n_shards


def _entry(value: bytes, name: str) -> Entry | None:
    numbers = {1: 0, 3: 0, 4: 0, 5: 0, 6: 0}
    shape: list[int] = []
    for field, content in _fields(value):
        if field in numbers and isinstance(content, int):
            numbers[field] = content
        elif field == 2 and isinstance(content, bytes):
            shape += _shape(content)
        elif field == 7:
            raise Damaged(f"{name} is cut into parts, which is not supported; save it whole")
    if numbers[1] not in _DTYPES:
        return None
    entry = Entry(numbers[1], tuple(shape), numbers[3], numbers[4], numbers[5], numbers[6])
    if any(n >= 2**63 for n in (*shape, entry.shard, entry.offset, entry.size)):
        raise Damaged(f"{name} has a negative size or place")
    if math.prod(shape) * _DTYPES[entry.dtype].itemsize != entry.size:
        raise Damaged(f"{name} has {entry.size} bytes, which its shape {shape} does not fill")
    return entry


def _shape(value: bytes) -> Iterator[int]:
    for field, dimension in _fields(value):
        if field == 2 and isinstance(dimension, bytes):
            size = dict(_fields(dimension)).get(1, 0)
            yield size if isinstance(size, int) else 0


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yield the number and the content of each field of a protocol buffer; messages inside it stay bytes."""
    reader = Reader(message)
    while not reader.at_end:
        tag = reader.varint()
        match tag & 7:
            case 0:
                yield tag >> 3, reader.varint()
            case 1:
                yield tag >> 3, int.from_bytes(reader.take(8), "little")
            case 2:
                yield tag >> 3, reader.take(reader.varint())
            case 5:
                yield tag >> 3, int.from_bytes(reader.take(4), "little")
            case kind:
                raise Damaged(f"a field of kind {kind}")


class Reader:
    """Bytes, read from the front; raises `Damaged` at their end."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    @property
    def at_end(self) -> bool:
        """Whether all is read."""
        return self._at == len(self._data)

    def take(self, n: int) -> bytes:
        """Return the next ``n`` bytes."""
        if n > len(self._data) - self._at:
            raise Damaged("a record is cut short")
        self._at += n
        return self._data[self._at - n : self._at]

    def varint(self) -> int:
        """Return the next number, stored in as few groups of 7 bits as it needs and at most ten."""
        number = 0
        for shift in range(0, 70, 7):
            byte = self.take(1)[0]
            number |= (byte & 0x7F) << shift
            if byte < 0x80:
                return number & (2**64 - 1)
        raise Damaged("a number does not end")
