"""The checkpoints of a training run: `checkpoints/step-N`, each a model directory that also holds the training's state.

`training.json` in each says at which step it was written and what the model's loss on the validation stream was.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptlab.errors import GptlabError

FOLDER = "checkpoints"
_NAME = re.compile(r"step-(\d+)")


@dataclass(frozen=True)
class RunCheckpoint:
    """One checkpoint of a run.

    Attributes:
        path: its directory.
        step: steps taken when it was written.
        validation_loss: nats per token, or None where it was written without an evaluation.
    """

    path: Path
    step: int
    validation_loss: float | None


def is_run(directory: str | Path) -> bool:
    """Was this directory made by `gptlab train`?"""
    return Path(directory, "run.json").is_file() or Path(directory, FOLDER).is_dir()


def read_run(run: str | Path) -> dict[str, Any]:
    """Return what `run.json` says of a run: ``recipe``, and of ``data`` the ``path`` and ``sha256``.

    Raises:
        GptlabError: there is none, or it is damaged.
    """
    run = Path(run)
    try:
        about = json.loads((run / "run.json").read_text(encoding="utf-8"))
        data = {name: str(about["data"][name]) for name in ("path", "sha256")}
        return {"recipe": dict(about["recipe"]), "data": data}
    except FileNotFoundError:
        raise GptlabError(f"{run} holds no run (no run.json); name the directory that --out was given") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise GptlabError(f"{run / 'run.json'} cannot be read ({error}); restore it") from None


def run_checkpoints(run: str | Path) -> list[RunCheckpoint]:
    """Return the checkpoints of a run by step; one whose `training.json` cannot be read counts without a loss."""
    checkpoints = []
    for path in Path(run, FOLDER).glob("step-*"):
        name = _NAME.fullmatch(path.name)
        if name is not None:
            loss = read_facts(path).get("validation_loss")
            checkpoints.append(RunCheckpoint(path, int(name[1]), loss if isinstance(loss, float) else None))
    return sorted(checkpoints, key=lambda checkpoint: checkpoint.step)


def read_facts(path: Path) -> dict[str, Any]:
    """Return the contents of a checkpoint's `training.json`; empty when it is missing or damaged."""
    try:
        facts = json.loads((path / "training.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return facts if isinstance(facts, dict) else {}


def best(checkpoints: list[RunCheckpoint]) -> RunCheckpoint | None:
    """Return the checkpoint with the lowest validation loss, the earliest of equals; None where none has one."""
    measured = [c for c in checkpoints if c.validation_loss is not None and c.validation_loss == c.validation_loss]
    return min(measured, key=lambda c: (c.validation_loss, c.step), default=None)


def model_of(run: str | Path, which: str = "best") -> Path:
    """Return the model directory that stands for a run.

    Args:
        run: the run's directory.
        which: ``best`` by validation loss (the last where none was measured), or ``last``.

    Raises:
        GptlabError: the run has no checkpoint yet, or ``which`` is something else.
    """
    checkpoints = run_checkpoints(run)
    if not checkpoints:
        raise GptlabError(
            f"the run {run} has no checkpoint yet; wait for its first evaluation, or go on with it: gptlab train"
            f" --resume {run}"
        )
    match which:
        case "best":
            return (best(checkpoints) or checkpoints[-1]).path
        case "last":
            return checkpoints[-1].path
    raise GptlabError(f"{run}@{which}: after @ comes best or last; a single step is {Path(run, FOLDER)}/step-N")
