"""How every function of this package runs a model: one text, dropout off, no gradients, the model left as it was."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from gptlab.errors import GptlabError
from gptlab.generation.padded import evaluating
from gptlab.model.gpt import GPT


@contextlib.contextmanager
def looking(model: GPT) -> Iterator[None]:
    """Compute without dropout and without gradients inside the ``with`` block."""
    with evaluating(list(model.modules())), torch.no_grad():
        yield


def as_row(model: GPT, ids: Tensor | Sequence[int], least: int = 1) -> Tensor:
    """Return the ids of one text, (T,), as (1, T) int64 on the model's device.

    Raises:
        GptlabError: not one text, not whole numbers, or fewer than ``least`` tokens.
    """
    row = ids if isinstance(ids, Tensor) else _tensor(ids)
    if row.ndim != 1 or row.is_floating_point() or row.dtype == torch.bool:
        raise GptlabError(
            f"ids must be the tokens of one text, (T,) int64, got shape {tuple(row.shape)} and {row.dtype};"
            " of a batch, take one row"
        )
    if len(row) < least:
        words = {1: "one token", 2: "two tokens: one to read and one to predict"}[least]
        raise GptlabError(f"ids must hold at least {words}, got {len(row)}")
    return row.to(model.wte.weight.device, torch.int64)[None]


def _tensor(ids: Any) -> Tensor:
    try:
        return torch.as_tensor(ids)
    except (TypeError, ValueError, RuntimeError):
        raise GptlabError(f"ids must be the tokens of one text, (T,) int64, got {type(ids).__name__}") from None


def check_index(end: int, index: Any, what: str) -> int:
    """Return an index below ``end``.

    Raises:
        GptlabError: it is not one.
    """
    if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < end:
        raise GptlabError(f"{what} must be 0 to {end - 1}, got {index!r}")
    return index
