"""`gptlab evaluate`."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from gptlab.evaluation.positions import Position
    from gptlab.evaluation.protocol import Protocol
    from gptlab.evaluation.scoring import Result
    from gptlab.evaluation.trigram import Trigram
    from gptlab.language_model import LanguageModel

DECIMALS = {"accuracy": 4, "accuracy_norm": 4, "nats_per_token": 4, "bits_per_byte": 4}
"""Places after the point; perplexities have two."""


def evaluate(
    models: Annotated[list[str], typer.Argument(help="Built-in models, directories, gpt2 ... gpt2-xl, or owner/name.")],
    tasks: Annotated[
        list[str] | None,
        typer.Option("--task", help="A protocol such as lambada:last-word, or text:FILE; may be given several times."),
    ] = None,
    data: Annotated[list[str] | None, typer.Option(help="name=FILE, as in lambada=lambada_test.jsonl.")] = None,
    stride: Annotated[int | None, typer.Option(help="Tokens from window to window (default: no overlap).")] = None,
    context: Annotated[int | None, typer.Option(help="Tokens of a window (default: the model's own context).")] = None,
    by_position: Annotated[
        bool, typer.Option("--by-position", help="Also measure a text's loss by position, up to 16 times the context.")
    ] = False,
    paper_table: Annotated[
        bool, typer.Option("--paper-table", help="Table 3 of the GPT-2 paper beside what the model gives.")
    ] = False,
    trigram: Annotated[
        Path | None,
        typer.Option(help="Token shards of gptlab prepare: also score a count trigram of the first model's tokens."),
    ] = None,
    text_field: Annotated[
        str, typer.Option(help="The field or column to read from the records in text:FILE.")
    ] = "text",
    limit: Annotated[
        int | None, typer.Option(help="The first so many documents, passages or items only (default: all).")
    ] = None,
    tokenizer: Annotated[str | None, typer.Option(help="gpt2 or bytes, for weights without a tokenizer.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, int8 or int4.")] = "float32",
    device: Annotated[str, typer.Option(help="Where to compute: cpu, cuda, cuda:1, mps.")] = "cpu",
    out: Annotated[Path | None, typer.Option(help="Write everything to this file, as JSON.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
) -> None:
    """Measure models, each number by a named protocol."""
    from gptlab.checkpoints.files import write_files
    from gptlab.errors import GptlabError
    from gptlab.evaluation import data as sources
    from gptlab.evaluation.positions import positions_in_text
    from gptlab.evaluation.tasks import evaluate as measure

    tasks = list(dict.fromkeys(tasks or []))
    texts = [task for task in tasks if task.startswith("text:")]
    if not texts:
        _refuse_without_text(by_position, trigram, text_field)
    protocols = _protocols(tasks, stride, paper_table)
    paths = sources.parse_paths(data or [])
    for name in dict.fromkeys(protocol.data for protocol in protocols if protocol.data):
        sources.read(name, paths)  # say now, not in an hour, what is not there
    if out is not None:
        if out.is_dir():
            raise GptlabError(f"--out {out} is a directory; name a file in it")
        write_files(out.parent, {})  # and whether there is a place for the results
    absent: dict[str, str] = {}
    if paper_table:
        protocols += _paper_protocols(tasks, paths, absent)

    options: dict[str, Any] = {"context": context, "limit": limit, "dtype": dtype, "text_field": text_field}
    results: dict[str, list[Result]] = {protocol.name: [] for protocol in protocols}
    positions: dict[str, dict[str, list[Position]]] = {text: {} for text in texts if by_position}
    counted: list[str] = []
    for name in models:
        lm = _load(name, dtype, tokenizer, device)
        counts = None if trigram is None or name != models[0] else _counts(trigram, name, lm, counted)
        for protocol in protocols:
            with _progress(f"{name} {protocol.name}") as progress:
                result = measure(
                    lm.model,
                    lm.needs_tokenizer(),
                    protocol.name,
                    name=name,
                    stride=stride if protocol.sliding else None,
                    data=paths,
                    progress=progress,
                    **options,
                )
            results[protocol.name].append(result)
            if counts is not None and protocol.name in texts:
                results[protocol.name].append(_by_counts(counts, lm, result, text_field))
        for text, by_model in positions.items():
            source = text.removeprefix("text:")
            with _progress(f"{name} {text} by position") as progress:
                by_model[name] = positions_in_text(lm.model, lm.needs_tokenizer(), source, progress=progress, **options)
    differences = {name: _differences(rows) for name, rows in results.items()}
    if as_json:
        print(_as_json(results, differences, positions, absent, scores=False, ascii_only=True))
    else:
        for task in tasks:
            _show(results[task], differences[task], counted if task in texts else [])
        for text, by_model in positions.items():
            _show_positions(text, by_model)
        if paper_table:
            _show_paper(models, results, absent)
    if out is not None:
        whole = _as_json(results, differences, positions, absent, scores=True)
        # A name of a file need not be Unicode; what is not becomes an escape that JSON knows.
        write_files(out.parent, {out.name: whole.encode(errors="backslashreplace") + b"\n"})


def _refuse_without_text(by_position: bool, trigram: Path | None, text_field: str) -> None:
    from gptlab.errors import GptlabError

    if by_position:
        raise GptlabError("--by-position needs a text; give one with --task text:FILE")
    if trigram is not None:
        raise GptlabError("--trigram needs a text; give one with --task text:FILE")
    if text_field != "text":
        raise GptlabError("--text-field applies to the records of a text; give one with --task text:FILE")


def _protocols(tasks: list[str], stride: int | None, paper_table: bool) -> list[Protocol]:
    """Return the protocols of the tasks; refuse to measure nothing, and a stride that nothing would use."""
    from gptlab.errors import GptlabError
    from gptlab.evaluation.tasks import protocol_of

    if not tasks and not paper_table:
        raise GptlabError("nothing to measure; name a --task such as text:novel.txt, or ask for --paper-table")
    protocols = [protocol_of(task) for task in tasks]
    if stride is not None and not paper_table and not any(protocol.sliding for protocol in protocols):
        raise GptlabError(f"--stride has no effect on {', '.join(tasks)}; leave it out")
    return protocols


def _load(name: str, dtype: str, tokenizer: str | None, device: str) -> LanguageModel:
    import gptlab
    from gptlab.errors import GptlabError, nearest
    from gptlab.evaluation.batches import PRECISIONS

    if dtype not in PRECISIONS:
        raise GptlabError(f"--dtype must be one of {', '.join(PRECISIONS)}, got {dtype!r}{nearest(dtype, PRECISIONS)}")
    return gptlab.load(name, dtype=dtype, tokenizer=tokenizer, device=device)


def _counts(data: Path, name: str, lm: LanguageModel, said: list[str]) -> Trigram:
    """Count as many tokens as a model was trained on, where that is known, and say of what and how many."""
    from gptlab.errors import GptlabError
    from gptlab.evaluation.trigram import DEFINITION
    from gptlab.text.shards import open_dataset
    from gptlab.training.budget import tokens_trained
    from gptlab.training.counts import count_read
    from gptlab.training.data import Windows

    dataset = open_dataset(data)
    if dataset.tokenizer.sha256 != lm.needs_tokenizer().sha256:
        raise GptlabError(
            f"{data} was prepared with a tokenizer other than that of {name}; prepare it with --tokenizer"
        )
    counts = count_read(dataset, Windows(dataset.training, lm.config.context_length), tokens_trained(name), 0)
    said.append(f"{DEFINITION}: {counts.n_tokens:,} of {dataset.name}.")
    return counts


def _by_counts(counts: Trigram, lm: LanguageModel, result: Result, text_field: str) -> Result:
    from gptlab.evaluation.tasks import evaluate_trigram

    return evaluate_trigram(counts, lm.needs_tokenizer(), result, text_field)


def _paper_protocols(tasks: list[str], paths: dict[str, Path], absent: dict[str, str]) -> list[Protocol]:
    """Return the protocols of the paper's table that are not asked for already; note in ``absent`` what lacks data."""
    from gptlab.errors import GptlabError
    from gptlab.evaluation import data as sources
    from gptlab.evaluation.paper import TABLE_3
    from gptlab.evaluation.tasks import TASKS

    protocols = []
    for name in dict.fromkeys(row.protocol for row in TABLE_3 if row.protocol):
        protocol = TASKS[name]
        assert protocol.data is not None
        try:
            sources.read(protocol.data, paths)
        except GptlabError as error:
            absent[name] = str(error)
            continue
        if name not in tasks:
            protocols.append(protocol)
    return protocols


