"""Bytes to text: UTF-8, and UTF-16 or UTF-32 where a byte-order mark or the zeros between letters say so."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from typing import IO

from gptlab.errors import GptlabError

CHUNK = 2**20
_HEAD = 4096  # bytes that tell what a file is

# The longer marks first: that of UTF-32 begins with that of UTF-16.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_NAMES = {"utf-8": "UTF-8", "utf-16-le": "UTF-16", "utf-16-be": "UTF-16", "utf-32-le": "UTF-32", "utf-32-be": "UTF-32"}

_NO_TEXT = (
    (b"%PDF-", "a PDF file"),
    (b"\x89PNG", "a PNG picture"),
    (b"\xff\xd8\xff", "a JPEG picture"),
    (b"GIF8", "a GIF picture"),
    (b"{\\rtf", "an RTF document"),
    (b"SQLite format 3\0", "an SQLite database"),
    (b"ARROW1", "an Arrow file"),
    (b"\x93NUMPY", "a NumPy array"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
    (b"Rar!", "a RAR archive"),
    (b"\xd0\xcf\x11\xe0", "an old Office document"),
    (b"\x80\x02", "a pickle"),
    (b"\x80\x03", "a pickle"),
    (b"\x80\x04", "a pickle"),
    (b"\x80\x05", "a pickle"),
)
_MARKUP = ((b"<!doctype html", "an HTML page"), (b"<html", "an HTML page"), (b"<?xml", "an XML file"))


def encoding_of(head: bytes) -> tuple[str, int]:
    """Return the name of the encoding of a text that begins like this, and the bytes of its byte-order mark."""
    for mark, encoding in _MARKS:
        if head.startswith(mark):
            return encoding, len(mark)
    head = head[: len(head) // 2 * 2]
    even, odd = head[::2].count(0), head[1::2].count(0)
    if max(even, odd) > len(head) // 4 and min(even, odd) <= max(even, odd) // 20:
        return ("utf-16-le" if odd > even else "utf-16-be"), 0
    return "utf-8", 0


def decode(content: bytes, name: object) -> str:
    """Return a whole file as text, without its byte-order mark and with line ends as they are.

    Raises:
        GptlabError: bytes that are not text in the encoding that the file seems to have, or zeros among them.
    """
    encoding, skipped = encoding_of(content[:_HEAD])
    if encoding == "utf-8":
        _refuse_zeros(content, 0, name, content[:_HEAD])
    try:
        return content[skipped:].decode(encoding)
    except UnicodeDecodeError as error:
        raise _undecodable(name, encoding, skipped + error.start, content[:_HEAD]) from None


def decoded(file: IO[bytes], name: object) -> Iterator[str]:
    """Yield the text of a file in chunks, with the ends of lines that Python's text files have.

    Raises:
        GptlabError: as `decode`; or markup such as HTML, which is not to be learned as text.
    """
    chunk = file.read(CHUNK)
    head = chunk[:_HEAD]
    encoding, offset = encoding_of(head)
    refuse_markup(head[offset:].decode(encoding, "ignore").encode(), name)
    chunk = chunk[offset:] or file.read(CHUNK)
    decoder = codecs.getincrementaldecoder(encoding)()
    after = ""
    while True:
        held = len(decoder.getstate()[0])  # bytes of a character that the chunk before cut in two
        try:
            text = decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            raise _undecodable(name, encoding, offset - held + error.start, head) from None
        if encoding == "utf-8":
            _refuse_zeros(chunk, offset, name, head)
        offset += len(chunk)
        if after or "\r" in text:
            text = after + text
            after = "\r" if chunk and text.endswith("\r") else ""  # a \n may follow
            text = text.removesuffix(after).replace("\r\n", "\n").replace("\r", "\n")
        yield text
        if not chunk:
            return
        chunk = file.read(CHUNK)


def refuse_markup(head: bytes, name: object) -> None:
    """Raise GptlabError where a file that begins like this is a page of markup."""
    start = head.lstrip()[:20].lower()
    for beginning, kind in _MARKUP:
        if start.startswith(beginning):
            raise GptlabError(f"{name} is {kind}, whose markup is not text to learn; save its text as .txt")


def _refuse_zeros(content: bytes, offset: int, name: object, head: bytes) -> None:
    """Raise GptlabError where UTF-8, which begins at ``offset`` in its file, holds a byte that is 0: no text has it."""
    place = content.find(b"\0")
    if place < 0:
        return
    for beginning, kind in _NO_TEXT:
        if head.startswith(beginning):
            raise GptlabError(f"{name} is {kind}, not text; save what is written in it as .txt")
    raise GptlabError(
        f"{name} holds a NUL (byte {offset + place} is 0): it looks like binary data, or UTF-16 or UTF-32 without a"
        " byte-order mark; name text files, or convert it, for instance with iconv -f UTF-16LE -t UTF-8"
    )


def _undecodable(name: object, encoding: str, offset: int, head: bytes) -> GptlabError:
    for beginning, kind in _NO_TEXT:
        if head.startswith(beginning):
            return GptlabError(f"{name} is {kind}, not text; save what is written in it as .txt")
    if encoding == "utf-8" and b"\0" in head:
        return GptlabError(f"{name} is not text: it holds binary data (byte {offset} is not UTF-8); name text files")
    return GptlabError(f"{name} is not {_NAMES[encoding]} text (byte {offset}); convert it, for instance with iconv")
