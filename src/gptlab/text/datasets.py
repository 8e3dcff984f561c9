"""Token shards: a corpus as ids on disk, made by `prepare` and read through memory maps.

A dataset is a directory with the tokenizer's files, raw little-endian ids in `training-00000.bin`,
`validation-00000.bin` and so on, where each document ends in `training-ends-00000.bin` and `validation-ends-00000.bin`
(int64, the first position after the document and the mark that follows it), and `index.json`, which says what belongs
to it.

Where the tokenizer has ``<|endoftext|>``, each document is preceded by that mark, and the last one is followed by it:
mark, text, mark, text, mark. A mark opens the document after it. Version 1 of the format lacks the very first mark.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gptlab.errors import GptlabError
from gptlab.text.splits import SPLITS, Cut, Rule
from gptlab.text.tokenizers import GPT2Tokenizer, Tokenizer, read_tokenizer

FORMAT = "gptlab-tokens"
VERSION = 2
TWO_MARKS = 3
"""The version where a document is ended by one token and the next one opened by another."""
VERSIONS = (1, 2, TWO_MARKS)
"""Those that can be read."""
INDEX = "index.json"

_HEADER = 256  # int32 values before the ids in a file of llm.c
_MAGIC = 20240520


class Shard(NamedTuple):
    """A file of ids, of which the first is ``offset`` bytes into it; ``sha256`` is "" where it is not recorded."""

    path: Path
    n_tokens: int
    offset: int = 0
    sha256: str = ""


class Split:
    """The ids of one part of a dataset, one after the other, read from disk where they are asked for.

    Attributes:
        n_tokens: ids in all, the marks between documents among them.
        n_documents: documents; 0 where the format does not say.
        n_bytes: bytes of UTF-8 text, or None where the format does not say.
        dtype: of the ids.
        marks: how many marks follow each document: none, ``<|endoftext|>``, or one that ends it and one that opens the
            next.
        first: where the first document's text begins: 1 where a mark precedes it.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        dtype: np.dtype[Any],
        vocab_size: int,
        *,
        n_documents: int = 0,
        n_bytes: int | None = None,
        ends: Shard | None = None,
        marks: int = 0,
        first: int = 0,
    ) -> None:
        self.shards, self.dtype, self.vocab_size = tuple(shards), dtype, vocab_size
        self.n_tokens = sum(shard.n_tokens for shard in shards)
        self.n_documents, self.n_bytes = n_documents, n_bytes
        self.marks, self.first = marks, first
        self._ends = ends
        self._starts = np.cumsum([0, *(shard.n_tokens for shard in shards)])
        self._maps: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return self.n_tokens

    def read(self, start: int, stop: int) -> np.ndarray:
        """Return ids ``start`` to ``stop`` (exclusive), one dimension; read-only where they lie in one shard.

        Raises:
            IndexError: not a range of this split.
        """
        if not 0 <= start <= stop <= self.n_tokens:
            raise IndexError(f"tokens {start} to {stop} of a split of {self.n_tokens}")
        parts = []
        i = int(np.searchsorted(self._starts, start, side="right")) - 1
        while start < stop:
            first, end = int(self._starts[i]), min(stop, int(self._starts[i + 1]))
            parts.append(self._map(i)[start - first : end - first])
            start, i = end, i + 1
        if len(parts) == 1:
            return parts[0]
        return np.concatenate(parts) if parts else np.empty(0, self.dtype)

    @cached_property
    def document_ends(self) -> np.ndarray | None:
        """The position after each document and its marks (n_documents,), int64, on disk; None where unrecorded."""
        return None if self._ends is None else _mapped(self._ends, np.dtype("<i8"))

    def documents(self) -> Iterator[np.ndarray]:
        """Yield the ids of each document's text, without the marks; all ids at once where the ends are not recorded."""
        if self.document_ends is None:
            yield self.read(0, self.n_tokens)
            return
        start = self.first
        for end in self.document_ends.tolist():
            yield self.read(start, end - self.marks)
            start = end

    def owners(self, places: np.ndarray) -> np.ndarray:
        """Return which document each place is in, int64; a mark is in the document that it opens.

        Raises:
            GptlabError: it is not recorded where documents end.
        """
        if self.document_ends is None:
            raise GptlabError("the data does not say where its documents end; prepare it with gptlab prepare")
        return np.searchsorted(self.document_ends, places + bool(self.marks), side="right").astype(np.int64)

    def verify(self) -> None:
        """Read everything and compare it with its checksums.

        Raises:
            GptlabError: a file was changed or damaged, or holds an id that the tokenizer does not know.
        """
        for i, shard in enumerate(self.shards):
            _verify(shard)
            if (largest := int(self._map(i).max(initial=0))) >= self.vocab_size:
                raise GptlabError(
                    f"{shard.path} holds the id {largest}, but its tokenizer has {self.vocab_size:,}; prepare it again"
                )
        if self._ends is not None:
            _verify(self._ends)

    def _map(self, i: int) -> np.ndarray:
        if i not in self._maps:
            self._maps[i] = _mapped(self.shards[i], self.dtype)
        return self._maps[i]


