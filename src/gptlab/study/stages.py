"""What a study keeps of its work: each result under a key made of everything that it depends on.

A result is computed once; whatever interrupts a study, or changes in its file, leaves the results of the rest usable.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch

from gptlab.checkpoints.files import write_files
from gptlab.training.recipe import Recipe

CODE = {"train": 1, "evaluate": 1, "measure": 1, "convert": 2}
"""Versions of what the stages compute: raised by hand when the same inputs would give other numbers."""
FIRST: dict[str, tuple[str, ...]] = {
    "base": (),
    "model": (),
    "tokenizer": ("kind", "vocab_size"),
    "data": ("corpus", "held_out", "items", "documents"),
    "batch": ("size", "micro"),
    "optimizer": ("name", "learning_rate", "weight_decay", "beta1", "beta2", "momentum", "clip_norm"),
    "schedule": ("kind", "warmup_steps", "final_share", "decay_share"),
    "budget": ("steps", "tokens", "epochs"),
    "train": ("seed", "dtype", "compile", "recompute", "evaluate_every", "evaluate_tokens", "save_every", "keep_last"),
    "parallel": (),
}
"""The settings that recipes had when studies were first kept. Any other counts only where it is not at its default."""


def plain(recipe: Recipe) -> dict[str, Any]:
    """Return a recipe as plain values that do not change when recipes are given further settings."""
    usual = Recipe().model_dump(mode="json")
    found: dict[str, Any] = {}
    for section, values in recipe.model_dump(mode="json").items():
        before, known = usual.get(section), FIRST.get(section)
        if known and isinstance(values, dict):
            found[section] = {n: v for n, v in values.items() if n in known or v != (before or {}).get(n)}
        elif known is not None or values != before:
            found[section] = values
    return found


def key(stage: str, **what: Any) -> str:
    """Return a short name for a result of a stage, from all that it depends on.

    The stage's version, torch's version and the number of threads are always part of it.
    """
    whole = {
        "stage": stage,
        "code": CODE[stage],
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        **what,
    }
    return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()[:20]


def cached(directory: Path, name: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return the JSON object kept under a name, or compute and keep it. One that cannot be read is computed again."""
    path = directory / f"{name}.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(values, dict):
            return values
    except (OSError, ValueError):
        pass
    # What JSON makes of the values is returned in any case, so that a result does not depend on whether it was kept.
    content = json.dumps(compute()).encode()
    write_files(directory, {path.name: content + b"\n"})
    return cast(dict[str, Any], json.loads(content))
