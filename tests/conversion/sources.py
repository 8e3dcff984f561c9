# What the tests of conversions share.
from __future__ import annotations

from typing import Any

import torch

from gptlab import GPT, ModelConfig

LLAMA: dict[str, Any] = {"position": "rope", "norm": "rms", "mlp": "swiglu", "bias": False}


def noisy(seed: int = 0, **overrides: Any) -> GPT:
    """A tiny model in eval mode, of 4 heads of 8, whose scores, biases and norms are large enough to matter."""
    model = GPT(ModelConfig.preset("tiny", **overrides), seed=seed).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model
