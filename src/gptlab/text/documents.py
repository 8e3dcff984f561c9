"""Documents from anywhere, one after the other and never all at once: files, directories, pipes, names."""

from __future__ import annotations

import functools
import glob
import hashlib
import io
import re
import shutil
import sys
import sysconfig
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from gptlab.errors import GptlabError, nearest
from gptlab.text import downloads
from gptlab.text.decoding import decoded
from gptlab.text.files import ARCHIVES, READ, Reading, holds_records, read_file, stem_of, suffixes_of
from gptlab.text.records import TEXT_FIELD
from gptlab.text.segmentation import PIECE, Piece, document_pieces, in_pieces, line_pieces
from gptlab.text.tokenizers import END_OF_TEXT

NAMES = ("stdlib", "pydoc", *downloads.NAMES)

Read = Callable[[], Iterator[Piece]]

# WikiText begins an article with a line ` = Title = `, and its sections with ` = = Section = = `.
_ARTICLE = re.compile(r"^ = [^=\n]+ = \n", re.MULTILINE)


@dataclass(frozen=True)
class Documents:
    """A named collection of documents that can be read again and again.

    Attributes:
        name: what to call it in results.
        items: each document is a line of its own, to be learned and sampled as a whole.
        readers: each yields the pieces of some documents, from the start at every call.
        left_out: the files of directories and archives that were not read, and why. Those in archives are known when
            the documents were read once.
        inside: the first place where ``<|endoftext|>`` stands inside a line and so is text; known as `left_out` is.
    """

    name: str
    items: bool
    readers: tuple[Read, ...]
    left_out: dict[str, str] = field(default_factory=dict)
    inside: list[str] = field(default_factory=list)

    def __iter__(self) -> Iterator[str]:
        """Yield each document's whole text, in a fixed order."""
        parts: list[str] = []
        for piece in self.pieces():
            parts.append(piece.text)
            if piece.ends:
                yield "".join(parts)
                parts.clear()

    def pieces(self) -> Iterator[Piece]:
        """Yield the documents in pieces of at most `PIECE` characters; see `in_pieces`.

        Raises:
            GptlabError: no text at all, a file that cannot be read, or one that is not UTF-8 or not JSON lines.
        """
        empty = True
        for reader in self.readers:
            for piece in reader():
                empty = False
                if not self.inside and (place := piece.text.find(END_OF_TEXT)) >= 0:
                    self.inside.append(piece.text[max(0, place - 10) : place + len(END_OF_TEXT) + 10])
                yield piece
        if empty:
            left = f" (left out: {', '.join(list(self.left_out)[:5])})" if self.left_out else ""
            raise GptlabError(f"there is no text in {self.name}{left}; name another corpus")


def documents_of(name: str, texts: Iterable[str], *, items: bool = False) -> Documents:
    """Return texts that are in memory as documents."""
    texts = tuple(texts)
    return Documents(name, items, (lambda: (piece for text in texts for piece in in_pieces(text)),))


def sha256_of_documents(documents: Iterable[str]) -> str:
    """Return a hash of texts and of where each ends, in hexadecimal."""
    digest = hashlib.sha256()
    for document in documents:
        digest.update(hashlib.sha256(document.encode()).digest())
    return digest.hexdigest()


def open_documents(
    sources: Sequence[str],
    *,
    per_line: bool = False,
    text_field: str = TEXT_FIELD,
    report: Callable[[dict[str, Any]], None] = lambda row: None,
) -> Documents:
    """Find texts; they are read when the result is iterated.

    ``<|endoftext|>`` before white space ends a document; so does the end of a file. Each record is a document.

    Args:
        sources: files of text or of records (JSON lines or arrays, CSV, TSV, parquet), compressed or in archives or
            neither, directories of them, patterns such as ``texts/*.txt``, ``-`` for standard input, or a name of
            `NAMES`. A file that is named twice is read once.
        per_line: every line that is not blank is a document, without its end.
        text_field: the field or column of a record that holds the text.
        report: called with plain values during a download.

    Raises:
        GptlabError: nothing there, or a name whose files are neither here nor to be had.
    """
    if not sources:
        raise GptlabError(f"no corpus is named; give files, directories, '-', or one of {', '.join(NAMES)}")
    reading = Reading(per_line, text_field)
    names: list[str] = []
    readers: dict[Any, Read] = {}  # by what they read
    for source in dict.fromkeys(sources):
        if source in NAMES:
            names.append(source)
            readers[source] = _named(source, per_line, report)
        elif source == "-":
            names.append("stdin")
            readers[source] = _spooled(sys.stdin.buffer, "standard input", reading)
        else:
            name, paths = _find(source, reading)
            names.append(name)
            for path in paths:
                if path.is_file():
                    readers[path.resolve()] = functools.partial(_read_file, path, reading)
                else:  # a pipe
                    with _open(path) as file:
                        readers[path] = _spooled(file, str(path), reading)
    name = "+".join(names) if len(names) <= 3 else f"{names[0]}+{len(names) - 1}-more"
    return Documents(name, per_line, tuple(readers.values()), reading.left_out)


