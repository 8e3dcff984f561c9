"""`gptlab train`."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gptlab.cli.model_options import (
    BiasFlag,
    DilationFlag,
    KvHeadFlag,
    MlpFlag,
    NormFlag,
    PositionFlag,
    SinksFlag,
    WindowFlag,
    overrides,
)
from gptlab.cli.prepare import TextFieldOption, ValidationOption, prepare_with_progress
from gptlab.errors import GptlabError

if TYPE_CHECKING:
    from gptlab.text.shards import Dataset
    from gptlab.training.loop import Result
    from gptlab.training.recipe import Recipe


def train(
    recipe: Annotated[
        str | None,
        typer.Argument(
            help="A recipe that the package carries, or a .toml file (default: pocket; finetune with --from)."
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="Token shards of gptlab prepare, or nanoGPT's or llm.c's .bin files; with --resume, where they are."
        ),
    ] = None,
    corpus: Annotated[
        list[str] | None,
        typer.Option(
            help="Texts to prepare first: files, directories, or a name such as stdlib (default: the recipe's)."
        ),
    ] = None,
    validation: ValidationOption = None,
    text_field: TextFieldOption = None,
    base: Annotated[str | None, typer.Option("--from", help="A trained model to continue from.")] = None,
    out: Annotated[Path | None, typer.Option(help="Directory of the run (default runs/RECIPE).")] = None,
    resume: Annotated[Path | None, typer.Option(help="Continue the run in this directory.")] = None,
    position: PositionFlag = None,
    n_kv_head: KvHeadFlag = None,
    window: WindowFlag = None,
    sinks: SinksFlag = None,
    dilation: DilationFlag = None,
    norm: NormFlag = None,
    mlp: MlpFlag = None,
    bias: BiasFlag = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="section.key=value; may be given several times.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or mps; by default a GPU where there is one.")] = None,
) -> None:
    """Train a model, go on training one (--from), or go on with a run that was stopped (--resume)."""
    flags = overrides(position, n_kv_head, window, sinks, dilation, norm, mlp, bias)
    if resume is not None:
        if flags or any(value is not None for value in (recipe, corpus, validation, text_field, base, out)):
            raise GptlabError(
                "--resume takes the recipe from the run; of the other options only --data, for data that have moved,"
                " --set and --device go with it"
            )
        _finish(_resume(resume, data, settings, device), resume)
        return
    recipe = recipe or ("pocket" if base is None else "finetune")
    from gptlab.training.recipe import read_recipe

    plan = read_recipe(recipe, settings, flags, base)  # refuse a wrong setting before torch is loaded
    if data is not None and corpus is not None:
        raise GptlabError("--data and --corpus both say what to train on; give one of them")
    of_texts = {"--validation": validation, "--text-field": text_field}
    if data is not None and (idle := [name for name, value in of_texts.items() if value is not None]):
        raise GptlabError(
            f"{idle[0]} has no effect on data that are prepared already; leave it out, or give --corpus in place of"
            " --data"
        )
    _refuse_idle(settings or [], data, validation, plan.base)
    run = out or Path("runs") / Path(recipe).stem
    prepare = functools.partial(
        prepare_with_progress, corpus or plan.data.corpus, validation=validation or (), text_field=text_field
    )
    _finish(_start(plan, data, prepare, run, device), run)


def _refuse_idle(settings: list[str], data: Path | None, validation: list[str] | None, base: str | None) -> None:
    """Refuse settings without effect: those of the tokenizer and the split, where data or a model bring them."""
    for setting in settings:
        name = setting.partition("=")[0].strip()
        of_tokenizer = name.startswith("tokenizer.")
        if data is not None and (of_tokenizer or name in ("data.corpus", "data.held_out")):
            raise GptlabError(
                f"{name} has no effect on data that are prepared already; leave it out, or give --corpus in place of"
                " --data"
            )
        if validation and name == "data.held_out":
            raise GptlabError("data.held_out has no effect with --validation; leave one of them out")
        if base is not None and of_tokenizer:
            raise GptlabError(f"the tokenizer comes from {base}, so {name} has no effect; leave it out")


def _start(plan: Recipe, data: Path | None, prepare: Callable[..., Dataset], run: Path, device: str | None) -> Result:
    import gptlab
    from gptlab.checkpoints.hub import locate
    from gptlab.checkpoints.runs import is_run
    from gptlab.cli.progress import Progress
    from gptlab.devices import find_device
    from gptlab.text.shards import open_dataset
    from gptlab.training.budget import with_count
    from gptlab.training.lock import locked
    from gptlab.training.loop import train as run_training
    from gptlab.training.schedules import check_schedules

    if is_run(run):
        raise GptlabError(f"{run} holds a run already; go on with it by --resume {run}, or choose another --out")
    # All that can be refused is, before the corpus is prepared.
    find_device(device)
    plan = with_count(plan)
    lm = gptlab.load(plan.base, dtype="float32") if plan.base is not None else None
    if lm is not None:
        check_schedules(plan, lm.config)
    if plan.distill is not None:
        locate(plan.distill.teacher)
    first = os.environ.get("RANK", "0") == "0"
    if data is None:
        data = run / "data"
        if first:
            with locked(run):
                if data.exists():
                    raise GptlabError(
                        f"{data} is left from a run that did not begin; train on it with --data {data}, or remove it"
                    )
                tokenizer = plan.tokenizer if lm is None else lm.needs_tokenizer()
                prepare(tokenizer, data, plan.data.held_out, plan.data.items)
        else:
            _wait_for(data / "index.json")
    with Progress() as progress:
        return run_training(plan, open_dataset(data), run, base=lm, device=device, report=progress)


def _resume(run: Path, data: Path | None, settings: list[str] | None, device: str | None) -> Result:
    import gptlab
    from gptlab.checkpoints.runs import read_run, run_checkpoints
    from gptlab.cli.progress import Progress
    from gptlab.text.shards import open_dataset
    from gptlab.training.loop import train as run_training
    from gptlab.training.recipe import change_recipe, make_recipe

    about = read_run(run)
    recipe = change_recipe(make_recipe(about["recipe"]), settings or [])
    dataset = open_dataset(_data_of(run, Path(about["data"]["path"])) if data is None else data)
    from_start = recipe.base is not None and not run_checkpoints(run)
    lm = gptlab.load(str(recipe.base), dtype="float32") if from_start else None
    with Progress() as progress:
        return run_training(recipe, dataset, run, base=lm, resume=True, device=device, report=progress)


def _data_of(run: Path, recorded: Path) -> Path:
    """Return where the data of a run are: where they were, or in the run, which may have been moved with them."""
    for place in (recorded, run / "data"):
        if place.exists():
            return place
    raise GptlabError(
        f"the data of the run {run} are no longer at {recorded}; say where they are: gptlab train --resume {run} --data"
        " WHERE"
    )


def _finish(result: Result, run: Path) -> None:
    """Say what is there now and how to go on."""
    if os.environ.get("RANK", "0") != "0":
        return
    if result.stopped_by is not None:
        print(
            f"stopped by {result.stopped_by.name} and saved; go on with: gptlab train --resume {run}", file=sys.stderr
        )
        raise typer.Exit(128 + result.stopped_by)
    figures = result.metrics
    bits = figures.get("validation_bits_per_byte")
    print(
        f"validation: {figures['validation_loss']:.4f} nats per token"
        + ("" if bits is None else f", {bits:.4f} bits per byte")
        + f" ({figures['protocol']})"
    )
    if "new_share" in figures:
        print(f"{figures['new_share']:.0%} of {figures['sampled']} sampled items are new: not in the training data")
    print(f"saved: {run}\ntry it: gptlab generate --model {run}")


def _wait_for(path: Path) -> None:
    """Wait for the first process to prepare the data."""
    import time

    while not path.exists():
        time.sleep(0.2)
