"""What a step does to the weights, and the learning rate it does it with."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from gptlab.training.settings import OptimizerSettings, ScheduleSettings


def make_optimizers(model: nn.Module, settings: OptimizerSettings) -> list[torch.optim.Optimizer]:
    """Return the optimizers of a run: AdamW alone, or AdamW for embeddings, biases and norms and Muon for the rest.

    Matrices decay, biases and norms do not.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    matrices = [p for name, p in named if p.ndim == 2 and name.startswith("h.")]
    hidden = matrices if settings.name == "muon" else []
    taken = {id(p) for p in hidden}
    rest = [p for _, p in named if id(p) not in taken]
    groups = [
        {"params": [p for p in rest if p.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
    ]
    betas = (settings.beta1, settings.beta2)
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW([g for g in groups if g["params"]], lr=settings.learning_rate, betas=betas, fused=True)
    ]
    if hidden:
        optimizers.append(
            torch.optim.Muon(
                hidden,
                lr=settings.learning_rate,
                weight_decay=settings.weight_decay,
                momentum=settings.momentum,
                adjust_lr_fn="match_rms_adamw",
            )
        )
    return optimizers


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


def clip(parameters: list[nn.Parameter], most: float) -> Tensor:
    """Scale the gradients so that their norm over all parameters is at most ``most``; return the norm before."""
    norm = nn.utils.clip_grad_norm_(parameters, most)
    # Divided parameters (FSDP2) have a divided norm.
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm
