"""A batch in plain PyTorch: prompts padded on the left, one cache for all, one forward pass a token."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gptlab.generation.memory import check_memory
from gptlab.model.gpt import GPT
from gptlab.model.linear import Linear
from gptlab.model.masks import PADDING

CHUNK = 512
"""Tokens of a prompt that are read at once."""
RESERVE = 64
"""New tokens that a cache has room for from the start; it grows with the text."""
FEWER = "continue fewer texts at a time, or shorter prompts"


def last_logits(hidden: Tensor, lm_head: Linear) -> Tensor:
    """A head for `GPT.forward`: logits of the last position only, (B, T, C) -> (B, V) float32."""
    return lm_head(hidden[:, -1]).float()


def nothing(hidden: Tensor, lm_head: Linear) -> None:
    """A head for reading a part of a prompt whose logits nobody needs."""


def pad_left(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Return ids (B, T) and their positions (B, T), or None for prompts of one length, which need no padding."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(row)) + list(row) for row in prompts], device=device)
    if all(len(row) == longest for row in prompts):
        return ids, None
    positions = [[PADDING] * (longest - len(row)) + list(range(len(row))) for row in prompts]
    return ids, torch.tensor(positions, device=device)


@contextlib.contextmanager
def evaluating(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Switch dropout off inside the ``with`` block; every module is left as it was. Cheap: it runs once a token."""
    training = [module for module in modules if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


class Padded:
    """Decodes on every device and for every dtype.

    Args:
        model: what computes the logits, in eval mode for as long as it does.
        prompts: token ids of each row.
        length: most tokens that a row will have.
    """

    def __init__(self, model: GPT, prompts: Sequence[Sequence[int]], length: int) -> None:
        longest = max(map(len, prompts))
        self._model, self._modules = model, list(model.modules())
        self._ids, self._positions = pad_left(prompts, model.wte.weight.device)
        self._cache = model.make_cache(len(prompts), length, chunk=CHUNK, reserve=longest + RESERVE)

    def read(self) -> Tensor:
        """Read the prompts; return (B, V) float32 logits of what follows."""
        ids, positions = self._ids, self._positions
        rest = (ids.shape[1] - 1) // CHUNK * CHUNK
        for start in range(0, rest, CHUNK):
            part = slice(start, start + CHUNK)
            self._forward(ids[:, part], None if positions is None else positions[:, part], nothing)
        return self._forward(ids[:, rest:], None if positions is None else positions[:, rest:], last_logits)

    def step(self, tokens: Tensor) -> Tensor:
        """Read one more token (B,) of every row; return as `read`."""
        return self._forward(tokens[:, None], None, last_logits)

    def keep(self, rows: list[int]) -> None:
        """Go on with some rows only."""
        self._cache.keep(rows)

    def _forward(self, ids: Tensor, positions: Tensor | None, head: Any) -> Any:
        if more := self._cache.growth(ids.shape[1]):
            said = f"going on after {self._cache.layers[0].seen:,} tokens takes"
            check_memory(more, ids.device, said, FEWER)
        with evaluating(self._modules):
            return self._model(ids, positions=positions, cache=self._cache, head=head)
