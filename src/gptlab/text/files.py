"""Files of texts as people have them: plain, of records, compressed, in archives; what is none of these is refused."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import shutil
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO, Any, cast

from gptlab.errors import GptlabError
from gptlab.placeholders import refuse_pointer
from gptlab.text import records
from gptlab.text.decoding import CHUNK, decoded
from gptlab.text.segmentation import Piece, document_pieces, line_pieces

TEXTS = (".txt", ".md", ".py")
READ = (*TEXTS, *records.SUFFIXES)
"""Suffixes of what is read in a directory or an archive."""
ARCHIVES = (".zip", ".tar")
_SHORT = {".tgz": ".tar.gz", ".tbz2": ".tar.bz2", ".txz": ".tar.xz", ".tzst": ".tar.zst"}
_REFUSED = {
    **dict.fromkeys((".html", ".htm", ".xhtml"), "an HTML page"),
    **dict.fromkeys((".xml", ".svg"), "an XML file"),
    **dict.fromkeys((".docx", ".doc", ".odt", ".rtf", ".epub", ".pdf", ".pptx"), "a formatted document"),
    **dict.fromkeys((".xlsx", ".xls", ".ods"), "a spreadsheet"),
    ".ipynb": "a notebook",
    ".7z": "a 7z archive",
    ".rar": "a RAR archive",
}


@dataclass(frozen=True)
class Reading:
    """How files are read.

    Attributes:
        per_line: every line that is not blank is a document.
        text_field: of records.
        left_out: what was there and not read, and why; filled while reading.
    """

    per_line: bool = False
    text_field: str = records.TEXT_FIELD
    left_out: dict[str, str] = field(default_factory=dict)


def suffixes_of(name: str) -> tuple[str, str]:
    """Return what kind of file a name says, and by what it is compressed, each a suffix in lower case or ""."""
    name = PurePosixPath(name).name.lower()
    for short, long in _SHORT.items():
        if name.endswith(short):
            name = name.removesuffix(short) + long
    path = PurePosixPath(name)
    outer = path.suffix if path.suffix in _OPENERS else ""
    return (path.with_suffix("") if outer else path).suffix, outer


def stem_of(path: Path) -> str:
    """Return a file's name without what `suffixes_of` returns."""
    inner, outer = suffixes_of(path.name)
    if path.suffix.lower() in _SHORT:
        return path.stem
    path = path.with_suffix("") if outer else path
    return path.stem if inner else path.name


def read_file(file: IO[bytes], name: str, reading: Reading) -> Iterator[Piece]:
    """Yield the documents of a file, whatever it is.

    Args:
        file: its bytes.
        name: says by its suffixes what it is; where it does not, its contents do.
        reading: how.

    Raises:
        GptlabError: a file that is damaged, or that is not text.
    """
    inner, outer = suffixes_of(name)
    if inner in _REFUSED:
        raise GptlabError(f"{name} is {_REFUSED[inner]}, whose contents are not plain text; save its text as .txt")
    file = _peekable(file)
    refuse_pointer(_head(file), name)
    if not outer:
        outer = next((suffix for suffix, magic in _MAGIC.items() if _head(file).startswith(magic)), "")
    if not outer:
        yield from _read_plain(file, name, inner, reading)
        return
    opener = _OPENERS[outer]
    try:
        yield from _read_plain(_peekable(opener(file, name)), name, inner, reading)
    except (EOFError, zlib.error, gzip.BadGzipFile, lzma.LZMAError) as error:
        raise GptlabError(
            f"{name} is not an intact {_FORMATS[outer]} file ({error}); copy or download it again"
        ) from None
    except OSError as error:
        if error.errno is not None:
            raise
        raise GptlabError(
            f"{name} is not an intact {_FORMATS[outer]} file ({error}); copy or download it again"
        ) from None


def _read_plain(file: IO[bytes], name: str, suffix: str, reading: Reading) -> Iterator[Piece]:
    """Read what is not compressed, or not any more."""
    head = _head(file)
    if suffix == ".zip" or head.startswith(b"PK\x03\x04"):
        yield from _read_zip(_seekable(file), name, reading)
    elif suffix == ".tar" or head[257:262] == b"ustar":
        yield from _read_tar(file, name, reading)
    elif suffix == ".parquet" or head.startswith(b"PAR1"):
        yield from _records(_seekable(file), name, ".parquet", reading)
    elif suffix in records.SUFFIXES:
        yield from _records(file, name, suffix, reading)
    elif suffix not in TEXTS and _is_json_line(head):
        yield from _records(file, name, ".jsonl", reading)
    else:
        yield from (line_pieces if reading.per_line else document_pieces)(decoded(file, name))


def _records(file: IO[bytes], name: str, suffix: str, reading: Reading) -> Iterator[Piece]:
    for text in records.texts(file, name, suffix, reading.text_field):
        yield from document_pieces([text])


