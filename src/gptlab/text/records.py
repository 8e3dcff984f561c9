"""Files of records, of which one field is the text: JSON lines, JSON arrays, CSV, TSV, parquet."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator
from typing import IO, Any

from gptlab.errors import GptlabError
from gptlab.text.decoding import decoded
from gptlab.text.tokenizers import refuse_surrogates

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
TEXT_FIELD = "text"

_WHERE = "(of gptlab prepare, train and evaluate)"
_BATCH = 64  # rows of a parquet file at a time


def texts(file: IO[bytes], name: object, suffix: str, field: str = TEXT_FIELD) -> Iterator[str]:
    """Yield the text of each record that has one; an absent value is left out.

    Args:
        file: its bytes; seekable for ``.parquet``.
        name: what to call it in messages.
        suffix: one of `SUFFIXES`.
        field: that holds the text.

    Raises:
        GptlabError: no such field, a value that is not text, a file that is damaged, or pyarrow is not installed.
    """
    records = {".json": _json, ".csv": _table, ".tsv": _table, ".parquet": _parquet}.get(suffix, _json_lines)
    for text, where in records(file, name, suffix, field):
        try:
            refuse_surrogates(text)
        except GptlabError as error:
            raise GptlabError(f"{where}: {error}") from None
        yield text.replace("\r\n", "\n").replace("\r", "\n")


def lines_of(chunks: Iterable[str]) -> Iterator[str]:
    """Yield the lines of a text that comes in chunks, each with its end."""
    rest: list[str] = []
    for chunk in chunks:
        first, *others = chunk.split("\n")
        rest.append(first)
        for line in others:
            yield "".join(rest) + "\n"
            rest = [line]
    if last := "".join(rest):
        yield last


Texts = Iterator[tuple[str, str]]
"""Texts, and where each is, in words."""


def _json_lines(file: IO[bytes], name: object, suffix: str, field: str) -> Texts:
    for number, line in enumerate(lines_of(decoded(file, name)), 1):
        if not line.isspace():
            where = f"line {number} of {name}"
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                raise _no_record(where, field, None) from None
            yield from _text_of(record, where, field)


def _json(file: IO[bytes], name: object, suffix: str, field: str) -> Texts:
    """An array of records, or records one after the other, on lines of their own or not."""
    chunks = decoded(file, name)
    text, number, array = "", 0, None
    decoder = json.JSONDecoder()
    more = True
    while True:
        text = text.lstrip(" \t\n" if array is None or not array else " \t\n,")
        if text and array is None:
            array = text.startswith("[")
            text = text[1:] if array else text
            continue
        try:
            if not text and more:
                raise ValueError
            if not text or (array and text.startswith("]")):
                return
            record, end = decoder.raw_decode(text)
            if end == len(text) and more and not text.endswith(("}", '"', "]")):
                raise ValueError  # a number may go on
        except (ValueError, RecursionError):
            # Twice as much each time, so that a long record is not parsed again and again.
            size = len(text) + 1
            while more and len(text) < 2 * size:
                chunk = next(chunks, None)
                more, text = chunk is not None, text + (chunk or "")
            if not more and len(text) < size:
                if text:
                    raise GptlabError(f"{name} is not JSON after record {number}; repair it") from None
                if array:
                    raise GptlabError(f"{name} ends within its array; copy or download it again") from None
            continue
        number, text = number + 1, text[end:]
        yield from _text_of(record, f"record {number} of {name}", field)


def _text_of(record: Any, where: str, field: str) -> Texts:
    if isinstance(record, str):
        yield record, where
        return
    if not isinstance(record, dict) or not isinstance(record.get(field), str | None) or field not in record:
        raise _no_record(where, field, record)
    if record[field] is not None:
        yield record[field], where


def _no_record(where: str, field: str, record: Any) -> GptlabError:
    others = [name for name, value in record.items() if isinstance(value, str)] if isinstance(record, dict) else []
    hint = ""
    if others and field not in record:
        which = others[0] if len(others) == 1 else "NAME"
        hint = f"; it has {_quoted(others)}: name the one to read with --text-field {which} {_WHERE}"
    what = "a text" if field == TEXT_FIELD else f"a text in {field!r}"
    return GptlabError(f'{where} is not a JSON object with {what}, as {{"{field}": "..."}}{hint}')


def _quoted(names: list[str]) -> str:
    return ", ".join(map(repr, names[:5])) + ", ..." * (len(names) > 5)


def _table(file: IO[bytes], name: object, suffix: str, field: str) -> Texts:
    """Rows below a row of names, as Python's csv module reads them; quotes as in RFC 4180."""
    csv.field_size_limit(2**31 - 1)
    lines = lines_of(decoded(file, name))
    first = next(lines, "")
    columns = {mark: next(csv.reader([first], delimiter=mark), []) for mark in ("\t,;" if suffix == ".tsv" else ",;\t")}
    mark = next((mark for mark, names in columns.items() if field in names), None)
    if mark is None:
        names = next(iter(columns.values()))
        raise GptlabError(
            f"{name} has no column {field!r}; its first row has {_quoted(names)}: name the column to read with"
            f" --text-field NAME {_WHERE}"
        )
    names = columns[mark]
    rows = csv.reader(lines, delimiter=mark, strict=True)
    try:
        for row in rows:
            where = f"line {rows.line_num + 1} of {name}"
            if row and len(row) != len(names):
                raise GptlabError(f"{where} has {len(row)} fields, its first row {len(names)}; quote fields with marks")
            if row:
                yield row[names.index(field)], where
    except csv.Error as error:
        raise GptlabError(f"line {rows.line_num + 1} of {name} is not valid CSV ({error}); repair it") from None


def _parquet(file: IO[bytes], name: object, suffix: str, field: str) -> Texts:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise GptlabError(f"{name} is a parquet file; to read it, pip install 'gptlab[parquet]'") from None
    try:
        table = parquet.ParquetFile(file)
        if field not in table.schema_arrow.names:
            names = table.schema_arrow.names
            raise GptlabError(
                f"{name} has no column {field!r}; it has {_quoted(names)}: name the column to read with"
                f" --text-field NAME {_WHERE}"
            )
        number = 0
        for batch in table.iter_batches(batch_size=_BATCH, columns=[field]):
            for value in batch.column(0).to_pylist():
                number += 1
                where = f"row {number} of {name}"
                if value is not None and not isinstance(value, str):
                    raise GptlabError(f"{where} has no text in {field!r}; name another column with --text-field")
                if value is not None:
                    yield value, where
    except (pyarrow.ArrowException, OSError) as error:
        raise GptlabError(f"{name} is not an intact parquet file ({str(error).splitlines()[0]})") from None
