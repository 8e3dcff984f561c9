"""What a run leaves on disk, so that it can go on exactly where it was.

    run/run.json                the resolved recipe, and which data it was given
    run/metrics.jsonl           one row per report, as `gptlab plot` reads them
    run/checkpoints/step-N/     a model directory, and beside the model:
        training.safetensors    the optimizers' state, a checksum for every tensor and one of training.json
        training.json           the step, the recipe, the loss on the validation stream, a hash of data and model

Each of the three files names the next by its hash, so that files of two runs, or of two steps, are never taken for one.

There is no random state to save: the order of the data and the generator that dropout draws from are functions of the
seed and the step. State is whole, whatever the number of processes that wrote it, so any number can go on from it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from gptlab import checkpoints
from gptlab.checkpoints import native
from gptlab.checkpoints.files import open_safetensors, tensor_sha256, write_files
from gptlab.checkpoints.runs import FOLDER, best, read_facts, run_checkpoints
from gptlab.config import ModelConfig
from gptlab.errors import GptlabError
from gptlab.model.gpt import GPT
from gptlab.text.tokenizers import Tokenizer
from gptlab.training.parallel import like, whole

VERSION = 1


def model_state(model: GPT) -> dict[str, Tensor]:
    """Return every parameter and buffer in one piece on the CPU. All processes must ask together."""
    return {name: whole(tensor).cpu() for name, tensor in model.tensors().items()}


def optimizer_state(model: GPT, optimizers: list[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """Return what the optimizers remember, as ``parameter/entry``. All processes must ask together."""
    names = {id(p): name for name, p in model.named_parameters()}
    state: dict[str, Tensor] = {}
    for optimizer in optimizers:
        for parameter, entries in optimizer.state.items():
            for entry, value in entries.items():
                state[f"{names[id(parameter)]}/{entry}"] = whole(value.detach()).cpu()
    return state


def restore(
    model: GPT, optimizers: list[torch.optim.Optimizer], weights: dict[str, Tensor], memory: dict[str, Tensor]
) -> None:
    """Put saved weights and optimizer state into a model that may be divided over processes.

    Raises:
        GptlabError: the state is of another model or another optimizer.
    """
    with torch.no_grad():
        for name, tensor in model.tensors().items():
            tensor.copy_(like(weights[name], tensor))
    left = dict(memory)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                optimizer.state[parameter] = {}
    owner = {id(p): optimizer for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        entries = {key: left.pop(key) for key in list(left) if key.rpartition("/")[0] == name}
        if not entries:
            raise GptlabError(f"the saved training state has nothing on {name}: it is of another model or optimizer")
        for key, value in entries.items():
            if value.ndim and value.shape != parameter.shape:
                raise GptlabError(f"the saved training state has {key} of another shape than the model's {name}")
            placed = like(value, parameter) if value.ndim else value
            owner[id(parameter)].state[parameter][key.rpartition("/")[2]] = placed
    if left:
        raise GptlabError(f"the saved training state has {next(iter(left))}, which this model does not have")


def write_checkpoint(
    run: Path,
    config: ModelConfig,
    tokenizer: Tokenizer | None,
    weights: dict[str, Tensor],
    memory: dict[str, Tensor],
    facts: dict[str, Any],
    keep_last: int,
) -> Path:
    """Write one checkpoint, then remove those that are neither among the last nor the best.

    It is written under another name and moved into place when all of it is on disk.

    Args:
        run: the run's directory.
        config: of the model.
        tokenizer: written beside the weights.
        weights: from `model_state`.
        memory: from `optimizer_state`.
        facts: for `training.json`; ``step`` names the directory.
        keep_last: how many of the latest to keep.

    Raises:
        GptlabError: the disk is full, or the directory cannot be written; earlier checkpoints are unchanged.
    """
    final = run / FOLDER / f"step-{facts['step']:06d}"
    partial = final.with_name(f".{final.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        native.write(partial, checkpoints.Checkpoint(config, weights, tokenizer))
        tensors = {name: tensor.contiguous() for name, tensor in memory.items()}
        header = {"format": "gptlab training", "version": VERSION, **facts, "model_sha256": _model_sha256(partial)}
        about = json.dumps(header, indent=2).encode() + b"\n"
        sums = {
            "sha256": json.dumps({name: tensor_sha256(tensor) for name, tensor in tensors.items()}),
            "training.json": hashlib.sha256(about).hexdigest(),
        }
        write_files(
            partial,
            {"training.safetensors": lambda path: save_file(tensors, path, sums), "training.json": about},
        )
        if final.exists():  # an earlier, damaged one of the same step
            shutil.rmtree(final)
        os.replace(partial, final)
    except GptlabError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise GptlabError(
            f"{str(error).partition(';')[0]}; earlier checkpoints are unchanged: make room, then go on with"
            f" gptlab train --resume {run}"
        ) from None
    _remove_old(run, facts["step"], keep_last)
    return final


def _model_sha256(path: Path) -> str:
    """Return a hash of the weights in a model directory: of the checksums that the file carries."""
    return hashlib.sha256(open_safetensors(path / "model.safetensors")[1].get("sha256", "").encode()).hexdigest()


def _remove_old(run: Path, step: int, keep_last: int) -> None:
    there = run_checkpoints(run)
    past = [checkpoint for checkpoint in there if checkpoint.step <= step]
    staying = {best(past), *past[-keep_last:]}  # later ones are damaged: the run went on from before them
    for checkpoint in there:
        if checkpoint not in staying:
            # Renamed first: a removal that is cut off must not leave half a checkpoint under a checkpoint's name.
            doomed = checkpoint.path.with_name(f".{checkpoint.path.name}.removed")
            os.replace(checkpoint.path, doomed)
            shutil.rmtree(doomed, ignore_errors=True)
    for pattern in (".step-*.removed", ".step-*.partial"):  # what sudden ends left behind
        for rest in (run / FOLDER).glob(pattern):
            shutil.rmtree(rest, ignore_errors=True)


def read_checkpoint(path: Path) -> tuple[checkpoints.Checkpoint, dict[str, Tensor], dict[str, Any]]:
    """Read a checkpoint that `write_checkpoint` made: the model, the optimizers' state, the facts.

    Raises:
        GptlabError: something is missing, or fails its checksum.
    """
    facts = read_facts(path)
    if facts.get("version") != VERSION or not isinstance(facts.get("step"), int):
        raise GptlabError(f"{path / 'training.json'} is missing, damaged or of another version")
    model = checkpoints.read(path)
    about = hashlib.sha256((path / "training.json").read_bytes()).hexdigest()
    lazy, metadata = open_safetensors(path / "training.safetensors")
    try:
        sums = dict(json.loads(metadata["sha256"]))
    except (KeyError, TypeError, ValueError):
        raise GptlabError(f"{path / 'training.safetensors'} was not written by gptlab") from None
    if metadata.get("training.json") != about or facts.get("model_sha256") != _model_sha256(path):
        raise GptlabError(f"the files in {path} belong to different saves: weights and training state do not match")
    memory = {name: get().clone() for name, get in lazy.items()}
    for name, tensor in memory.items():
        if tensor_sha256(tensor) != sums.get(name):
            raise GptlabError(f"{path / 'training.safetensors'} is damaged: {name} fails its checksum")
    if memory.keys() != sums.keys():
        raise GptlabError(f"{path / 'training.safetensors'} is incomplete")
    return model, memory, facts


def read_latest(
    run: Path, say: Callable[[str], None]
) -> tuple[checkpoints.Checkpoint, dict[str, Tensor], dict[str, Any]] | None:
    """Read the latest checkpoint of a run that is intact; None where there is none at all.

    Args:
        run: the run's directory.
        say: told in a sentence of each one that is skipped because it is damaged.

    Raises:
        GptlabError: there are checkpoints, and all are damaged.
    """
    checkpoints = run_checkpoints(run)
    for checkpoint in reversed(checkpoints):
        try:
            return read_checkpoint(checkpoint.path)
        except GptlabError as error:
            say(f"skipping the checkpoint of step {checkpoint.step:,}: {error}")
    if checkpoints:
        raise GptlabError(f"every checkpoint of the run {run} is damaged; start it again with another --out")
    return None
