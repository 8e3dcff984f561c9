"""From pieces of documents to files of ids, on all cores."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gptlab.text.splits import SPLITS, Parted
from gptlab.text.tokenizers import Tokenizer

_JOB = 2**18  # characters that a thread encodes at a time

Job = list[tuple[str, bool, int]]


class Encoded(NamedTuple):
    """What a job gives for one split.

    Attributes:
        ids: of its texts, each document followed by the mark that opens the next (`Tokenizer.between`).
        ends: places in ``ids`` after each document that ends there, int64.
        n_bytes: of UTF-8 text.
    """

    ids: np.ndarray
    ends: np.ndarray
    n_bytes: int


def encode(
    tokenizer: Tokenizer, parted: Parted, dtype: np.dtype[Any], marks: tuple[int, ...]
) -> Iterator[list[Encoded]]:
    """Encode pieces on all cores; yield the results in order, for each split of `SPLITS`; ``marks`` end documents."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    pending: deque[Future[list[Encoded]]] = deque()
    pool = ThreadPoolExecutor(cores)
    try:
        for job in _jobs(parted, whole=not tokenizer.splits_as_gpt2):
            pending.append(pool.submit(_encode, tokenizer, job, dtype, marks))
            if len(pending) > 2 * cores:  # enough to keep them busy while this thread reads and writes
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _jobs(parted: Parted, whole: bool) -> Iterator[Job]:
    """Gather pieces until a thread is worth its start; ``whole``: join those of a document."""
    job: Job = []
    size = 0
    parts: list[str] = []
    for text, ends, side in parted:
        size += len(text)
        parts.append(text)
        if ends or not whole:
            job.append(("".join(parts), ends, side))
            parts.clear()
            if size >= _JOB:
                yield job
                job, size = [], 0
    if job:
        yield job


def _encode(tokenizer: Tokenizer, job: Job, dtype: np.dtype[Any], marks: tuple[int, ...]) -> list[Encoded]:
    arrays = tokenizer.encode_arrays([text for text, _, _ in job])
    between = np.array(marks, dtype=np.uint32)
    parts: list[list[np.ndarray]] = [[np.empty(0, np.uint32)] for _ in SPLITS]
    ends: list[list[int]] = [[] for _ in SPLITS]
    n_tokens, n_bytes = [0] * len(SPLITS), [0] * len(SPLITS)
    for (text, ends_here, side), ids in zip(job, arrays, strict=True):
        parts[side].append(ids)
        n_tokens[side] += len(ids)
        n_bytes[side] += len(text) if text.isascii() else len(text.encode())
        if ends_here:
            parts[side].append(between)
            n_tokens[side] += len(between)
            ends[side].append(n_tokens[side])
    return [
        Encoded(np.concatenate(parts[side]).astype(dtype), np.array(ends[side], dtype="<i8"), n_bytes[side])
        for side in range(len(SPLITS))
    ]


class SplitWriter:
    """Writes one split into a directory: shards, where documents end, and what the index says of them.

    Args:
        folder: where to.
        name: of the split.
        dtype: of the ids.
        shard_tokens: most ids in a file.
        mark: the id that precedes the first document, or None; every document is followed by it.
        entry: what the index says of the split that this one continues; its shards stay where they are.
        document_ends: of that split.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        dtype: np.dtype[Any],
        shard_tokens: int,
        mark: int | None = None,
        entry: dict[str, Any] | None = None,
        document_ends: np.ndarray | None = None,
    ) -> None:
        self.name = name
        self._folder, self._dtype, self._shard_tokens = folder, dtype, shard_tokens
        self._entry = entry or {"tokens": 0, "documents": 0, "bytes": 0, "shards": []}
        self._shards: list[dict[str, Any]] = list(self._entry["shards"])
        self._shard: _HashedFile | None = None
        self.n_tokens, self.n_documents, self.n_bytes = (self._entry[key] for key in ("tokens", "documents", "bytes"))
        # Under a name of its own, so that the old one serves until the index changes.
        self._ends = _HashedFile(folder / f"{name}-ends-{len(self._shards):05d}.bin")
        if document_ends is not None:
            self._ends.write(document_ends)
        if entry is None and mark is not None:
            self._write_ids(np.array([mark], dtype))

    def write(self, encoded: Encoded) -> None:
        self._ends.write(encoded.ends + self.n_tokens)
        self.n_documents += len(encoded.ends)
        self.n_bytes += encoded.n_bytes
        self._write_ids(encoded.ids)

    def _write_ids(self, ids: np.ndarray) -> None:
        self.n_tokens += len(ids)
        while len(ids):
            if self._shard is None:
                self._shard = _HashedFile(self._folder / f"{self.name}-{len(self._shards):05d}.bin")
            room = self._shard_tokens - self._shard.n_values
            self._shard.write(ids[:room])
            ids = ids[room:]
            if self._shard.n_values == self._shard_tokens:
                self._finish_shard()

    def finish(self) -> dict[str, Any]:
        """Bring everything to the disk; return what the index is to say of the split."""
        self._finish_shard()
        ends = self._ends.finish()
        return {
            "tokens": self.n_tokens,
            "documents": self.n_documents,
            "bytes": self.n_bytes,
            "shards": self._shards,
            "ends": {"file": ends["file"], "sha256": ends["sha256"]},
        }

    def close(self) -> None:
        """Let go of the files, finished or not."""
        for file in (self._shard, self._ends):
            if file is not None:
                file.close()

    def _finish_shard(self) -> None:
        if self._shard is not None:
            self._shards.append(self._shard.finish())
            self._shard = None


class _HashedFile:
    """A file that is hashed while it is written."""

    def __init__(self, path: Path) -> None:
        self._path, self._sha256, self.n_values = path, hashlib.sha256(), 0
        self._file = path.open("wb")

    def write(self, values: np.ndarray) -> None:
        content = np.ascontiguousarray(values).data
        self._file.write(content)
        self._sha256.update(content)
        self.n_values += len(values)

    def finish(self) -> dict[str, Any]:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return {"file": self._path.name, "tokens": self.n_values, "sha256": self._sha256.hexdigest()}

    def close(self) -> None:
        with contextlib.suppress(OSError):  # what it still holds may not fit on the disk, and is not wanted any more
            self._file.close()
