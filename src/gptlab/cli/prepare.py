"""`gptlab prepare`."""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from gptlab.progress import Report
    from gptlab.text.documents import Documents
    from gptlab.text.shards import Dataset, NewTokenizer, TokenizerChoice
    from gptlab.text.tokenizers import Tokenizer


ValidationOption = Annotated[
    list[str] | None,
    typer.Option("--validation", help="A separate text to hold out; may be given several times."),
]
TextFieldOption = Annotated[
    str | None, typer.Option("--text-field", help="Field or column of a record that holds its text (default: text).")
]

PLAIN_SECONDS = 10.0  # between two lines where there is no terminal to draw on


def prepare(
    sources: Annotated[
        list[str],
        typer.Argument(
            help="Files of text (.txt, .md, .py), of records (.jsonl, .json, .csv, .tsv, .parquet), compressed (.gz,"
            " .bz2, .xz, .zst) or in archives (.zip, .tar), directories, patterns, - for standard input, or stdlib,"
            " pydoc, tiny-shakespeare, wikitext-2, wikitext-103."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Directory for the token shards.")],
    tokenizer: Annotated[
        str | None, typer.Option(help="gpt2 (the default), bytes, chars, bpe (trained), or a model by name.")
    ] = None,
    vocab_size: Annotated[int | None, typer.Option(help="Ids of a bpe tokenizer (default 4096).")] = None,
    held_out: Annotated[
        float | None,
        typer.Option(help="Share of the text to hold out (default 0.01, and up to 0.05 for 200 documents)."),
    ] = None,
    validation: ValidationOption = None,
    per_line: Annotated[
        bool, typer.Option("--per-line", help="Every line is a document, as in a list of names.")
    ] = False,
    text_field: TextFieldOption = None,
    append: Annotated[bool, typer.Option("--append", help="Add to the data that are there.")] = False,
) -> None:
    """Turn texts into token shards for training."""
    from gptlab.errors import GptlabError
    from gptlab.text import shards
    from gptlab.text.documents import open_documents
    from gptlab.text.records import TEXT_FIELD

    if vocab_size is not None and tokenizer != "bpe":
        raise GptlabError("--vocab-size has an effect with --tokenizer bpe only; leave it out")
    if append:
        same = None if tokenizer is None else _tokenizer(tokenizer, 4096)
        if validation:
            raise GptlabError("--append divides by the rule of the data that are there; leave --validation out")
        if held_out is not None or isinstance(same, shards.NewTokenizer):
            raise GptlabError("--append takes the tokenizer and the share to hold out from the data; leave them out")
        with _progress() as report:
            field = text_field or TEXT_FIELD
            documents = open_documents(sources, per_line=per_line, text_field=field, report=report)
            dataset = shards.append(documents, out, tokenizer=same, report=report)
        _summarise(dataset, documents.left_out)
        _note_marks(documents)
    else:
        if validation and held_out is not None:
            raise GptlabError("--held-out has no effect with --validation; leave one of them out")
        choice = _tokenizer(tokenizer or "gpt2", vocab_size or 4096)
        dataset = prepare_with_progress(sources, choice, out, held_out, per_line, validation or (), text_field)
    print(f"train on it: gptlab train {'names' if dataset.items else 'pocket'} --data {out} --out runs/{out.name}")


def prepare_with_progress(
    sources: Sequence[str],
    tokenizer: Tokenizer | TokenizerChoice,
    out: Path,
    held_out: float | None,
    per_line: bool = False,
    validation: Sequence[str] = (),
    text_field: str | None = None,
) -> Dataset:
    """Do what `gptlab.text.shards.prepare` does, show how far it is, and print what came out."""
    from gptlab.text import shards
    from gptlab.text.documents import open_documents
    from gptlab.text.records import TEXT_FIELD

    field = text_field or TEXT_FIELD
    shared = 0

    def take(row: dict[str, Any]) -> None:
        nonlocal shared
        if row["event"] == "shared":
            shared = row["documents"]
        else:
            report(row)

    with _progress() as report:
        texts = functools.partial(open_documents, per_line=per_line, text_field=field, report=report)
        documents = texts(sources)
        other = texts(validation) if validation else None
        dataset = shards.prepare(documents, tokenizer, out, held_out=held_out, validation=other, report=take)
    _summarise(dataset, documents.left_out | (other.left_out if other is not None else {}))
    _note_marks(documents)
    if shared:
        print(f"note: {shared:,} of the documents to train on are in the validation text too")
    return dataset


def _tokenizer(name: str, vocab_size: int) -> Tokenizer | NewTokenizer:
    """Return a tokenizer by its kind, or the one of a model directory."""
    from gptlab.errors import GptlabError, nearest
    from gptlab.text.shards import NewTokenizer
    from gptlab.text.tokenizers import KINDS, make_tokenizer, read_tokenizer

    if name in ("gpt2", "bytes"):
        return make_tokenizer(name)
    if name in KINDS:
        return NewTokenizer(name, vocab_size)
    from gptlab.checkpoints import gguf  # brings torch, which the rest of the command does without
    from gptlab.checkpoints.hub import built_in, locate

    try:
        directory = locate(name)
    except GptlabError as error:
        if "/" in name or "@" in name:
            raise
        known = [*KINDS, *built_in()]
        raise GptlabError(
            f"unknown tokenizer {name!r}{nearest(name, known)}; there are {', '.join(known)}, and that of any model"
        ) from error
    tokenizer = read_tokenizer(directory) if directory.is_dir() else None
    if tokenizer is None and gguf.recognises(directory):
        tokenizer = gguf.read_tokenizer(directory)
    if tokenizer is None:
        raise GptlabError(f"{directory} holds no tokenizer; name a model directory with a tokenizer.json")
    return tokenizer


def _summarise(dataset: Dataset, left_out: Mapping[str, str]) -> None:
    training, validation = dataset.training, dataset.validation
    n_bytes, n_tokens = (training.n_bytes or 0) + (validation.n_bytes or 0), len(training) + len(validation)
    unit = "lines" if dataset.items else "documents"
    print(
        f"{dataset.directory}: {dataset.name}, {n_bytes / 1e6:,.1f} MB, {dataset.tokenizer.vocab_size:,} ids in the"
        f" vocabulary, {n_bytes / n_tokens:.2f} bytes per token\n"
        f"training    {len(training):>14,} tokens, {training.n_documents:,} {unit}\n"
        f"validation  {len(validation):>14,} tokens, {validation.n_documents:,} {unit}\n"
        f"held out    {_held_out(dataset)}"
    )
    if left_out:
        some = [f"{name} ({reason})" for name, reason in list(left_out.items())[:5]]
        more = f" and {len(left_out) - 5:,} more" if len(left_out) > 5 else ""
        print(f"left out    {len(left_out):,} file{'s' * (len(left_out) > 1)}: {', '.join(some)}{more}")


def _note_marks(documents: Documents) -> None:
    """Say when a text holds the mark that ends documents where it is text, which few people mean."""
    from gptlab.text.tokenizers import END_OF_TEXT

    if documents.inside:
        print(
            f"note: {END_OF_TEXT} inside a line is text and ends no document, as in {documents.inside[0]!r}; put a line"
            " break behind each that is to end one"
        )


def _held_out(dataset: Dataset) -> str:
    """What the validation part is, in words."""
    training, validation, rule = dataset.training.n_bytes or 0, dataset.validation.n_bytes or 0, dataset.rule
    words = f"{validation:,} bytes, {validation / (training + validation):.3%} of the text"
    if rule is None:
        return words
    words += f"; {rule.held_out:.3%} was asked for" if rule.held_out else ": the validation text given"
    if rule.cut is None:
        return words
    return f"{words}; of the longest document the first {rule.cut.n_bytes:,} bytes are trained on, the end is held out"


@contextmanager
def _progress() -> Iterator[Report]:
    """Show reports as a bar on a terminal, else as a line every ten seconds; on standard error."""
    if not sys.stderr.isatty():
        yield _Lines()
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[said]}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task, clock = progress.add_task("starting", said=""), _Clock()

        def show(row: dict[str, Any]) -> None:
            total = row.get("total_bytes")
            progress.update(
                task, description=_doing(row), total=total, completed=row.get("bytes", 0), said=clock.said(row)
            )

        yield show


class _Clock:
    """Says how much of one kind of work is done and how fast."""

    def __init__(self) -> None:
        self.event, self.started = "", 0.0

    def said(self, row: dict[str, Any]) -> str:
        if row["event"] != self.event:
            self.event, self.started = row["event"], time.monotonic()
        n_bytes, seconds = row.get("bytes", 0), time.monotonic() - self.started
        rate = f", {n_bytes / seconds / 1e6:,.1f} MB/s" if seconds > 0.1 else ""
        parts = [f"{n_bytes / 1e6:,.1f} MB{rate}"] if n_bytes else []
        parts += [f"{row[name]:,} {name}" for name in ("documents", "tokens") if name in row]
        return ", ".join(parts)


class _Lines:
    """Prints a line now and then."""

    def __init__(self) -> None:
        self.clock, self.shown = _Clock(), time.monotonic()

    def __call__(self, row: dict[str, Any]) -> None:
        said = self.clock.said(row)
        if time.monotonic() - self.shown >= PLAIN_SECONDS or row["event"] == "tokenizer":  # which says no more
            self.shown = time.monotonic()
            print(f"{_doing(row)}: {said}" if said else _doing(row), file=sys.stderr, flush=True)


def _doing(row: dict[str, Any]) -> str:
    match row["event"]:
        case "download":
            return f"downloading {row['name']}"
        case "read":
            return "reading"
        case "tokenizer":
            return f"making the {row['kind']} tokenizer"
    return "encoding"
