"""`gptlab bench generate` and `gptlab compile`."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from gptlab.benchmark import GenerationSpeed
    from gptlab.model.gpt import GPT

bench = typer.Typer(
    help="Measure what this machine does.", no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None
)


@bench.callback()
def _options() -> None:
    """Measure what this machine does."""


@bench.command("generate")
def bench_generate(
    model: Annotated[
        str, typer.Option(help="A preset such as gpt2 (its shape, with random weights), or what gptlab generate takes.")
    ] = "gpt2",
    random: Annotated[
        bool, typer.Option("--random", help="Read the model's configuration alone; random weights take the same time.")
    ] = False,
    dtypes: Annotated[str, typer.Option(help="Precisions of the weights, with commas.")] = "float32,bfloat16,int8,int4",
    batches: Annotated[str, typer.Option(help="Sequences at a time, with commas.")] = "1,8,32",
    contexts: Annotated[str, typer.Option(help="Tokens of each that a step attends to, with commas.")] = "128,1024",
    prompt: Annotated[int, typer.Option(help="Tokens of the prompt that is read; 0 times no prompt.")] = 1024,
    rounds: Annotated[int, typer.Option(help="How often each takes its turn.")] = 7,
    threads: Annotated[int | None, typer.Option(help="Threads to compute with (default: PyTorch's choice).")] = None,
    out: Annotated[Path | None, typer.Option(help="Write every time that was measured to this JSON file.")] = None,
) -> None:
    """Time generation on this machine's CPU beside the bandwidth of its memory, which limits it."""
    from gptlab.benchmark import Settings, check_room, measure_generation, read_shape
    from gptlab.checkpoints.files import write_files
    from gptlab.errors import GptlabError

    settings = Settings(
        tuple(dict.fromkeys(part.strip() for part in dtypes.split(","))),
        _numbers("--batches", batches),
        _numbers("--contexts", contexts),
        prompt,
        rounds,
    )
    if threads is not None and threads < 1:
        raise GptlabError(f"--threads must be at least 1, got {threads}")
    if out is not None and out.is_dir():
        raise GptlabError(f"{out} is a directory; --out takes the name of a file")
    import torch

    from gptlab.model.gpt import GPT

    config, weights = read_shape(model, random, settings)
    check_room(config, settings)
    torch.set_num_threads(threads or torch.get_num_threads())
    if weights == "random":
        timed: GPT = GPT(config)
    else:
        import gptlab

        timed = gptlab.load(model, dtype="float32").model
    result = measure_generation(model, weights, timed, settings, _say)
    if out is not None:
        write_files(out.parent, {out.name: (result.model_dump_json(indent=2) + "\n").encode()})
    _show(result)


def compile_step(
    model: Annotated[
        str | None, typer.Argument(help="Also decode with this model, and compare its logits with plain PyTorch's.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="Precision for that, as of gptlab generate.")] = None,
) -> None:
    """Compile the decoding step for this processor, once; it serves every model and precision.

    The commands that generate do so themselves where it pays.
    """
    from gptlab.errors import GptlabError
    from gptlab.generation.compiled.library import is_built, library, library_path

    if dtype is not None and model is None:
        raise GptlabError("--dtype is of a model to check; name one, or leave it out: the step serves every precision")
    if model is not None:
        import gptlab

        loaded = gptlab.load(model, dtype=dtype).model  # before the work: it may not be there
    built, started = is_built(), time.perf_counter()
    library()
    done = "was there already" if built else f"compiled in {time.perf_counter() - started:.1f} seconds"
    print(f"{done}: {library_path()}")
    if model is not None:
        from gptlab.benchmark import compare_steps

        difference, spread, n_tokens = compare_steps(loaded)
        print(
            f"{model}{f', {dtype}' if dtype else ''}: logits of {n_tokens} tokens differ from plain PyTorch's by"
            f" at most {difference:.2g} (their standard deviation is {spread:.2g})"
        )


def _numbers(flag: str, text: str) -> tuple[int, ...]:
    from gptlab.errors import GptlabError

    try:
        return tuple(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        raise GptlabError(f"{flag} takes whole numbers with commas between, such as 1,8,32, got {text!r}") from None


def _say(row: dict[str, Any]) -> None:
    print(f"timing {row['what']} ({row['number']} of {row['of']})", file=sys.stderr, flush=True)


def _show(result: GenerationSpeed) -> None:
    from rich.table import Table

    from gptlab.cli.output import table_console

    console = table_console()
    machine, bandwidth = result.machine, result.bandwidth
    table = Table("batch", "context", "precision", title="decoding")
    for column in ("tokens per second", "ms per step", "quartiles", "MB to read", "of the bandwidth"):
        table.add_column(column, justify="right")
    table.add_column("computed by")
    last = None
    for point in result.decode:
        if last not in (None, (point.batch, point.context)):
            table.add_section()
        last = point.batch, point.context
        low, high = point.step.quartiles
        table.add_row(
            f"{point.batch}",
            f"{point.context:,}",
            point.dtype,
            f"{point.tokens_per_second:,.1f}",
            f"{1e3 * point.step.median:,.2f}",
            f"{1e3 * low:,.2f} to {1e3 * high:,.2f}",
            f"{(point.weight_bytes + point.cache_bytes) / 1e6:,.0f}",
            f"{100 * point.share:.0f}%",
            point.program,
        )
    console.print(table)
    if result.prefill:
        table = Table("precision", title=f"reading a prompt of {result.prefill[0].tokens:,} tokens")
        for column in ("tokens per second", "ms", "quartiles"):
            table.add_column(column, justify="right")
        for row in result.prefill:
            low, high = row.read.quartiles
            cells = (
                f"{row.tokens_per_second:,.0f}",
                f"{1e3 * row.read.median:,.0f}",
                f"{1e3 * low:,.0f} to {1e3 * high:,.0f}",
            )
            table.add_row(row.dtype, *cells)
        console.print(table)
    for words in result.left_out:
        console.print(f"left out: {words}", soft_wrap=True)
    low, high = (bandwidth.bytes / seconds / 1e9 for seconds in reversed(bandwidth.read.quartiles))
    console.print(
        f"{result.model}, {result.weights} weights; {machine.processor}, {machine.threads} threads, torch"
        f" {machine.torch}; medians of {result.settings['rounds']} rounds in turn. Memory is read at"
        f" {bandwidth.bytes_per_second / 1e9:.1f} GB/s (quartiles {low:.1f} to {high:.1f}: {bandwidth.how}).",
        soft_wrap=True,
    )
