"""The command `gptlab`: parses, calls, prints. Nothing here imports torch before it must."""

from __future__ import annotations

import os
import sys
import warnings

import typer

from gptlab.cli.bench import bench, compile_step
from gptlab.cli.convert import convert
from gptlab.cli.evaluate import evaluate
from gptlab.cli.explore import explore
from gptlab.cli.export import export
from gptlab.cli.generate import generate
from gptlab.cli.import_model import import_model
from gptlab.cli.inspect import inspect
from gptlab.cli.output import prepare_streams
from gptlab.cli.plot import plot
from gptlab.cli.prepare import prepare
from gptlab.cli.report import report
from gptlab.cli.serve import serve
from gptlab.cli.study import study
from gptlab.cli.train import train
from gptlab.cli.verify import verify
from gptlab.errors import GptlabError

ABOUT = (
    "GPT-2 from scratch in PyTorch: generate, inspect, verify, prepare, train, convert, import, export, evaluate, plot,"
    " study, report, serve, explore, compile, bench."
)

app = typer.Typer(
    name="gptlab",
    help=ABOUT,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
COMMANDS = (generate, inspect, evaluate, verify, prepare, train, convert, export, plot, study, report, serve, explore)
for command in COMMANDS:
    app.command()(command)
app.command("import")(import_model)
app.command("compile")(compile_step)
app.add_typer(bench, name="bench")


def version(show: bool = False) -> None:
    """Print the version and stop."""
    if show:
        from gptlab import __version__

        typer.echo(f"gptlab {__version__}")
        raise typer.Exit


@app.callback(help=ABOUT)
def options(
    version: bool = typer.Option(False, "--version", callback=version, is_eager=True, help="Print the version."),
) -> None:
    """What comes before the command."""


def _one_line(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """A warning as the user should see it, without the place in the source that gave it."""
    return f"gptlab: {message}\n" if category is UserWarning else f"gptlab: {category.__name__}: {message}\n"


def main() -> None:
    """Run the command line; a `GptlabError` becomes one sentence and exit code 2."""
    warnings.formatwarning = _one_line
    prepare_streams()
    try:
        try:
            app()
        finally:
            sys.stdout.flush()  # here a pipe that nobody reads is caught, at the interpreter's end it is not
    except GptlabError as error:
        print(f"gptlab: {error}", file=sys.stderr)
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not ("alloc" in str(error) and "memory" in str(error)):
            raise
        print("gptlab: there is not enough memory for this; use a smaller model, or less at a time", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        # What is still in the buffer must go nowhere, or Python complains about it at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):  # the reader of a pipe went away, as `head` does
            sys.exit(1)
        print(f"gptlab: {error.filename or 'the output'} cannot be used: {error.strerror or error}", file=sys.stderr)
        sys.exit(2)
