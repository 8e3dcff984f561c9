# Tiny models, tokens for them, and how they are compared.
from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from gptlab.config import ModelConfig
from gptlab.language_model import LanguageModel
from gptlab.model import GPT
from gptlab.model.cache import Cache
from gptlab.text.tokenizers import byte_tokenizer

LLAMA: dict[str, Any] = {"position": "rope", "norm": "rms", "mlp": "swiglu", "bias": False}


def disturb(model: GPT, noise: float, seed: int = 0) -> GPT:
    """Add normal noise to every parameter: biases and norms that are not 0 and 1, scores that are not flat."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * noise)
    return model


def noisy(seed: int = 0, noise: float = 0.1, **overrides: Any) -> GPT:
    """A tiny model in eval mode, with weights and biases large enough for errors to show."""
    return disturb(GPT(ModelConfig.preset("tiny", **overrides), seed=seed).eval(), noise, seed)


def tiny_lm(seed: int = 0, **overrides: Any) -> LanguageModel:
    """A tiny model whose text is bytes."""
    config = ModelConfig.preset("tiny", **{"vocab_size": 257, **overrides})
    return LanguageModel(GPT(config, seed=seed), byte_tokenizer())


lively = functools.partial(noisy, noise=0.2)
"""As `noisy`: scores, biases and norms are large enough to matter to a conversion."""


def random_ids(model: GPT | int, batch: int = 3, length: int = 40, seed: int = 0) -> Tensor:
    """Tokens (batch, length) of a model's vocabulary, or of one of so many."""
    vocab_size = model if isinstance(model, int) else model.config.vocab_size
    return torch.randint(vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


def in_chunks(model: GPT, ids: Tensor, sizes: list[int], cache: Cache) -> Tensor:
    """The logits of ids that are read in chunks of these sizes."""
    return torch.cat([model(chunk, cache=cache) for chunk in ids.split(sizes, dim=1)], 1)


def same_state(one: GPT, other: GPT) -> bool:
    """Every tensor of both is the same, bit for bit."""
    a, b = one.tensors(), other.tensors()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    """The same shape and dtype, and no element further apart than the tolerance."""
    torch.testing.assert_close(actual, expected, rtol=0.0, atol=tolerance)


def near(actual: Tensor | None, expected: Tensor, relative: float) -> None:
    """Within a share of the largest element expected, which is of float64."""
    assert actual is not None
    assert actual.shape == expected.shape
    scale = expected.abs().max().item() or 1.0
    assert (actual.detach().double() - expected).abs().max().item() <= relative * scale
