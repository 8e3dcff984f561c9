"""What the layers of a model read: first and second moments of the inputs of their attention.

A conversion disturbs a layer least when it knows which directions of its input carry variance. `collect_statistics`
measures that on a calibration text; `assumed_statistics` says what the layer norm alone guarantees.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gptlab.errors import GptlabError
from gptlab.model.gpt import GPT, Block, LayerNorm

BATCH_TOKENS = 1024
"""Tokens that go through the model at once."""


@dataclass(frozen=True)
class Moments:
    """The inputs z of one layer's ``c_attn``, over all tokens of a text; float64 on the CPU.

    Attributes:
        mean: (C,) E[z].
        covariance: (C, C) E[(z - mean)(z - mean)^T].
        tokens: how many z they were taken from; 0 where they are assumed.
    """

    mean: Tensor
    covariance: Tensor
    tokens: int

    @property
    def centred(self) -> Tensor:
        """(C + 1, C + 1): the covariance of [z; 1], whose last row and column are 0."""
        return torch.block_diag(self.covariance, self.covariance.new_zeros(1, 1))

    @property
    def uncentred(self) -> Tensor:
        """(C + 1, C + 1): the second moment E[[z; 1][z; 1]^T]."""
        one = torch.cat([self.mean, self.mean.new_ones(1)])
        return self.centred + torch.outer(one, one)


def assumed_statistics(block: Block) -> Moments:
    """Return the moments of a layer norm's output if its normalised channels were uncorrelated.

    With scale g and shift b, z = g * n + b, and n has mean 0 over its channels and mean square 1: the covariance is
    diag(g) (I - 1 1^T / C) diag(g), the mean b.
    """
    scale = block.ln_1.weight.detach().double().cpu()
    bias = block.ln_1.bias if isinstance(block.ln_1, LayerNorm) else None
    mean = torch.zeros_like(scale) if bias is None else bias.detach().double().cpu()
    return Moments(mean, scale.square().diag(), 0)


def collect_statistics(model: GPT, rows: Tensor | Sequence[Tensor]) -> list[Moments]:
    """Measure the moments of every layer's attention inputs on a calibration text, accumulated in float64.

    With few tokens the covariance has directions without variance, which a conversion would think free. So
    `assumed_statistics` are mixed in as if they came from C tokens more. (On the built-in model, 192 wide, with 64 to
    8,192 tokens: the loss that a conversion adds is within 4% of the least over weights of 1, 8, 48, 192 and 768.)

    Args:
        model: as it is before any conversion.
        rows: (N, T) int64 token ids, or sequences (T,) of any lengths. Rows as long as the context are best: what a
            layer reads depends on the position.

    Raises:
        GptlabError: no tokens.
    """
    width = model.config.n_embd
    count = 0
    sums = [torch.zeros(width, dtype=torch.float64) for _ in model.blocks]
    squares = [torch.zeros(width, width, dtype=torch.float64) for _ in model.blocks]
    shifts = [assumed_statistics(block) for block in model.blocks]

    def add(layer: int, inputs: Tensor) -> None:
        # Around a fixed point near the mean, so that no digits are lost to it.
        z = inputs.flatten(0, 1).double().cpu() - shifts[layer].mean
        sums[layer] += z.sum(0)
        squares[layer] += z.T @ z

    for ids in batches(rows):
        count += ids.numel()
        visit_inputs(model, ids, add)
    if count == 0:
        raise GptlabError("the calibration text is empty; give it at least one token")
    moments = []
    for assumed, total, square in zip(shifts, sums, squares, strict=True):
        mean = total / (count + width)
        covariance = (square + width * assumed.covariance) / (count + width) - torch.outer(mean, mean)
        moments.append(Moments(assumed.mean + mean, covariance, count))
    return moments


def batches(rows: Tensor | Sequence[Tensor], tokens: int = BATCH_TOKENS) -> Iterator[Tensor]:
    """Yield (B, T) batches of neighbouring rows of equal length, of about so many tokens."""
    batch: list[Tensor] = []
    for row in rows:
        if not len(row):
            continue
        if batch and (len(batch[0]) != len(row) or (len(batch) + 1) * len(row) > tokens):
            yield torch.stack(batch)
            batch = []
        batch.append(row)
    if batch:
        yield torch.stack(batch)


@torch.no_grad()
def visit_inputs(model: GPT, ids: Tensor, visit: Callable[[int, Tensor], None]) -> None:
    """Run token ids (B, T) through a model, dropout off, and call ``visit(layer, z)`` with what each attention reads.

    Args:
        model: any.
        ids: (B, T) int64; moved to the model's device.
        visit: gets the index of a layer and its z (B, T, C) float32, the output of ``ln_1``.
    """
    handles = [
        block.ln_1.register_forward_hook(lambda _module, _inputs, z, layer=layer: visit(layer, z))
        for layer, block in enumerate(model.blocks)
    ]
    training = model.training
    model.eval()
    try:
        model(ids.to(model.wte.weight.device), head=lambda hidden, _: hidden)
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
