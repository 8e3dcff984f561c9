"""How converted models are uptrained: for a share of the tokens that the base was trained on.

A model is evaluated after smaller shares on the way as well, so that one run gives a curve.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from gptlab.errors import GptlabError
from gptlab.study.settings import UptrainSettings
from gptlab.training.recipe import Recipe, read_recipe

BASE = "base"
"""What a recipe calls the model that it continues from, and its teacher: the study's own base."""


@dataclass(frozen=True)
class Milestone:
    """A point of an uptraining at which the model is evaluated.

    Attributes:
        share: of the tokens that the base was trained on; 0 is right after the conversion.
        step: of the run.
        tokens: of uptraining so far.
    """

    share: float
    step: int
    tokens: int


START = Milestone(0.0, 0, 0)


@dataclass(frozen=True)
class Uptraining:
    """How a converted model is uptrained.

    Attributes:
        recipe: seed and budget aside.
        shares: after which to evaluate, ascending, all above 0; the last is the length of the run.
        pretraining_tokens: that the base was trained on, where the study states them.
        settings: of this variant alone.
    """

    recipe: Recipe
    shares: tuple[float, ...]
    pretraining_tokens: int | None = None
    settings: tuple[str, ...] = ()

    def milestones(self, length: int, tokens: int) -> tuple[Milestone, ...]:
        """Return where to evaluate, for windows of ``length`` tokens and a base trained on ``tokens`` tokens.

        Raises:
            GptlabError: two shares that come to the same step.
        """
        per_step = self.recipe.batch.size * length
        steps = [max(round(share * tokens / per_step), 1) for share in self.shares]
        for i, (before, after) in enumerate(itertools.pairwise(steps)):
            if before == after:
                raise GptlabError(
                    f"the shares {self.shares[i]} and {self.shares[i + 1]} of {tokens:,} tokens are as many steps of"
                    f" {per_step:,} tokens; leave one out, or lower batch.size"
                )
        return tuple(Milestone(share, n, n * per_step) for share, n in zip(self.shares, steps, strict=True))

    def run(self, seed: int, steps: int) -> Recipe:
        """Return the recipe of one run of so many steps."""
        train = self.recipe.train.model_copy(update={"seed": seed})
        budget = self.recipe.budget.model_copy(update={"steps": steps})
        return self.recipe.model_copy(update={"train": train, "budget": budget})


def read_uptraining(settings: UptrainSettings, own: Sequence[str], further: Sequence[str]) -> Uptraining:
    """Return how a variant is uptrained.

    Args:
        settings: of the study.
        own: settings of the variant.
        further: settings of the command line.

    Raises:
        GptlabError: an unknown setting (with the nearest right one), an impossible one, or one without effect.
    """
    budget: dict[str, str] = {}
    rest = []
    for setting in (*settings.set, *further, *own):
        name, _, value = (part.strip() for part in setting.partition("="))
        if name == "train.seed":
            raise GptlabError(f"{name} has no effect in a study, which has seeds of its own; leave it out")
        if name in ("budget.share", "budget.of"):
            budget[name] = value
        elif name.startswith("budget."):
            raise GptlabError(f"a study counts uptraining in shares, so {name} has no effect; set budget.share")
        else:
            rest.append(setting)
    recipe = read_recipe(settings.recipe, [*rest, "budget.steps=1"], base=BASE)
    tokens = _number("budget.of", budget["budget.of"]) if "budget.of" in budget else None
    whole = _number("budget.share", budget["budget.share"]) if "budget.share" in budget else max(settings.shares)
    if not 0 < whole <= 1:
        raise GptlabError(f"the share of the uptraining must lie between 0 and 1, got {whole}")
    shares = sorted({share for share in settings.shares if 0 < share < whole} | {whole})
    return Uptraining(recipe, tuple(shares), None if tokens is None else round(tokens), tuple(own))


def _number(name: str, text: str) -> float:
    try:
        return float(text.replace("_", ""))
    except ValueError:
        raise GptlabError(f"impossible value for {name} in the recipe: not a number, got {text!r}") from None
