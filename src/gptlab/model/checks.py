"""What `GPT.forward` refuses, in words, before torch would in its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gptlab.config import ModelConfig
from gptlab.errors import GptlabError
from gptlab.model.cache import Cache
from gptlab.model.masks import PADDING


def check_input(config: ModelConfig, ids: Any, positions: Any, documents: Any, cache: Cache | None) -> None:
    """Refuse ids (B, T), positions and documents that a model of this configuration cannot read.

    Values are looked at on the CPU alone: elsewhere that would mean to wait for the device, and in compiled code to
    leave it.

    Args:
        config: the architecture.
        ids: token ids.
        positions: where they stand, or None.
        documents: to what they belong, or None.
        cache: what holds the tokens before them, or None.

    Raises:
        GptlabError: wrong type or shape, no tokens, more than the context holds, a value out of range.
    """
    if not isinstance(ids, Tensor):
        raise GptlabError(
            f"ids must be a tensor (batch, tokens) of int64, got {type(ids).__name__}; use torch.tensor([ids])"
        )
    if ids.ndim != 2 or ids.dtype not in (torch.int64, torch.int32):
        raise GptlabError(
            f"ids must be (batch, tokens) of int64, got shape {tuple(ids.shape)} and {ids.dtype};"
            " for one sequence use torch.tensor([ids])"
        )
    n_tokens = ids.shape[1]
    if ids.numel() == 0:
        raise GptlabError(f"ids must hold at least one row and one token in each, got shape {tuple(ids.shape)}")
    for name, x in (("positions", positions), ("documents", documents)):
        if x is not None and not (isinstance(x, Tensor) and x.shape == ids.shape and x.dtype in _INTEGERS):
            said = f"shape {tuple(x.shape)} and {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
            raise GptlabError(f"{name} must be int64 of the shape of ids, {tuple(ids.shape)}, got {said}")
    seen = 0
    if cache is not None:
        cache.check_room(n_tokens)
        seen = cache.layers[0].seen
    if config.has_table and n_tokens + seen > config.context_length:
        raise GptlabError(
            f"{n_tokens + seen} tokens exceed the context of {config.context_length}"
            " learned positions; shorten the input"
        )
    _check_range("ids", ids, 0, config.vocab_size, "the vocabulary ends there; is this the model's own tokenizer?")
    if positions is not None and config.has_table:
        why = f"the learned positions end there ({PADDING} is padding)"
        _check_range("positions", positions, PADDING, config.context_length, why)


_INTEGERS = (torch.int64, torch.int32)


def _check_range(name: str, x: Tensor, least: int, end: int, why: str) -> None:
    if torch.compiler.is_compiling() or x.device.type != "cpu" or x.numel() == 0:
        return
    low, high = (int(value) for value in x.aminmax())
    if low < least or high >= end:
        raise GptlabError(f"{name} must be {least} to {end - 1}, got {low if low < least else high}: {why}")
