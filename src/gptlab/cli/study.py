"""`gptlab study` and `gptlab report`."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gptlab.cli.study_tables import ages_table, conversion_table, notes, rates_table, summary

if TYPE_CHECKING:
    from rich.console import Console

    from gptlab.study.directory import Request

EVERY = 30.0
"""Seconds between two lines where there is no terminal."""


def study(
    name: Annotated[
        str | None,
        typer.Argument(
            help="quick, standard, papers, rates, ages, convert, heads, real, ..., or a .toml file; none with --resume."
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Directory of the study (default studies/NAME).")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the study in --out with its own options.")] = False,
    only: Annotated[list[str] | None, typer.Option(help="This variant, beside the base; may be given again.")] = None,
    seeds: Annotated[int | None, typer.Option(help="Number of seeds, in place of the study's own.")] = None,
    data: Annotated[Path | None, typer.Option(help="Token shards of gptlab prepare to train on.")] = None,
    corpus: Annotated[list[str] | None, typer.Option(help="Texts to train on, in place of the recipe's.")] = None,
    text: Annotated[str | None, typer.Option(help="Text to evaluate on, in place of the study's own.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="section.key=value of the recipe; may be given several times.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or mps; by default a GPU where there is one.")] = None,
) -> None:
    """Compare variants of a model under the same conditions, and write a report. A study that was stopped goes on."""
    from gptlab.errors import GptlabError
    from gptlab.study.directory import Request, read_request
    from gptlab.study.settings import read_study, study_names

    if resume and out is None and name is None:
        raise GptlabError("--resume needs the directory of the study; name it by --out")
    if name is None:
        if not resume or out is None:
            raise GptlabError(f"no study is named; give a .toml file or one of {', '.join(study_names())}")
        if any(value is not None for value in (only, seeds, data, corpus, text, settings, device)):
            raise GptlabError("--resume without a name goes on as before; name the study to change what is asked of it")
        request = read_request(out)
    else:
        if data is not None and corpus is not None:
            raise GptlabError("--data and --corpus both say what to train on; give one of them")
        changes = [*(settings or []), *([f"data.corpus={json.dumps(corpus)}"] if corpus else [])]
        chosen = read_study(name)
        if text is not None:
            where = str(Path(text).resolve()) if Path(text).exists() else text
            chosen = chosen.model_copy(update={"evaluate": chosen.evaluate.model_copy(update={"text": where})})
        request = Request(chosen, tuple(changes), data, tuple(only or ()), seeds, device)
        out = out or Path("studies") / request.study.name
        if resume:
            read_request(out)
    _run(request, out)


def _run(request: Request, out: Path) -> None:
    from gptlab.cli.output import table_console
    from gptlab.report.page import write_report
    from gptlab.study.run import run_study
    from gptlab.study.runs import Interrupted

    try:
        with StudyProgress() as progress:
            results, timings = run_study(request, out, report=progress)
        path = write_report(out)
    except (Interrupted, KeyboardInterrupt) as stop:
        number = stop.number if isinstance(stop, Interrupted) else 2
        print(f"stopped and saved; go on with: gptlab study --resume --out {out}", file=sys.stderr)
        raise typer.Exit(128 + number) from None
    console = table_console()
    console.print(summary(results, timings))
    for table in (conversion_table(results), rates_table(results), ages_table(results)):
        if table is not None:
            console.print(table)
    for note in notes(results, timings):
        console.print(note, soft_wrap=True)
    print(f"results: {out / 'results.json'}, {out / 'timings.json'}\nreport: {path}")


class StudyProgress:
    """Shows how far a study is: a bar on a terminal, plain lines anywhere else. Use it as a context manager.

    Args:
        console: where to show; else standard error.
        clock: seconds.
    """

    def __init__(self, console: Console | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        self.console = console or Console(stderr=True, force_terminal=sys.stderr.isatty())
        self.clock, self.printed = clock, -math.inf
        self.phase = ""
        self.tokens_left = self.seconds = 0.0  # of the training that the plan foresaw
        self.begun: float | None = None
        self.trained = self.at = 0.0
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[said]}"),
            TimeElapsedColumn(),
        )
        self.bar = Progress(*columns, console=self.console, transient=True)
        self.task = self.bar.add_task("starting", total=None, said="")

    def __enter__(self) -> StudyProgress:
        if self.console.is_terminal:
            self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.console.is_terminal:
            self.bar.stop()

    def __call__(self, row: dict[str, Any]) -> None:
        """Take the next row of `gptlab.study.run.run_study`."""
        match row["event"]:
            case "plan":
                self.tokens_left, self.seconds = row["tokens"], row["seconds"]
                if row["runs"]:
                    self._print(plan(row))
            case "phase":
                self._phase(row)
            case "training":
                self._training(row["row"])
            case "note":
                self._print(row["text"])

    def _phase(self, row: dict[str, Any]) -> None:
        said = f"{row['done'] + 1} of {row['of']}" if row.get("of", 1) > 1 else ""
        if row["phase"] == "train":
            self.at = 0.0
        left = f", {_duration(row['seconds_left'])} left" if row.get("seconds_left") else ""
        self.bar.update(
            self.task, description=f"{row['phase']} {row['what']}", completed=row.get("done", 0), total=row.get("of")
        )
        self._say(said + left)
        # Runs take long, so each has its line; of the rest a line a phase is enough.
        if row["phase"] != self.phase or row["phase"] == "train":
            self._line(f"{row['phase']} {row['what']}" + (f" ({said})" if said else ""), now=True)
        self.phase = row["phase"]

    def _training(self, row: dict[str, Any]) -> None:
        if row["event"] == "start":
            self.at = row["step"] * row["tokens_per_step"]
            self.begun = self.clock() if self.begun is None else self.begun
            if self.phase == "train":
                self.tokens_left -= self.at
        elif row["event"] in ("step", "evaluate"):
            if self.phase == "train":
                self.tokens_left -= row["tokens"] - self.at
                self.trained += row["tokens"] - self.at
            self.at = row["tokens"]
            if row["event"] == "step":
                rate = f", {row['tokens_per_second']:,.0f} tokens/s" if row.get("tokens_per_second") else ""
                said = f"{row['tokens']:,} tokens, loss {row['loss']:.3f}{rate}{self._left()}"
                self._say(said)
                self._line(f"  {said}")

    def _left(self) -> str:
        """Say how long the rest of the training will take at the rate so far."""
        if self.phase != "train" or not self.trained or self.begun is None:
            return ""
        seconds = self.tokens_left * (self.clock() - self.begun) / self.trained
        return f", {_duration(seconds)} left"

    def _say(self, text: str) -> None:
        self.bar.update(self.task, said=text)

    def _line(self, text: str, *, now: bool = False) -> None:
        if not self.console.is_terminal and (now or self.clock() - self.printed >= EVERY):
            self._print(text)
            self.printed = self.clock()

    def _print(self, text: str) -> None:
        from rich.text import Text

        self.console.print(Text(text), soft_wrap=True)


def plan(row: dict[str, Any]) -> str:
    """Return what there is to train, in one line."""
    done = f" ({row['done']} done before)" if row["done"] else ""
    runs = f"{row['variants']} variants, {row['runs']} runs{done}"
    if not row["tokens"]:
        return f"study {row['study']}: {runs}, nothing left to train"
    time_left = _duration(row["seconds"])
    return f"study {row['study']}: {runs}, {row['tokens']:,} tokens to train, about {time_left} by a trial step"


def _duration(seconds: float) -> str:
    minutes, second = divmod(max(round(seconds), 0), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}"