def _differences(results: list[Result]) -> list[dict[str, Any]]:
    """Compare every model with the first; where that has no meaning, say why."""
    from gptlab.errors import GptlabError
    from gptlab.evaluation.compare import paired_difference

    rows = []
    for other in results[1:]:
        row: dict[str, Any] = {"of": other.model["name"], "minus": results[0].model["name"]}
        if any(math.isnan(value) for result in (results[0], other) for value in result.metrics.values()):
            rows.append({**row, "words": "no difference: what is compared is not a number"})
            continue
        try:
            answered = all(score.correct is not None for score in other.scores)
            difference = paired_difference(other, results[0], measure="accuracy" if answered else "nats_per_token")
            row |= {**dataclasses.asdict(difference), "words": str(difference)}
        except GptlabError as error:
            row["words"] = f"no difference: {error}"
        rows.append(row)
    return rows


@contextlib.contextmanager
def _progress(what: str) -> Iterator[Callable[[int, int], None] | None]:
    """A bar on standard error, where somebody may be looking at it."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _show(results: list[Result], differences: list[dict[str, Any]], counted: list[str]) -> None:
    from rich.table import Table

    from gptlab.evaluation.tasks import protocol_of

    protocol = protocol_of(results[0].protocol)
    table = Table("model")
    for metric in protocol.metrics:
        table.add_column(metric.replace("_", " "), justify="right")
    for result in results:
        table.add_row(result.model["name"], *(_cell(result.metrics, metric) for metric in protocol.metrics))
    notes = [f"{protocol.definition}.", *dict.fromkeys(map(_conditions, results)), *counted]
    if protocol.original:
        numbers = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in protocol.original.items())
        notes.append(f"OpenAI's 124M, all of the official file, float32, no overlap: {numbers} ({protocol.source}).")
    notes += [
        f"{result.model['name']} answers nan, which is not a number: its weights or its dtype are at fault."
        for result in results
        if any(map(math.isnan, result.metrics.values()))
    ]
    notes += [f"{row['of']} - {row['minus']}: {row['words']}" for row in differences]
    _print(protocol.name, table, notes)


def _cell(metrics: dict[str, float], name: str) -> str:
    if name not in metrics:
        return "too large"
    if math.isnan(metrics[name]):
        return "not a number"
    error = f" ± {metrics[f'{name}_error']:.4f}" if f"{name}_error" in metrics else ""
    return f"{metrics[name]:.{DECIMALS.get(name, 2)}f}{error}"


def _scaled(value: float) -> str:
    return "too large" if value == math.inf else "not a number" if math.isnan(value) else f"{value:.2f}"


def _conditions(result: Result) -> str:
    """What else the numbers depend on, in one line."""
    chosen, data = result.settings, result.data
    windows = f"stride {chosen['stride']}, " if "stride" in chosen else ""
    other = "" if data.get("official", True) else f"; {data['file']} is not the official file"
    some = "" if chosen["limit"] is None else f"; the first {chosen['limit']:,} only"
    tokens = sum(score.tokens for score in result.scores)
    start = ""
    if "from" in data:
        start = f", each document from {data['from']}" if data["from"] else ", no first token of a document"
    return (
        f"{windows}context {chosen['context']}, {chosen['dtype']}; {tokens:,} tokens scored{start}; data"
        f" {data['sha256'][:12]}{other}{some}."
    )


def _show_positions(text: str, by_model: dict[str, list[Position]]) -> None:
    from rich.table import Table

    table = Table("tokens seen")
    for name in by_model:
        table.add_column(f"{name}, nats", justify="right")
    ranges = sorted({(row.first, row.last) for rows in by_model.values() for row in rows})
    for first, last in ranges:
        cells = []
        for rows in by_model.values():
            row = next((row for row in rows if (row.first, row.last) == (first, last)), None)
            cells.append("" if row is None else f"{row.nats:.4f} ± {row.error:.4f}")
        table.add_row(f"{first:,} to {last:,}", *cells)
    notes = [
        f"{name}: {rows[0].tokens // (rows[0].last - rows[0].first + 1):,} pieces of {rows[-1].last:,} tokens."
        for name, rows in by_model.items()
    ]
    _print(f"{text}, loss by position", table, notes)


def _show_paper(models: list[str], results: dict[str, list[Result]], absent: dict[str, str]) -> None:
    from rich.table import Table

    from gptlab.evaluation.paper import TABLE_3

    table = Table("data", "unit")
    table.add_column("paper, 117M", justify="right")
    table.add_column("protocol here", no_wrap=True)
    for name in models:
        table.add_column(name, justify="right")
    notes: dict[str, None] = {}
    for row in TABLE_3:
        cells = ["-"] * len(models)
        if row.protocol in results:
            values = [result.metrics.get(row.metric, math.inf) for result in results[row.protocol]]
            cells = [_scaled(value * row.scale) for value in values]
            notes[f"{row.protocol} beside the paper: {row.why}."] = None
            notes |= dict.fromkeys(f"{row.protocol}: {_conditions(result)}" for result in results[row.protocol])
        else:
            notes[f"{row.dataset}: {absent.get(row.protocol or '', row.why)}."] = None
        table.add_row(row.dataset, row.unit, f"{row.paper:.2f}", row.protocol or "none", *cells)
    _print("table 3 of the GPT-2 paper (Radford et al. 2019), zero-shot", table, list(notes))


def _print(title: str, table: Table, notes: list[str]) -> None:
    """A table with its name above and its conditions below, as lines that can be copied."""
    from gptlab.cli.output import table_console

    console = table_console()
    console.print(title)
    console.print(table)
    for note in notes:
        console.print(note, soft_wrap=True)
    console.print()


def _as_json(
    results: dict[str, list[Result]],
    differences: dict[str, list[dict[str, Any]]],
    positions: dict[str, dict[str, list[Position]]],
    absent: dict[str, str],
    *,
    scores: bool,
    ascii_only: bool = False,
) -> str:
    """Return everything as JSON, the scores of single documents only where asked for.

    ``ascii_only`` is for terminals and pipes, which may know nothing else.
    """
    from gptlab import __version__

    rows = [result.to_dict() for of_protocol in results.values() for result in of_protocol]
    if not scores:
        rows = [{key: value for key, value in row.items() if key != "scores"} for row in rows]
    values = {
        "gptlab": __version__,
        "results": rows,
        "differences": [{"protocol": name, **row} for name, compared in differences.items() for row in compared],
        "positions": [
            {"text": text, "model": name, "positions": [dataclasses.asdict(row) for row in of_model]}
            for text, by_model in positions.items()
            for name, of_model in by_model.items()
        ],
        "absent": absent,
    }
    return json.dumps(_without_nan(values), indent=2, ensure_ascii=ascii_only, allow_nan=False)


def _without_nan(values: Any) -> Any:
    """JSON has no word for what is not a number; null says it."""
    if isinstance(values, dict):
        return {key: _without_nan(value) for key, value in values.items()}
    if isinstance(values, (list, tuple)):
        return [_without_nan(value) for value in values]
    return None if isinstance(values, float) and not math.isfinite(values) else values
