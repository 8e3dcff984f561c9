"""How many tokens a model has seen: what the share of a budget is a share of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gptlab.checkpoints import read_config
from gptlab.checkpoints.hub import locate
from gptlab.checkpoints.runs import read_facts
from gptlab.errors import GptlabError
from gptlab.training.recipe import Recipe, make_recipe


def with_count(recipe: Recipe, saved: Recipe | None = None) -> Recipe:
    """Return the recipe with `budget.of` filled in where its budget is a share of what the base was trained on.

    Args:
        recipe: as the user gave it.
        saved: of the run that is resumed; it has asked the base already.

    Raises:
        GptlabError: nobody knows the number.
    """
    budget = recipe.budget
    if budget.share is None or budget.of is not None:
        return recipe
    count = None if saved is None else saved.budget.of
    if count is None and recipe.base is not None:
        count = tokens_trained(recipe.base)
    if count is None:
        of = "a model that starts from random weights" if recipe.base is None else f"what {recipe.base} was trained on"
        raise GptlabError(
            f"budget.share={budget.share} is a share of {of}, which is not known here; state the tokens of its"
            " pre-training with --set budget.of=..., or give budget.tokens instead"
        )
    return recipe.model_copy(update={"budget": budget.model_copy(update={"of": count})})


def tokens_trained(name: str) -> int | None:
    """Return the tokens that a model was trained on, all of its trainings together, or None where nothing tells.

    A published model tells it in ``card.json``, a converted one too; a run's checkpoint by its recipe and its step.

    Args:
        name: as for `gptlab.load`.

    Raises:
        GptlabError: no such model.
    """
    directory = locate(name)
    card = _read(directory / "card.json").get("tokens_trained")
    if isinstance(card, int):
        return card
    facts = read_facts(directory)
    if not isinstance(facts.get("step"), int) or not isinstance(facts.get("recipe"), dict):
        return None
    recipe = make_recipe(facts["recipe"])
    length = recipe.length(read_config(directory))
    own = int(facts["step"]) * recipe.batch.size * length
    if recipe.base is None:
        return own
    try:
        before = tokens_trained(recipe.base)
    except GptlabError:  # moved, or not here
        return None
    return None if before is None else before + own


def _read(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}
