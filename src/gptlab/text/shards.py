"""`prepare`: from documents to a dataset on disk, in two passes and with a memory that does not grow with the corpus.

The first pass hashes every document, which says what is held out; the second encodes. Whatever happens on the way, the
dataset is there as a whole or not at all.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import json
import os
import shutil
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from gptlab.errors import GptlabError
from gptlab.progress import Report
from gptlab.text.datasets import FORMAT, INDEX, TWO_MARKS, VERSION, Dataset, Split, open_dataset, read_index
from gptlab.text.documents import Documents
from gptlab.text.encoding import SplitWriter, encode
from gptlab.text.segmentation import in_pieces
from gptlab.text.splits import SPLITS, Division, default_share, divide, divide_alike, divide_between, survey
from gptlab.text.tokenizers import Tokenizer, make_tokenizer

__all__ = ["Dataset", "NewTokenizer", "Split", "TokenizerChoice", "append", "open_dataset", "prepare"]

SHARD_TOKENS = 100_000_000


class TokenizerChoice(Protocol):
    """A tokenizer to make for the corpus; what `make_tokenizer` takes."""

    @property
    def kind(self) -> str: ...
    @property
    def vocab_size(self) -> int: ...


@dataclass(frozen=True)
class NewTokenizer:
    """A `TokenizerChoice`; ``vocab_size`` counts for ``bpe`` only."""

    kind: str
    vocab_size: int = 4096


def prepare(
    documents: Documents,
    tokenizer: Tokenizer | TokenizerChoice,
    out: Path,
    *,
    held_out: float | None = None,
    validation: Documents | None = None,
    shard_tokens: int = SHARD_TOKENS,
    report: Report = lambda row: None,
) -> Dataset:
    """Turn documents into a dataset; ``<|endoftext|>`` precedes each where the tokenizer has it, and ends the last.

    Where a tokenizer begins texts with another token than it ends them with, both stand between documents.

    Args:
        documents: read two or three times; `divide` says which are held out.
        tokenizer: one to use, or what to make: ``bpe`` is trained on the training part, the alphabet of ``chars`` is
            that of both parts.
        out: the directory to make; it appears when all of it is on disk.
        held_out: share of the bytes, between 0 and 1; None is `default_share` of the number of documents.
        validation: a text of one's own to hold out; all of ``documents`` is then trained on.
        shard_tokens: most ids in a file.
        report: called with plain values as the work goes on; ``{"event": "shared", "documents": n}`` says that n
            documents to train on are in ``validation`` too.

    Raises:
        GptlabError: ``out`` exists or cannot be written, no text, too little of it for two parts, an unknown tokenizer,
            or a character that it lacks.
    """
    if held_out is not None and not 0 < held_out < 1:
        raise GptlabError(f"the share to hold out must be between 0 and 1, got {held_out}")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise GptlabError(
            f"{out} exists already; choose another place, remove it, or add to the data there with --append"
        )
    with _workplace(out, "nothing was left there") as folder:
        division, n_bytes = _divide(documents, validation, held_out, report)
        if not isinstance(tokenizer, Tokenizer):
            tokenizer = _make(tokenizer, division, report)
        for name, content in tokenizer.files().items():
            _write_file(folder / name, content)
        dtype = np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")
        opening = next(reversed(tokenizer.between), None)
        writers = [SplitWriter(folder, name, dtype, shard_tokens, opening) for name in SPLITS]
        rule = division.rule
        index = {
            "format": FORMAT,
            "version": TWO_MARKS if len(tokenizer.between) > 1 else VERSION,
            "name": documents.name,
            "items": documents.items,
            "held_out": rule.held_out,
            "moved": list(rule.moved),
            "cut": None if rule.cut is None else {"rank": rule.cut.rank, "bytes": rule.cut.n_bytes},
            "tokenizer": {"sha256": tokenizer.sha256, "vocab_size": tokenizer.vocab_size},
            "dtype": dtype.name,
            "splits": _write_splits(tokenizer, tokenizer.between, division, writers, dtype, n_bytes, report),
        }
        _write_file(folder / INDEX, _json(index))
        _sync(folder)
        if out.exists():
            out.rmdir()  # empty
        os.rename(folder, out)
        _sync(out.parent)
    return open_dataset(out)


def _divide(
    documents: Documents, validation: Documents | None, held_out: float | None, report: Report
) -> tuple[Division, int]:
    """Return which documents are held out, and the bytes of all."""
    surveyed = survey(documents, report)
    if validation is None:
        share = default_share(len(surveyed.ranks)) if held_out is None else held_out
        return divide(documents, surveyed, share), surveyed.n_bytes
    other = survey(validation, report)
    if shared := int(np.isin(surveyed.ranks, other.ranks).sum()):
        report({"event": "shared", "documents": shared})
    return divide_between(documents, validation), surveyed.n_bytes + other.n_bytes


def append(
    documents: Documents,
    out: Path,
    *,
    tokenizer: Tokenizer | None = None,
    shard_tokens: int = SHARD_TOKENS,
    report: Report = lambda row: None,
) -> Dataset:
    """Add documents to a dataset of `prepare`; what is there stays on its side of the split.

    Args:
        documents: what to add.
        out: the dataset.
        tokenizer: must be the dataset's own; None takes it.
        shard_tokens: most ids in a new file.
        report: called with plain values as the work goes on.

    Raises:
        GptlabError: no dataset of `prepare` there, another tokenizer, no text, a character that the tokenizer lacks, or
            ``out`` cannot be written. The dataset is then as it was.
    """
    old = open_dataset(out)
    if old.rule is None:
        raise GptlabError(f"{out} was made by another program; add only to what gptlab prepare made")
    if tokenizer is not None and tokenizer.sha256 != old.tokenizer.sha256:
        raise GptlabError(
            f"{out} holds the ids of another tokenizer; leave --tokenizer out to use its own, or choose another place"
        )
    if documents.items != old.items:
        kinds = ("lines", "documents") if old.items else ("documents", "lines")
        raise GptlabError(f"{out} holds {kinds[0]}, these are {kinds[1]}; give --per-line for both or for neither")
    index = read_index(out)
    with _workplace(out, "what was there before is unchanged") as folder:
        surveyed = survey(documents, report, exact=old.rule.exact)
        division = divide_alike(documents, surveyed, old.rule)
        writers = [
            SplitWriter(
                folder,
                name,
                split.dtype,
                shard_tokens,
                entry=index["splits"][name],
                document_ends=split.document_ends,
            )
            for name, split in zip(SPLITS, (old.training, old.validation), strict=True)
        ]
        marks = old.tokenizer.between[: old.training.marks]  # data of before there were two have one
        splits = _write_splits(old.tokenizer, marks, division, writers, old.training.dtype, surveyed.n_bytes, report)
        _write_file(folder / INDEX, _json({**index, "splits": splits}))
        if read_index(out) != index:
            raise GptlabError(f"{out} was changed meanwhile; run the same command again")
        # The index comes last: before it moves, nothing refers to the other new files.
        for path in sorted(folder.iterdir(), key=lambda path: path.name == INDEX):
            os.replace(path, out / path.name)
        _sync(out)
        _remove_unused(out, splits)
    return open_dataset(out)


def _make(choice: TokenizerChoice, division: Division, report: Report) -> Tokenizer:
    report({"event": "tokenizer", "kind": choice.kind})
    texts: Iterable[str]
    if choice.kind == "bpe":
        texts = _small(text for text, _, split in division.parted() if SPLITS[split] == "training")
    else:
        texts = (text for text, _, _ in division.parted())
    return make_tokenizer(choice.kind, texts, choice.vocab_size)


def _small(texts: Iterable[str]) -> Iterator[str]:
    """Cut texts smaller, where words are not cut: the trainer reads hundreds ahead."""
    for text in texts:
        yield from (piece.text for piece in in_pieces(text, 2**16))


def _write_splits(
    tokenizer: Tokenizer,
    marks: tuple[int, ...],
    division: Division,
    writers: list[SplitWriter],
    dtype: np.dtype[Any],
    n_bytes: int,
    report: Report,
) -> dict[str, Any]:
    """Encode and write everything; return what the index is to say of the splits."""
    done = n_tokens = 0
    try:
        for results in encode(tokenizer, division.parted(), dtype, marks):
            for writer, encoded in zip(writers, results, strict=True):
                writer.write(encoded)
                done += encoded.n_bytes
                n_tokens += len(encoded.ids)
            report({"event": "tokenize", "bytes": done, "total_bytes": n_bytes, "tokens": n_tokens})
        return {writer.name: writer.finish() for writer in writers}
    finally:
        for writer in writers:
            writer.close()


# --- places ---------------------------------------------------------------------------------------------------


@contextmanager
def _workplace(out: Path, otherwise: str) -> Iterator[Path]:
    """Give a directory beside ``out`` to work in, which is gone afterwards unless it was moved.

    A process that is killed leaves its own behind; the next one for the same ``out`` removes it.
    """
    parent, name = os.path.split(os.path.abspath(out))
    beside, prefix = Path(parent), f".{name}.{socket.gethostname()}-"
    try:
        beside.mkdir(parents=True, exist_ok=True)
        for left in beside.glob(f"{glob.escape(prefix)}*.partial"):
            if not _runs(left.name.removeprefix(prefix).removesuffix(".partial")):
                shutil.rmtree(left, ignore_errors=True)
        folder = beside / f"{prefix}{os.getpid()}.partial"
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    except OSError as error:
        reason = "the disk is full" if error.errno == errno.ENOSPC else error.strerror or str(error)
        raise GptlabError(f"cannot write to {out}: {reason}; {otherwise}, choose another place") from None


def _runs(pid: str) -> bool:
    """Is there a process of this number? Where that cannot be asked, yes."""
    if os.name != "posix" or not pid.isdecimal():
        return True
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except OSError:  # somebody else's
        return True
    return True


def _json(values: dict[str, Any]) -> bytes:
    return json.dumps(values, indent=2).encode() + b"\n"


def _write_file(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    """Let the names in a directory survive a power cut, on systems where a directory can be synced."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _remove_unused(out: Path, splits: dict[str, Any]) -> None:
    used = {entry["file"] for split in splits.values() for entry in (*split["shards"], split["ends"])}
    for path in out.glob("*.bin"):
        if path.name.startswith(SPLITS) and path.name not in used:
            with contextlib.suppress(OSError):
                path.unlink()
