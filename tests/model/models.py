# What the tests of the model share.
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gptlab.config import ModelConfig
from gptlab.model import GPT


def noisy(seed: int = 0, **overrides: Any) -> GPT:
    """A tiny model in eval mode, with weights and biases large enough for errors to show."""
    model = GPT(ModelConfig.preset("tiny", **overrides), seed=seed).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def random_ids(model: GPT, batch: int, length: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(model.config.vocab_size, (batch, length), generator=generator)


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    """The same shape and dtype, and no element further apart than the tolerance."""
    torch.testing.assert_close(actual, expected, rtol=0.0, atol=tolerance)
