"""How much a study has to train, said before it begins."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

import gptlab
from gptlab.study.making import Making, tokens_of
from gptlab.study.runs import RUNS, finished, run_key, with_seed
from gptlab.study.timing import timed, training_step
from gptlab.study.variants import Cell


def plan_row(study: str, n_variants: int, runs: Sequence[tuple[Cell, int]], making: Making) -> dict[str, Any]:
    """Return the event that tells how much there is to train, and about how long that will take.

    Args:
        study: its name.
        n_variants: that it has.
        runs: all variants that are trained, or trained on, with their seeds.
        making: what is made of the base; it knows where everything lies.
    """
    missing = [(cell, seed) for cell, seed in runs if not _done(cell, seed, making)]
    tokens = sum(_tokens(cell, making) for cell, _ in missing)
    return {
        "event": "plan",
        "study": study,
        "variants": n_variants,
        "runs": len(runs),
        "done": len(runs) - len(missing),
        "tokens": tokens,
        "seconds": tokens * _seconds_per_token(missing[0][0], making) if missing else 0.0,
    }


def _done(cell: Cell, seed: int, making: Making) -> bool:
    if cell.recipe is None:
        return making.done(cell, seed)
    assert making.dataset is not None
    run = making.out / RUNS / run_key(with_seed(cell.recipe, seed), making.dataset, making.device)
    return finished(run) is not None


def _tokens(cell: Cell, making: Making) -> int:
    if cell.uptrain is not None:
        return max(making.tokens(cell).values())
    return tokens_of(cell, making.configs[cell.name], making.dataset) or 0


def _seconds_per_token(cell: Cell, making: Making) -> float:
    """Time a few training steps."""
    recipe = cell.recipe if cell.uptrain is None else cell.uptrain.recipe
    assert recipe is not None
    device, config = torch.device(making.device), making.configs[cell.name]
    rows = recipe.batch.micro or recipe.batch.size
    step = training_step(gptlab.GPT(config).to(device), rows, recipe)
    step()
    return min(timed(step, device) for _ in range(2)) / (rows * config.context_length)
