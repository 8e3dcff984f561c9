"""Where a prompt comes from: the command line, a file, or standard input."""

from __future__ import annotations

import codecs
import os
import re
import select
import sys
from pathlib import Path

from gptlab.errors import GptlabError

PATIENCE = 3.0
"""Seconds of silence on standard input after which the command says what it waits for."""

_MARKS = ((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be"))
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\"}


def read_prompt(prompt: str | None, file: str | None) -> str | None:
    """Return the prompt, or None for the beginning of a new document.

    Without a prompt and a file, what is piped to the command is the prompt; where nothing is, there is none.

    Args:
        prompt: from the command line; ``-`` is standard input.
        file: name of a text file; ``-`` is standard input.

    Raises:
        GptlabError: both, an empty one, or a file that cannot be read or is not text.
    """
    if prompt is not None and file is not None:
        raise GptlabError("a prompt and --prompt-file are two prompts; leave one out")
    if "-" in (prompt, file):
        text = _standard_input(terminal=True)
        if not text:
            raise GptlabError("standard input is empty; pipe some text to the command")
        return text
    if file is not None:
        try:
            text = _text(Path(file).read_bytes(), file)
        except (OSError, ValueError) as error:
            if isinstance(error, GptlabError):
                raise
            reason = getattr(error, "strerror", None) or error
            raise GptlabError(f"--prompt-file {file} cannot be read: {reason}") from None
        if not text:
            raise GptlabError(f"--prompt-file {file} is empty; put some text into it")
        return text
    if prompt == "":
        raise GptlabError("the prompt is empty; give it some text, or leave it out to start a new document")
    return repair(prompt) if prompt is not None else _standard_input(terminal=False) or None


def repair(argument: str) -> str:
    """Return an argument as the shell sent it, where Python took UTF-8 for something else (PYTHONUTF8=0, LC_ALL=C)."""
    try:
        argument.encode()
    except UnicodeEncodeError:
        try:
            return os.fsencode(argument).decode()
        except UnicodeError:
            return argument  # not UTF-8 either; the tokenizer refuses it in words
    return argument


def unescape(text: str) -> str:
    """Turn ``\\n``, ``\\t``, ``\\r`` and ``\\\\`` into what they stand for; any other backslash stays."""
    return re.sub(r"\\([ntr\\])", lambda match: _ESCAPES[match[1]], text)


def _standard_input(*, terminal: bool) -> str:
    """Return all of standard input: nothing where it is closed or empty, or a terminal that is not to be read."""
    stream = sys.stdin
    try:
        if stream is None or (stream.isatty() and not terminal):
            return ""
        if not stream.isatty():
            _say_what_it_waits_for()
        data = stream.buffer.read()
    except (OSError, ValueError, AttributeError):  # closed, or replaced by something that cannot be read
        return ""
    return _text(data, "standard input")


def _say_what_it_waits_for() -> None:
    if sys.platform != "win32" and not select.select([sys.stdin], [], [], PATIENCE)[0]:
        said = "waiting for the prompt on standard input; to start without one, run the command with </dev/null"
        print(f"gptlab: {said}", file=sys.stderr, flush=True)


def _text(data: bytes, name: str) -> str:
    """Decode UTF-8, or UTF-16 with a byte-order mark, less one newline at the end: editors and `echo` put it there."""
    mark, encoding = next(((m, e) for m, e in _MARKS if data.startswith(m)), (b"", "utf-8"))
    try:
        text = data[len(mark) :].decode(encoding)
    except UnicodeDecodeError as error:
        raise GptlabError(
            f"{name} is not {encoding.upper()} text: byte {len(mark) + error.start + 1} does not fit; convert it, for"
            " instance with iconv -f WINDOWS-1252 -t UTF-8"
        ) from None
    return text[:-2] if text.endswith("\r\n") else text.removesuffix("\n")
