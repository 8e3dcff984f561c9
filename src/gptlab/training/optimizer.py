"""What a step does to the weights, and the learning rate it does it with."""

from __future__ import annotations

import math
import re
from typing import Any

import torch
from torch import Tensor, nn

from gptlab.training.settings import OptimizerSettings, ScheduleSettings

ATTENTION = re.compile(r"\bh\.\d+\.(ln_1|attn)\.")
"""Names of the parameters of attention: the layer norm that it reads through, and its projections."""


def make_optimizers(model: nn.Module, settings: OptimizerSettings) -> list[torch.optim.Optimizer]:
    """Return the optimizers of a run: AdamW alone, or AdamW for embeddings, biases and norms and Muon for the rest.

    Matrices decay, biases and norms do not. Every group of parameters has a ``factor``, by which its learning rate
    differs from the run's.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    hidden = {name for name, p in named if p.ndim == 2 and name.startswith("h.") and settings.name == "muon"}
    betas = (settings.beta1, settings.beta2)
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(_groups([(n, p) for n, p in named if n not in hidden], settings), betas=betas, fused=True)
    ]
    if hidden:
        groups = _groups([(n, p) for n, p in named if n in hidden], settings)
        optimizers.append(torch.optim.Muon(groups, momentum=settings.momentum, adjust_lr_fn="match_rms_adamw"))
    return optimizers


def _groups(named: list[tuple[str, nn.Parameter]], settings: OptimizerSettings) -> list[dict[str, Any]]:
    """Return parameters in one group for each pair of a weight decay and a factor."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, p in named:
        factor = settings.attention_factor if ATTENTION.search(name) else 1.0
        groups.setdefault((settings.weight_decay if p.ndim >= 2 else 0.0, factor), []).append(p)
    return [
        {"params": parameters, "weight_decay": decay, "factor": factor, "lr": factor * settings.learning_rate}
        for (decay, factor), parameters in groups.items()
    ]


def learning_rate_share(settings: ScheduleSettings, step: int, steps: int) -> float:
    """Return the learning rate of a step as a share of the full one.

    Args:
        settings: the schedule.
        step: from 0.
        steps: of the whole run.
    """
    if step < settings.warmup_steps:
        return (step + 1) / settings.warmup_steps
    left = max(steps - settings.warmup_steps, 1)
    share = (step - settings.warmup_steps) / left
    match settings.kind:
        case "cosine":
            height = 0.5 * (1 + math.cos(math.pi * share))
        case "wsd":
            height = min((1 - share) / settings.decay_share, 1.0)
        case "constant":
            return 1.0
    return settings.final_share + height * (1 - settings.final_share)


def cut_warmup(settings: ScheduleSettings, steps: int) -> str | None:
    """Return a sentence where a run is over before its warm-up is; None where it is not."""
    if settings.warmup_steps < steps:
        return None
    reached = learning_rate_share(settings, steps - 1, steps)
    ends = "the learning rate reaches" + (f" {reached:.1%} of its full height" if reached < 1 else " its full height")
    return (
        f"the run's {steps:,} steps are all warm-up (schedule.warmup_steps={settings.warmup_steps:,}): {ends} in the"
        f" last one; to warm up for a tenth of the run, --set schedule.warmup_steps={steps // 10}"
    )


def clip(parameters: list[nn.Parameter], most: float) -> Tensor:
    """Scale the gradients so that their norm over all parameters is at most ``most``; return the norm before."""
    norm = nn.utils.clip_grad_norm_(parameters, most)
    # Divided parameters (FSDP2) have a divided norm.
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm
