"""What the variants that are made by conversion come to: known before anything is trained.

Such a variant is the study's base, converted, and where the study has ``[uptrain]`` trained on: for a share of the
tokens that the base was trained on. The model is looked at after smaller shares on the way: one run gives a curve.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from gptlab.config import ModelConfig
from gptlab.conversion.changes import Changes, target
from gptlab.errors import GptlabError
from gptlab.study.files import UptrainSettings, VariantSettings
from gptlab.training.recipe import Recipe, read_recipe

BASE = "base"
"""What a recipe calls the model that it goes on from, and its teacher: the study's own base."""


@dataclass(frozen=True)
class Uptraining:
    """How a converted model is trained on.

    Attributes:
        recipe: seed and budget aside.
        shares: after which to look at the model, ascending, all above 0; the last is the length of the run.
        of: tokens that the base was trained on, where the study states them.
        own: settings of this variant alone.
    """

    recipe: Recipe
    shares: tuple[float, ...]
    of: int | None = None
    own: tuple[str, ...] = ()

    def steps(self, length: int, of: int) -> tuple[int, ...]:
        """Return the steps at which to look, for windows of ``length`` tokens and a base trained on ``of`` tokens.

        Raises:
            GptlabError: two shares that come to the same step.
        """
        step = self.recipe.batch.size * length
        found = tuple(max(round(share * of / step), 1) for share in self.shares)
        for i, (before, after) in enumerate(itertools.pairwise(found)):
            if before == after:
                raise GptlabError(
                    f"the shares {self.shares[i]} and {self.shares[i + 1]} of {of:,} tokens are as many steps of"
                    f" {step:,} tokens; leave one out, or lower batch.size"
                )
        return found

    def plan(self, seed: int, steps: Sequence[int]) -> Recipe:
        """Return the recipe of one run, which ends with the last of ``steps``."""
        train = self.recipe.train.model_copy(update={"seed": seed})
        budget = self.recipe.budget.model_copy(update={"steps": steps[-1]})
        return self.recipe.model_copy(update={"train": train, "budget": budget})


def read_changes(variant: VariantSettings) -> Changes:
    """Return what a variant converts the base into.

    Raises:
        GptlabError: an unknown key (with the nearest right one) or an impossible value, with the variant's name.
    """
    try:
        return Changes.from_dict(variant.convert or {})
    except GptlabError as error:
        raise GptlabError(f"variant {variant.name!r} is impossible: {error}") from None


def read_uptraining(settings: UptrainSettings, own: Sequence[str], further: Sequence[str]) -> Uptraining:
    """Return how a variant is trained on.

    Args:
        settings: of the study.
        own: settings of the variant.
        further: settings of the command line.

    Raises:
        GptlabError: an unknown setting (with the nearest right one), an impossible one, or one without effect.
    """
    found: dict[str, str] = {}
    rest = []
    for setting in (*settings.set, *further, *own):
        name, _, value = (part.strip() for part in setting.partition("="))
        if name == "train.seed":
            raise GptlabError(f"{name} has no effect in a study, whose seeds are named by themselves; leave it out")
        if name in ("budget.share", "budget.of"):
            found[name] = value
        elif name.startswith("budget."):
            raise GptlabError(f"a study counts uptraining in shares, so {name} has no effect; set budget.share")
        else:
            rest.append(setting)
    recipe = read_recipe(settings.recipe, [*rest, "budget.steps=1"], base=BASE)
    of = _number("budget.of", found["budget.of"]) if "budget.of" in found else None
    whole = _number("budget.share", found["budget.share"]) if "budget.share" in found else max(settings.shares)
    if not 0 < whole <= 1:
        raise GptlabError(f"the share to train on for must lie between 0 and 1, got {whole}")
    shares = sorted({share for share in settings.shares if 0 < share < whole} | {whole})
    return Uptraining(recipe, tuple(shares), None if of is None else round(of), tuple(own))


def _number(name: str, text: str) -> float:
    try:
        return float(text.replace("_", ""))
    except ValueError:
        raise GptlabError(f"impossible value for {name} in the recipe: not a number, got {text!r}") from None


def converted_config(name: str, base: ModelConfig, changes: Changes, uptrain: Uptraining | None) -> ModelConfig:
    """Return the architecture that a variant ends with.

    Raises:
        GptlabError: an impossible conversion, with the variant's name.
    """
    try:
        found = target(base, changes)
    except GptlabError as error:
        raise GptlabError(f"variant {name!r} is impossible: {error}") from None
    if found.position != "blend":
        return found
    if uptrain is None or uptrain.recipe.blend is None:
        raise GptlabError(
            f"variant {name!r} is impossible: position 'blend' becomes 'rope' by training on, with a schedule of its"
            ' own; add [uptrain], and uptrain = ["blend.ramp=geometric"] to the variant'
        )
    return ModelConfig.from_dict({**found.to_dict(), "position": "rope"})
