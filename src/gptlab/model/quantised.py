"""Weights in 8 or 4 bits: what `Linear` and the embedding become, and the way there.

int8 has one factor per row of a weight matrix (per output), int4 one per 32 weights of a row; weights are whole numbers
times their factor, symmetric about 0. Biases, norms and positions stay as they are. What it costs in loss is measured:
docs/performance.md.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gptlab.model.gpt import GPT
from gptlab.model.linear import Linear, fast_bfloat16

Bits = Literal[8, 4]
Product = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""Activations (..., n_in), ``weight``, ``factors`` and bias (n_out,) float32 or None -> (..., n_out) float32."""
GROUP = 32
"""Weights that share a factor in 4 bits."""
PIECE = 2**20
"""Weights that are floats at a time in plain PyTorch on the CPU, so that a large matrix never is as a whole."""


def quantise(weight: Tensor, bits: Bits) -> tuple[Tensor, Tensor]:
    """Round a weight matrix to whole numbers times factors.

    Args:
        weight: (n_out, n_in).
        bits: 8, or 4 where ``n_in`` is a multiple of `GROUP`.

    Returns:
        int8 (n_out, n_in) and float32 (n_out,); or for 4 bits int8 (n_out, n_in / 2), byte i of each 16 holding weight
        i of a group plus 8 in its lower half, weight i + 16 plus 8 in its upper, and float32 (n_out, n_in / 32).
    """
    weight = weight.float()
    if bits == 8:
        factors = weight.abs().amax(1) / 127
        return (weight / factors.clamp(min=1e-30)[:, None]).round().to(torch.int8), factors
    groups = weight.unflatten(1, (-1, GROUP))
    factors = _best_factors(groups)
    whole = (groups / factors[..., None]).round().clamp(-8, 7).to(torch.int16) + 8
    return (whole[..., :16] | whole[..., 16:] << 4).to(torch.uint8).view(torch.int8).flatten(1), factors


def _best_factors(groups: Tensor) -> Tensor:
    """Return the factor (..., 1 per group) with the least squared error among those that use most of -8 ... 7."""
    # The largest weight becomes -8, which is one step more than 7, so its sign decides the factor's.
    extreme = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    best, least = torch.ones_like(extreme[..., 0]), torch.full_like(extreme[..., 0], torch.inf)
    for end in (-8.0, -7.6, -7.2, -6.8, -6.4):
        factors = extreme / end
        factors = torch.where(factors == 0, torch.ones_like(factors), factors)
        error = ((groups / factors).round().clamp(-8, 7) * factors - groups).square().sum(-1)
        better = error < least
        best, least = torch.where(better, factors[..., 0], best), torch.where(better, error, least)
    return best