@dataclass(frozen=True)
class Dataset:
    """A tokenized corpus.

    Attributes:
        directory: where it lies.
        name: of the corpus.
        tokenizer: whose ids these are.
        training: to learn from.
        validation: held out.
        items: each document is an item to be learned and sampled as a whole, as a name is.
        rule: which says what is held out, or None in other programs' formats.
        tokenizer_sha256: as the index has it; another version of a library may write the same tokenizer otherwise.
    """

    directory: Path
    name: str
    tokenizer: Tokenizer
    training: Split
    validation: Split
    items: bool = False
    rule: Rule | None = None
    tokenizer_sha256: str = ""

    @property
    def held_out(self) -> float | None:
        """The share to be held out; 0 where the validation text is another, None in other programs' formats."""
        return None if self.rule is None else self.rule.held_out

    @cached_property
    def sha256(self) -> str:
        """What tells this dataset from others: a hash over the tokenizer's and the shards', in hexadecimal."""
        digest = hashlib.sha256((self.tokenizer_sha256 or self.tokenizer.sha256).encode())
        for split in (self.training, self.validation):
            digest.update(split.dtype.str.encode())
            for shard in split.shards:
                digest.update((shard.sha256 or _sha256(shard.path)).encode())
        return digest.hexdigest()

    def verify(self) -> None:
        """Read both splits and compare them with their checksums; see `Split.verify`."""
        self.training.verify()
        self.validation.verify()


def open_dataset(path: str | Path) -> Dataset:
    """Open a dataset of `prepare`, a directory with nanoGPT's `train.bin` and `val.bin`, or llm.c's shards.

    The sizes of all files are checked, their contents by `Dataset.verify`. The other programs' ids are those of the
    tokenizer that lies beside them, or else GPT-2's.

    Raises:
        GptlabError: no dataset there, one of a later version, or one with a file missing, truncated or damaged.
    """
    path = Path(path)
    if (path / INDEX).is_file():
        return _open_own(path)
    if (path / "train.bin").is_file() or (path / "val.bin").is_file():
        return _open_nanogpt(path)
    if any(path.glob("*_train*.bin")) or any(path.glob("*_val*.bin")):
        return _open_llmc(path)
    raise GptlabError(f"{path} is not a dataset: it has no {INDEX}; make one with gptlab prepare TEXTS --out DIR")


def read_index(path: Path) -> dict[str, Any]:
    """Return the contents of a dataset's index.

    Raises:
        GptlabError: damaged, or of a later version.
    """
    try:
        values = json.loads((path / INDEX).read_text(encoding="utf-8"))
        known, version = values["format"] == FORMAT, values["version"]
    except OSError as error:
        raise GptlabError(f"{path / INDEX} cannot be read: {error.strerror}") from None
    except (ValueError, TypeError, LookupError) as error:
        raise GptlabError(f"{path / INDEX} is damaged ({error}); prepare the data again") from None
    if not known or version not in VERSIONS:
        raise GptlabError(
            f"{path / INDEX} is of format {values['format']!r}, version {version!r}; this program reads versions"
            f" {' and '.join(map(str, VERSIONS))} of {FORMAT!r}: install a newer gptlab, or prepare the data again"
        )
    return values


def _open_own(path: Path) -> Dataset:
    values = read_index(path)
    tokenizer = read_tokenizer(path)
    if tokenizer is None:
        raise GptlabError(f"the dataset {path} has lost its tokenizer.json; restore it, or prepare the data again")
    try:
        if _sha256(path / "tokenizer.json") != values["tokenizer"]["sha256"]:
            raise GptlabError(f"{path / 'tokenizer.json'} is not the one that made the ids; prepare the data again")
        dtype = np.dtype(values["dtype"]).newbyteorder("<")
        splits, marks = [], min(len(tokenizer.between), 1 + (values["version"] == TWO_MARKS))
        for split in (values["splits"][name] for name in SPLITS):
            shards = [Shard(path / s["file"], int(s["tokens"]), 0, s["sha256"]) for s in split["shards"]]
            ends = Shard(path / split["ends"]["file"], int(split["documents"]), 0, split["ends"]["sha256"])
            for shard, itemsize in [*((shard, dtype.itemsize) for shard in shards), (ends, 8)]:
                _check_size(shard, itemsize)
            splits.append(
                Split(
                    shards,
                    dtype,
                    tokenizer.vocab_size,
                    n_documents=int(split["documents"]),
                    n_bytes=int(split["bytes"]),
                    ends=ends,
                    marks=marks,
                    first=int(bool(marks) and values["version"] > 1),
                )
            )
        return Dataset(
            path,
            values["name"],
            tokenizer,
            splits[0],
            splits[1],
            bool(values["items"]),
            _rule(values),
            values["tokenizer"]["sha256"],
        )
    except (ValueError, TypeError, LookupError) as error:
        if isinstance(error, GptlabError):
            raise
        raise GptlabError(f"{path / INDEX} is damaged ({error!r}); prepare the data again") from None