def holds_records(file: IO[bytes], name: str, reading: Reading) -> bool:
    """Does a JSON file begin with a record of the field asked for? Settings and vocabularies lie beside texts."""
    try:
        return next(read_file(file, name, reading), None) is not None
    except GptlabError:
        return False


def _is_json_line(head: bytes) -> bool:
    try:
        return isinstance(json.loads(head.split(b"\n")[0].decode("utf-8-sig"))["text"], str)
    except (ValueError, TypeError, LookupError, RecursionError):
        return False


# --- archives -------------------------------------------------------------------------------------------------


def _read_zip(file: IO[bytes], name: str, reading: Reading) -> Iterator[Piece]:
    try:
        with zipfile.ZipFile(file) as archive:
            members = sorted((info for info in archive.infolist() if not info.is_dir()), key=lambda i: i.filename)
            members = [info for info in members if not _hidden(info.filename)]
            for info in members:
                where = f"{name}/{info.filename}"
                if not _wanted(info.filename, alone=len(members) == 1):
                    reading.left_out[where] = "no text"
                    continue
                if info.flag_bits & 1:
                    raise GptlabError(f"{where} is encrypted; unpack it with its password, and name the files")
                with archive.open(info) as member:
                    yield from read_file(member, where, reading)
    except (zipfile.BadZipFile, NotImplementedError) as error:
        raise GptlabError(f"{name} is not an intact zip archive ({error}); copy or download it again") from None


def _read_tar(file: IO[bytes], name: str, reading: Reading) -> Iterator[Piece]:
    try:
        with tarfile.open(fileobj=file, mode="r|") as archive:
            for info in archive:
                if info.isfile() and not _hidden(info.name):
                    where = f"{name}/{info.name}"
                    member = archive.extractfile(info)
                    if member is None or not _wanted(info.name):
                        reading.left_out[where] = "no text"
                    else:
                        yield from read_file(member, where, reading)
    except tarfile.TarError as error:
        raise GptlabError(f"{name} is not an intact tar archive ({error}); copy or download it again") from None


def _wanted(member: str, alone: bool = False) -> bool:
    suffix = suffixes_of(member)[0]
    return suffix in READ or (alone and suffix not in ARCHIVES)


def _hidden(member: str) -> bool:
    """Is this one of the files in which macOS keeps what it knows of others?"""
    return member.startswith("__MACOSX/") or PurePosixPath(member).name.startswith("._")


# --- compressed -----------------------------------------------------------------------------------------------


def _zstd(file: IO[bytes], name: str) -> IO[bytes]:
    try:
        from compression import zstd  # type: ignore[import-not-found, unused-ignore]  # Python 3.14

        return cast(IO[bytes], zstd.open(file))
    except ImportError:
        pass
    try:
        import zstandard  # type: ignore[import-not-found, unused-ignore]

        reader = zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True)
        return cast(IO[bytes], io.BufferedReader(reader))
    except ImportError:
        pass
    try:
        import pyarrow

        return cast(IO[bytes], pyarrow.input_stream(pyarrow.PythonFile(file, mode="r"), compression="zstd"))
    except ImportError:
        raise GptlabError(
            f"{name} is compressed with Zstandard; to read it, pip install zstandard, or unpack it with unzstd"
        ) from None


_OPENERS: dict[str, Callable[[IO[bytes], str], IO[bytes]]] = {
    ".gz": lambda file, name: cast(IO[bytes], gzip.GzipFile(fileobj=file)),
    ".bz2": lambda file, name: bz2.BZ2File(file),
    ".xz": lambda file, name: lzma.LZMAFile(file),  # noqa: SIM115
    ".zst": _zstd,
}
_MAGIC = {".gz": b"\x1f\x8b\x08", ".bz2": b"BZh", ".xz": b"\xfd7zXZ\0", ".zst": b"\x28\xb5\x2f\xfd"}
_FORMATS = {".gz": "gzip", ".bz2": "bzip2", ".xz": "xz", ".zst": "Zstandard"}


def _peekable(file: IO[bytes]) -> Any:
    if hasattr(file, "peek") and isinstance(file, io.BufferedReader):
        return file
    return io.BufferedReader(_Raw(file), 2**16)


class _Raw(io.RawIOBase):
    """What `io.BufferedReader` needs of a file that can only be read."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        content = self._file.read(len(buffer))
        buffer[: len(content)] = content
        return len(content)


def _head(file: Any) -> bytes:
    return bytes(file.peek(2**12)[: 2**16])


def _seekable(file: IO[bytes]) -> IO[bytes]:
    """Return the file, or a temporary copy where one cannot go back in it."""
    if file.seekable():
        return file
    copy = tempfile.TemporaryFile(prefix="gptlab-")  # noqa: SIM115
    shutil.copyfileobj(file, copy, CHUNK)
    copy.seek(0)
    return cast(IO[bytes], copy)