def _find(source: str, reading: Reading) -> tuple[str, list[Path]]:
    """Return what to call a source, and its files in the order of their names."""
    path = Path(source)
    if path.is_dir():
        files = [file for file in sorted(path.rglob("*")) if file.is_file() and _belongs(file, reading)]
        if not files:
            raise GptlabError(
                f"the directory {source} holds no .txt, .md, .py or .jsonl file, nor .csv, .tsv, .json or .parquet with"
                f" {reading.text_field!r} in it; name the files, or another corpus"
            )
        return path.resolve().name, files
    if path.exists():
        return stem_of(path), [path]
    if glob.has_magic(source):
        files = [match for match in map(Path, sorted(glob.glob(source, recursive=True))) if not match.is_dir()]
        if not files:
            raise GptlabError(f"no file matches {source}; check the pattern")
        return stem_of(path).strip("*?[]-_. ") or path.parent.name.strip("*?[]") or "texts", files
    hint = "" if "/" in source else nearest(source, NAMES)
    raise GptlabError(
        f"no corpus at {source}{hint}; give a text file, a directory of them, '-', or one of {', '.join(NAMES)}"
    )


def _belongs(path: Path, reading: Reading) -> bool:
    """Is a file of a directory one of its texts? Otherwise it is written down as left out."""
    suffix = suffixes_of(path.name)[0]
    reason = ""
    if suffix not in READ or path.name.startswith("._"):
        reason = "an archive, read when it is named" if suffix in ARCHIVES else "no text"
    elif path.name == "merges.txt" and (path.parent / "tokenizer.json").exists():
        reason = "a tokenizer's merges"  # datasets and models may lie below the directory
    elif suffix == ".json":
        with _open(path) as file:
            if not holds_records(file, str(path), Reading(reading.per_line, reading.text_field)):
                reason = f"no records with {reading.text_field!r}"
    if reason:
        reading.left_out[str(path)] = reason
    return not reason


# --- files ----------------------------------------------------------------------------------------------------


def _open(path: Path) -> IO[bytes]:
    try:
        return path.open("rb")
    except OSError as error:
        raise GptlabError(f"{path} cannot be read: {error.strerror}") from None


def _read_file(path: Path, reading: Reading) -> Iterator[Piece]:
    with _open(path) as file:
        try:
            yield from read_file(file, str(path), reading)
        except OSError as error:
            raise GptlabError(f"{path} cannot be read: {error.strerror}") from None


def _spooled(file: IO[bytes], name: str, reading: Reading) -> Read:
    """Copy what can be read only once to a temporary file, which lives as long as the reader that is returned."""
    copy = tempfile.NamedTemporaryFile(prefix="gptlab-")  # noqa: SIM115
    try:
        shutil.copyfileobj(file, copy, PIECE)
        copy.flush()
    except OSError as error:
        raise GptlabError(f"{name} cannot be copied to {tempfile.gettempdir()}: {error.strerror}; set TMPDIR") from None

    def read() -> Iterator[Piece]:
        with open(copy.name, "rb") as opened:
            yield from read_file(opened, name, reading)

    return read


def _read(file: IO[bytes], name: object, per_line: bool) -> Iterator[Piece]:
    return (line_pieces if per_line else document_pieces)(decoded(file, name))


# --- names ----------------------------------------------------------------------------------------------------


def _named(name: str, per_line: bool, report: Callable[[dict[str, Any]], None]) -> Read:
    if name == "stdlib":
        return functools.partial(_read_stdlib, per_line)
    if name == "pydoc":
        return functools.partial(_read_pydoc, per_line)
    path = downloads.fetch(name, report)
    if path.suffix == ".zip":
        return functools.partial(_read_wikitext, path, per_line)
    return functools.partial(_read_file, path, Reading(per_line))


def _read_stdlib(per_line: bool) -> Iterator[Piece]:
    """Yield the sources of Python's standard library, each a document."""
    root = Path(sysconfig.get_path("stdlib"))
    skip = {"site-packages", "test", "tests", "idlelib", "__pycache__"}
    for path in sorted(p for p in root.rglob("*.py") if not skip & set(p.relative_to(root).parts)):
        content = path.read_bytes()
        try:
            content.decode()
        except UnicodeDecodeError:  # a few of Python's own files are Latin-1 on purpose
            continue
        yield from _read(io.BytesIO(content), path, per_line)


def _read_pydoc(per_line: bool) -> Iterator[Piece]:
    """Yield the language reference that Python shows in `help`, a document for each topic."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise GptlabError("this Python came without its language reference; choose another corpus") from None
    for name in sorted(topics):
        yield from _read(io.BytesIO(topics[name].encode()), name, per_line)


def _read_wikitext(path: Path, per_line: bool) -> Iterator[Piece]:
    """Yield the articles of WikiText's training part; its validation and test parts are left for evaluation."""
    with zipfile.ZipFile(path) as archive:
        member = next(name for name in archive.namelist() if name.endswith("wiki.train.raw"))
        with archive.open(member) as file:
            for article in _articles(decoded(file, member)):
                yield from (line_pieces if per_line else document_pieces)([article])


def _articles(chunks: Iterable[str]) -> Iterator[str]:
    text = ""
    for chunk in chunks:
        # A title may be cut in two, so the last line waits for what follows it.
        text += chunk
        starts = [match.start() for match in _ARTICLE.finditer(text, 0, text.rfind("\n") + 1)]
        for start, end in zip([0, *starts], starts, strict=False):
            yield text[start:end]
        text = text[starts[-1] :] if starts else text
    yield text
