"""Documents from anywhere, one after the other and never all at once: files, directories, pipes, names."""

from __future__ import annotations

import codecs
import functools
import glob
import gzip
import hashlib
import io
import json
import re
import shutil
import sys
import sysconfig
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from gptlab.errors import GptlabError, nearest
from gptlab.text import downloads
from gptlab.text.segmentation import PIECE, Piece, document_pieces, in_pieces, line_pieces
from gptlab.text.tokenizers import refuse_surrogates

SUFFIXES = (".txt", ".md", ".py", ".jsonl")
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
    """

    name: str
    items: bool
    readers: tuple[Read, ...]

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
                yield piece
        if empty:
            raise GptlabError(f"there is no text in {self.name}; name another corpus")


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
    report: Callable[[dict[str, Any]], None] = lambda row: None,
) -> Documents:
    """Find texts; they are read when the result is iterated.

    A line ``<|endoftext|>`` ends a document; so does the end of a file. In JSON lines, each ``text`` is a document.

    Args:
        sources: files of text or of JSON lines (``.jsonl``), either of them compressed (``.gz``), directories of them,
            patterns such as ``texts/*.txt``, ``-`` for standard input, or a name of `NAMES`. A file that is named twice
            is read once.
        per_line: every line that is not blank is a document, without its end.
        report: called with plain values during a download.

    Raises:
        GptlabError: nothing there, or a name whose files are neither here nor to be had.
    """
    if not sources:
        raise GptlabError(f"no corpus is named; give files, directories, '-', or one of {', '.join(NAMES)}")
    names: list[str] = []
    readers: dict[Any, Read] = {}  # by what they read
    for source in dict.fromkeys(sources):
        if source in NAMES:
            names.append(source)
            readers[source] = _named(source, per_line, report)
        elif source == "-":
            names.append("stdin")
            readers[source] = _spooled(sys.stdin.buffer, "standard input", per_line)
        else:
            name, paths = _find(source)
            names.append(name)
            for path in paths:
                if path.is_file():
                    readers[path.resolve()] = functools.partial(_read_file, path, per_line)
                else:  # a pipe
                    with _open(path) as file:
                        readers[path] = _spooled(file, str(path), per_line)
    name = "+".join(names) if len(names) <= 3 else f"{names[0]}+{len(names) - 1}-more"
    return Documents(name, per_line, tuple(readers.values()))


def _find(source: str) -> tuple[str, list[Path]]:
    """Return what to call a source, and its files in the order of their names."""
    path = Path(source)
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if _uncompressed(p).suffix in SUFFIXES and p.is_file())
        # A tokenizer's list of merges is no text, and datasets and models may lie below the directory.
        files = [p for p in files if p.name != "merges.txt" or not (p.parent / "tokenizer.json").exists()]
        if not files:
            raise GptlabError(
                f"the directory {source} holds no .txt, .md, .py or .jsonl file; name the files, or another corpus"
            )
        return path.resolve().name, files
    if path.exists():
        return _uncompressed(path).stem, [path]
    if glob.has_magic(source):
        files = [match for match in map(Path, sorted(glob.glob(source, recursive=True))) if not match.is_dir()]
        if not files:
            raise GptlabError(f"no file matches {source}; check the pattern")
        return _uncompressed(path).stem.strip("*?[]-_. ") or path.parent.name.strip("*?[]") or "texts", files
    hint = "" if "/" in source else nearest(source, NAMES)
    raise GptlabError(
        f"no corpus at {source}{hint}; give a text file, a directory of them, '-', or one of {', '.join(NAMES)}"
    )


def _uncompressed(path: Path) -> Path:
    return path.with_suffix("") if path.suffix == ".gz" else path


# --- files ----------------------------------------------------------------------------------------------------


def _open(path: Path) -> IO[bytes]:
    try:
        return cast(IO[bytes], gzip.open(path)) if path.suffix == ".gz" else path.open("rb")
    except OSError as error:
        raise GptlabError(f"{path} cannot be read: {error.strerror}") from None


def _read_file(path: Path, per_line: bool) -> Iterator[Piece]:
    with _open(path) as file:
        try:
            yield from _read(file, path, per_line, json_lines=_uncompressed(path).suffix == ".jsonl")
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise GptlabError(f"{path} is no intact gzip file ({error}); copy or download it again") from None
        except OSError as error:
            raise GptlabError(f"{path} cannot be read: {error.strerror}") from None


def _spooled(file: IO[bytes], name: str, per_line: bool) -> Read:
    """Copy what can be read only once to a temporary file, which lives as long as the reader that is returned."""
    copy = tempfile.NamedTemporaryFile(prefix="gptlab-")  # noqa: SIM115
    try:
        shutil.copyfileobj(file, copy, PIECE)
        copy.flush()
    except OSError as error:
        raise GptlabError(f"{name} cannot be copied to {tempfile.gettempdir()}: {error.strerror}; set TMPDIR") from None

    def read() -> Iterator[Piece]:
        with open(copy.name, "rb") as opened:
            json_lines = _has_text(opened.readline())
            opened.seek(0)
            yield from _read(opened, name, per_line, json_lines)

    return read


def _has_text(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line)["text"], str)
    except (ValueError, TypeError, LookupError, RecursionError):
        return False


def _read(file: IO[bytes], name: object, per_line: bool, json_lines: bool = False) -> Iterator[Piece]:
    if json_lines:
        return _json_lines(file, name)
    return (line_pieces if per_line else document_pieces)(_decoded(file, name))


def _json_lines(file: IO[bytes], name: object) -> Iterator[Piece]:
    offset = 0
    for number, line in enumerate(file, 1):
        try:
            text = line.decode()
        except UnicodeDecodeError as error:
            raise _no_utf8(name, offset + error.start) from None
        offset += len(line)
        if text.isspace():
            continue
        try:
            document = json.loads(text)["text"]
            if not isinstance(document, str):
                raise TypeError
        except (ValueError, TypeError, LookupError, RecursionError):
            raise GptlabError(f'line {number} of {name} is no JSON object with a text, as {{"text": "..."}}') from None
        try:
            refuse_surrogates(document)
        except GptlabError as error:
            raise GptlabError(f"line {number} of {name}: {error}") from None
        if document and not document.isspace():
            yield from in_pieces(document)


def _decoded(file: IO[bytes], name: object) -> Iterator[str]:
    """Yield the text of a file in chunks, with the ends of lines that Python's text files have."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset, after = 0, ""
    while True:
        chunk = file.read(PIECE)
        held = len(decoder.getstate()[0])  # bytes of a character that the chunk before cut in two
        try:
            text = decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            raise _no_utf8(name, offset - held + error.start) from None
        offset += len(chunk)
        if after or "\r" in text:
            text = after + text
            after = "\r" if chunk and text.endswith("\r") else ""  # a \n may follow
            text = text.removesuffix(after).replace("\r\n", "\n").replace("\r", "\n")
        yield text
        if not chunk:
            return


def _no_utf8(name: object, offset: int) -> GptlabError:
    return GptlabError(f"{name} is no UTF-8 text (byte {offset}); convert it, for instance with iconv")


# --- names ----------------------------------------------------------------------------------------------------


def _named(name: str, per_line: bool, report: Callable[[dict[str, Any]], None]) -> Read:
    if name == "stdlib":
        return functools.partial(_read_stdlib, per_line)
    if name == "pydoc":
        return functools.partial(_read_pydoc, per_line)
    path = downloads.fetch(name, report)
    return functools.partial(_read_wikitext if path.suffix == ".zip" else _read_file, path, per_line)


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
            for article in _articles(_decoded(file, member)):
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
