"""`gptlab train`."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from gptlab.cli.model_options import DilationFlag, KvHeadFlag, PositionFlag, SinksFlag, WindowFlag, overrides


def train(
    recipe: Annotated[str, typer.Argument(help="A recipe that the package carries, or a .toml file.")] = "pocket",
    corpus: Annotated[
        str, typer.Option(help="A text file, a directory of them, or stdlib (Python's own sources).")
    ] = "stdlib",
    out: Annotated[Path, typer.Option(help="Directory for the model and its figures.")] = Path("runs/model"),
    position: PositionFlag = None,
    n_kv_head: KvHeadFlag = None,
    window: WindowFlag = None,
    sinks: SinksFlag = None,
    dilation: DilationFlag = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="section.key=value; may be given several times.")
    ] = None,
) -> None:
    """Train a model from scratch (a plain loop in one process)."""
    from gptlab.training.recipe import read_recipe

    flags = overrides(position, n_kv_head, window, sinks, dilation)
    plan = read_recipe(recipe, settings, flags)  # refuse a wrong setting before torch is loaded

    import gptlab
    from gptlab.checkpoints.files import write_files
    from gptlab.text.corpora import read_corpus
    from gptlab.training.loop import train as run

    texts = read_corpus(corpus)
    print(f"corpus {texts.name}: {len(texts.documents):,} documents, {texts.n_bytes / 1e6:.1f} MB", flush=True)
    resolved = plan.model_dump_json(indent=2).encode() + b"\n"
    write_files(out, {"recipe.json": resolved})  # also says now, not in an hour, whether this place can be written
    result = run(plan, texts, _Progress(), keep=lambda lm: gptlab.save(lm, out))
    figures = json.dumps({"metrics": result.metrics, "history": result.history}, indent=2).encode() + b"\n"
    write_files(out, {"result.json": figures})
    print(
        f"held out: {result.metrics['held_out_nats_per_token']:.4f} nats a token,"
        f" {result.metrics['held_out_bits_per_byte']:.4f} bits a byte\nsaved: {out}"
        f"\ntry it: gptlab generate --model {out}"
    )


class _Progress:
    """Prints the plan, then one line every evaluation and every ten seconds."""

    def __init__(self) -> None:
        self.total = self.steps = 0
        self.shown = 0.0

    def __call__(self, row: dict[str, Any]) -> None:
        if row["event"] == "start":
            self.total, self.steps = row["tokens"], row["steps"]
            print(f"{self.steps:,} steps, {self.total:,} tokens", flush=True)
            return
        rate = row["tokens"] / row["seconds"]
        if row["event"] == "evaluate" or time.monotonic() - self.shown > 10:
            self.shown = time.monotonic()
            end = time.strftime("%H:%M", time.localtime(time.time() + (self.total - row["tokens"]) / rate))
            held = f"  held out {row['held_out_loss']:.4f}" if "held_out_loss" in row else ""
            print(
                f"step {row['step']:>6,} of {self.steps:,}  loss {row['loss']:.4f}{held}"
                f"  {rate:,.0f} tokens a second, done at {end}",
                flush=True,
            )