def dequantise(weight: Tensor, factors: Tensor) -> Tensor:
    """Return the float32 (n_out, n_in) that `quantise`'s result stands for."""
    if factors.dim() == 1:
        return weight.float() * factors[:, None]
    halves = weight.view(torch.uint8).unflatten(1, (-1, GROUP // 2)).to(torch.int16)
    groups = torch.cat([halves & 15, halves >> 4], dim=-1) - 8  # (n_out, n_in / 32, 32)
    return (groups.float() * factors[..., None]).flatten(1)


def multiply(x: Tensor, weight: Tensor, factors: Tensor, bias: Tensor | None) -> Tensor:
    """Multiply in plain PyTorch, on every device: a `Product`. The weights become floats again."""
    n = max(PIECE // x.shape[-1], 1) if x.device.type == "cpu" else len(weight)
    if n >= len(weight):
        y = _multiply(x, weight, factors)
    else:
        y = x.new_empty(*x.shape[:-1], len(weight), dtype=torch.float32)
        for start in range(0, len(weight), n):
            part = slice(start, start + n)
            y[..., part] = _multiply(x, weight[part], factors[part])
    return y if bias is None else y + bias


def _multiply(x: Tensor, weight: Tensor, factors: Tensor) -> Tensor:
    if not fast_bfloat16():
        return F.linear(x.float(), dequantise(weight, factors))
    if factors.dim() == 1:  # int8 is exact in bfloat16, so the factors can wait
        return F.linear(x.bfloat16(), weight.bfloat16()).float() * factors
    return F.linear(x.bfloat16(), dequantise(weight, factors).bfloat16()).float()


_product: ContextVar[Product] = ContextVar("product", default=multiply)


@contextlib.contextmanager
def multiplied_by(product: Product) -> Iterator[None]:
    """Compute every `QuantisedLinear` by another product inside the ``with`` block, in this thread."""
    before = _product.set(product)
    try:
        yield
    finally:
        _product.reset(before)


class Quantised(nn.Module):
    """A matrix in whole numbers: ``weight`` and ``factors`` as `quantise` returns them."""

    weight: Tensor
    factors: Tensor

    def __init__(self, weight: Tensor, factors: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("factors", factors)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Quantised:
        """Move the module, or cast what it holds besides: factors stay float32."""
        factors = self.factors
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.factors = factors.to(self.factors.device)
        return self

    @property
    def n_in(self) -> int:
        """Columns of the matrix that the weights stand for."""
        return self.weight.shape[1] if self.factors.dim() == 1 else 2 * self.weight.shape[1]


class QuantisedLinear(Quantised):
    """`Linear` with its weights in whole numbers, multiplied by `multiply` or as `multiplied_by` says.

    Attributes:
        weight, factors: as `quantise` returns them.
        bias: (n_out,) or None.
    """

    def __init__(self, weight: Tensor, factors: Tensor, bias: nn.Parameter | None = None) -> None:
        super().__init__(weight, factors)
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out) float32
        bias = None if self.bias is None else self.bias.float()
        return _product.get()(x, self.weight, self.factors, bias)


class QuantisedEmbedding(Quantised):
    """The token embedding, in the same whole numbers as an output head that is tied to it."""

    def forward(self, ids: Tensor) -> Tensor:  # (...) -> (..., C) float32
        return dequantise(self.weight[ids.flatten()], self.factors[ids.flatten()]).unflatten(0, ids.shape)


def bits_of(model: GPT) -> Bits | None:
    """Return the bits of a quantised model, or None for one of floats."""
    if not isinstance(model.lm_head, Quantised):
        return None
    whole = all(module.factors.dim() == 1 for module in model.modules() if isinstance(module, Quantised))
    return 8 if whole else 4


def matrix(module: nn.Module) -> Tensor:
    """Return the float32 weights (n_out, n_in) of a `Linear` or an embedding, quantised or not."""
    if isinstance(module, Quantised):
        return dequantise(module.weight, module.factors)
    return cast(Tensor, module.weight).float()


def quantise_model(model: GPT, bits: Bits) -> None:
    """Round the weights of every projection, of the output head and of the token embedding.

    In 4 bits, a matrix whose rows are no multiple of `GROUP` is kept in 8.
    """

    def rounded(name: str, weight: Tensor) -> tuple[Tensor, Tensor]:
        return quantise(weight, bits if weight.shape[1] % GROUP == 0 else 8)

    with torch.no_grad():
        _replace(model, rounded)


def restore(model: GPT, tensors: Mapping[str, Tensor]) -> None:
    """Give a model of this configuration, on the meta device, the tensors of a quantised one (`GPT.tensors`)."""
    _replace(model, lambda name, _: (tensors[f"{name}.weight"], tensors[f"{name}.factors"]))
    model.load_state_dict(tensors, strict=not model.config.tie_embeddings, assign=True)


def _replace(model: GPT, whole: Callable[[str, Tensor], tuple[Tensor, Tensor]]) -> None:
    for name, module in list(model.named_modules()):
        if name == "wte":
            embedding = whole(name, model.wte.weight)
            model.wte = cast(nn.Embedding, QuantisedEmbedding(*embedding))
        elif isinstance(module, Linear):
            tied = name == "lm_head" and model.config.tie_embeddings
            parent, _, child = name.rpartition(".")
            weights = embedding if tied else whole(name, module.weight)
            setattr(model.get_submodule(parent), child, QuantisedLinear(*weights, module.bias))
