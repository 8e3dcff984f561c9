"""Where a prompt comes from: the command line, a file, or standard input; and where thousands do."""

from __future__ import annotations

import codecs
import hashlib
import json
import os
import re
import select
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptlab.errors import GptlabError
from gptlab.text.decoding import decode

PATIENCE = 3.0
"""Seconds of silence on standard input after which the command says what it waits for."""

JSON_LINES = (".jsonl", ".ndjson")
"""Ends of the names of files with one JSON value a line."""

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


@dataclass(frozen=True)
class Line:
    """A prompt of the file: a text or ids, or the reason why it is none; and what the file calls it."""

    prompt: str | list[int] | None
    error: str = ""
    id: Any = None


def read_prompts(path: Path) -> tuple[list[Line], str]:
    """Return the prompts of a file, and its sha256.

    Args:
        path: of JSON lines, by its suffix, each a text or an object with ``prompt`` or ``ids``, and perhaps ``id``;
            or else of text, each line a prompt.

    Raises:
        GptlabError: the file cannot be read, is not text, or is empty.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise GptlabError(f"--batch {path} cannot be read: {error.strerror}") from None
    if path.suffix == ".json":
        raise GptlabError(f"--batch takes JSON lines, one object a line; write {path} as such, and call it .jsonl")
    text = decode(content, path).replace("\r\n", "\n").replace("\r", "\n").removesuffix("\n")
    if path.suffix in JSON_LINES:
        lines = [_parsed(line) for line in text.split("\n") if line.strip()]
    else:
        lines = [Line(line) for line in text.split("\n")] if text else []
    if not lines:
        raise GptlabError(f"--batch {path} is empty; put a prompt on each line")
    return lines, hashlib.sha256(content).hexdigest()


def _parsed(line: str) -> Line:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return Line(None, "the line is not JSON")
    if isinstance(record, str):
        return Line(record)
    if not isinstance(record, dict) or ("prompt" in record) == ("ids" in record):
        return Line(None, 'the line is not an object with either "prompt" or "ids"')
    prompt, name = record.get("prompt", record.get("ids")), record.get("id")
    is_ids = isinstance(prompt, list) and all(isinstance(i, int) and not isinstance(i, bool) for i in prompt)
    if isinstance(prompt, str) if "prompt" in record else is_ids:
        return Line(prompt, id=name)
    return Line(None, '"prompt" is not a text' if "prompt" in record else '"ids" is not a list of ids', name)
