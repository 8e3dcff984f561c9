"""What changes in a model while it is trained on after a conversion: its positions, and how far it sees.

All of it is a function of the step and the number of steps alone, as the learning rate is, so that a resumed run sees
the same.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from gptlab.config import ModelConfig
from gptlab.errors import GptlabError
from gptlab.model.gpt import GPT
from gptlab.training.recipe import Recipe
from gptlab.training.settings import BlendSettings, NarrowSettings

FIRST_SHARE = 2.0**-12
"""Where the angle of a pair begins to grow. It grows geometrically, since the harm does not grow with the angle: 256
tokens away, the mean cosine over the pairs is 0.83 at a hundredth of the angles, 0.62 at a tenth, 0.35 at all."""


def check_schedules(recipe: Recipe, config: ModelConfig) -> None:
    """Refuse schedules that a model has no use for.

    Raises:
        GptlabError: a blend for another position, or a narrowing that narrows nothing.
    """
    name = recipe.base or "the model"
    if recipe.blend is not None and config.position != "blend":
        raise GptlabError(
            f"the recipe blends positions, and {name} has position {config.position!r}; convert it to 'blend' first, or"
            " leave the section [blend] out"
        )
    if recipe.narrow is None:
        return
    longest, reach = _first(recipe.narrow, config), _reach(config)
    if longest > config.context_length:
        raise GptlabError(
            f"narrow.first={longest} exceeds the context of {config.context_length} tokens; leave it out to begin there"
        )
    if not reach:
        raise GptlabError(f"the recipe narrows windows, and {name} has none; leave the section [narrow] out")
    if longest <= min(reach):
        raise GptlabError(
            f"a first window of {longest} tokens is no wider than the {min(reach)} that {name} has; raise narrow.first,"
            " or leave the section [narrow] out"
        )


def settled(recipe: Recipe, step: int, steps: int) -> bool:
    """Is the model its final self after so many steps of the run?"""
    ends = [recipe.blend.rope_end, recipe.blend.wpe_end] if recipe.blend else []
    ends += [recipe.narrow.end] if recipe.narrow else []
    return all(step >= end * steps for end in ends)


def set_stage(model: GPT, recipe: Recipe, step: int, steps: int, *, training: bool) -> None:
    """Give a model the positions and the windows of one step.

    Args:
        model: changed in place.
        recipe: with the schedules.
        step: steps taken before.
        steps: of the whole run.
        training: else its own windows, whatever the step.
    """
    if recipe.blend is not None and model.config.position == "blend":
        angle_share, factor = blend_scales(recipe.blend, step / steps, model.config.head_dim // 2)
        with torch.no_grad():
            model.rope_scale.copy_(angle_share)
            model.wpe_scale.copy_(factor)
    if recipe.narrow is not None:
        windows = narrowed(recipe.narrow, model.config, step, steps) if training else model.config.windows
        for block, window in zip(model.blocks, windows, strict=True):
            block.attn.visibility = replace(block.attn.visibility, window=window)


def blend_scales(settings: BlendSettings, done: float, n_pairs: int) -> tuple[Tensor, Tensor]:
    """Return the factor on the angle of every pair (D/2,), and the one on the learned positions (), float32.

    Args:
        settings: the recipe's.
        done: share of the run that is over.
        n_pairs: D/2; the first pair rotates fastest.
    """
    share = done / settings.rope_end
    if settings.ramp == "geometric":
        shares = torch.full((n_pairs,), share, dtype=torch.float64)
    else:
        waiting = torch.arange(n_pairs - 1, -1, -1, dtype=torch.float64)  # pairs that are slower than this one
        shares = share * n_pairs - waiting
    angle_share = torch.where(shares < 0, 0.0, FIRST_SHARE ** (1 - shares.clamp(0, 1)))
    left = (settings.wpe_end - done) / (settings.wpe_end - settings.wpe_start)
    return angle_share.float(), torch.tensor(min(max(left, 0.0), 1.0))


def narrowed(settings: NarrowSettings, config: ModelConfig, step: int, steps: int) -> tuple[int | None, ...]:
    """Return the window of every layer in one step of a run.

    Args:
        settings: the recipe's.
        config: with the windows at the end; a layer without one never gets any.
        step: steps taken before.
        steps: of the whole run.
    """
    over = step / (settings.end * steps)
    if over >= 1:
        return config.windows
    longest = _first(settings, config)
    stages = settings.stages or max(math.ceil(math.log2(longest / min(_reach(config)))), 1)
    share = math.floor(over * stages) / stages  # geometrically, from the first window to a layer's own

    def window(own: int | None, dilation: int) -> int | None:
        if own is None:
            return None
        first = max(longest // dilation, own)
        return round(first ** (1 - share) * own**share)

    return tuple(window(own, dilation) for own, dilation in zip(config.windows, config.dilations, strict=True))


def _first(settings: NarrowSettings, config: ModelConfig) -> int:
    return settings.first or config.context_length


def _reach(config: ModelConfig) -> list[int]:
    """How many tokens the windows of a model reach back."""
    return [w * d for w, d in zip(config.windows, config.dilations, strict=True) if w is not None]