def _rule(values: dict[str, Any]) -> Rule:
    held_out = float(values["held_out"])
    if values["version"] == 1:
        return Rule(held_out, () if values["forced"] is None else (float(values["forced"]),), exact=True)
    cut = values["cut"]
    moved = tuple(map(float, values["moved"]))
    return Rule(held_out, moved, None if cut is None else Cut(float(cut["rank"]), int(cut["bytes"])))


def _open_nanogpt(path: Path) -> Dataset:
    """nanoGPT's format: nothing but uint16 ids, of GPT-2 unless `meta.pkl` says otherwise."""
    if (path / "meta.pkl").exists() and not (path / "tokenizer.json").exists():
        raise GptlabError(
            f"{path} has its alphabet in meta.pkl, a pickle, which cannot be read without running what is in it;"
            f" make the same data with gptlab prepare {path / 'input.txt'} --tokenizer chars --held-out 0.1 --out DIR"
        )
    shards = []
    for name in ("train.bin", "val.bin"):
        file = path / name
        if not file.is_file():
            raise GptlabError(f"{path} has no {name}; nanoGPT's data are train.bin and val.bin")
        n_bytes = file.stat().st_size
        if n_bytes == 0 or n_bytes % 2:
            raise GptlabError(f"{file} is truncated: {n_bytes:,} bytes are not a whole number of ids; copy it again")
        shards.append([Shard(file, n_bytes // 2)])
    return _of_gpt2_ids(path, *shards)


def _open_llmc(path: Path) -> Dataset:
    """llm.c's format, which modded-nanogpt shares: 256 int32 (magic number, version, ids), then uint16 ids of GPT-2."""
    parts = []
    for pattern in ("*_train*.bin", "*_val*.bin"):
        shards = []
        for file in sorted(path.glob(pattern)):
            header = np.fromfile(file, "<i4", _HEADER)
            if len(header) < _HEADER or header[0] != _MAGIC or header[1] != 1:
                raise GptlabError(
                    f"{file} is not one of llm.c's files of GPT-2 ids: it does not begin with {_MAGIC} and version 1"
                )
            shards.append(Shard(file, int(header[2]), 4 * _HEADER))
            _check_size(shards[-1], 2)
        if not shards:
            raise GptlabError(f"{path} has no file {pattern}; a dataset needs a training and a validation part")
        parts.append(shards)
    return _of_gpt2_ids(path, *parts)


def _of_gpt2_ids(path: Path, training: Sequence[Shard], validation: Sequence[Shard]) -> Dataset:
    tokenizer = read_tokenizer(path) or GPT2Tokenizer()
    splits = [Split(shards, np.dtype("<u2"), tokenizer.vocab_size) for shards in (training, validation)]
    return Dataset(path, path.resolve().name, tokenizer, splits[0], splits[1])


def _mapped(shard: Shard, dtype: np.dtype[Any]) -> np.ndarray:
    if shard.n_tokens == 0:  # an empty file cannot be mapped
        return np.empty(0, dtype)
    return np.memmap(shard.path, dtype, "r", shard.offset, (shard.n_tokens,)).view(np.ndarray)


def _check_size(shard: Shard, itemsize: int) -> None:
    try:
        size = shard.path.stat().st_size
    except OSError:
        raise GptlabError(f"{shard.path} is missing; restore it, or prepare the data again") from None
    expected = shard.offset + shard.n_tokens * itemsize
    if size != expected:
        raise GptlabError(
            f"{shard.path} has {size:,} bytes instead of {expected:,}; restore it, or prepare the data again"
        )


def _verify(shard: Shard) -> None:
    if shard.sha256 and _sha256(shard.path) != shard.sha256:
        raise GptlabError(f"{shard.path} fails its checksum; restore it, or prepare the data again")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
