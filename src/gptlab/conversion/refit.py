"""The output projections of a converted model chosen again, in closed form: repair without training.

Whatever a conversion did to the attention of a layer, the matrix behind it is free: ``c_proj`` can be set so that the
layer adds to the residual stream what it added in the source, as nearly as its heads now allow. That is a linear
regression. With f (H D + 1,) the outputs of the converted heads at a token, and a 1, and y (C,) what the source's
attention adds there,

    minimise over W (C, H D + 1)    sum over tokens |y - W f|^2 + lambda |W - W_0|^2

where W_0 is the projection as it is. On the tokens of the fit that is never worse than W_0. On others it may be, where
W_0 was nearly right and tokens are few; so each layer's lambda is the one of `RIDGES` with which a fit on one half of
the tokens does best on the other, both ways, and a layer that no fit helps is left as it is. Layers are fitted from the
first to the last, each on what reaches it from those before.

Related: layers reconstructed after pruning (He et al. 2017, *Channel Pruning*).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gptlab.conversion.layers import rebuild
from gptlab.conversion.statistics import batches
from gptlab.errors import GptlabError
from gptlab.model.gpt import GPT
from gptlab.model.linear import Linear

RIDGES = (0.3, 3.0, 30.0, 300.0)
"""lambda as a multiple of what C tokens of average size would add."""


@torch.no_grad()
def refit_outputs(source: GPT, converted: GPT, rows: Tensor | Sequence[Tensor]) -> GPT:
    """Return a copy of a converted model whose ``c_proj`` are fitted to the source's attention on a calibration text.

    The residual streams of both models are kept for the whole text: 8 C bytes per token.

    Args:
        source: the model as it was.
        converted: what a conversion made of it; any that kept the number and the width of layers.
        rows: (N, T) int64 token ids, or sequences (T,) of any lengths.

    Raises:
        GptlabError: no tokens, or models of different depth or width.
    """
    for name in ("n_layer", "n_embd", "vocab_size"):
        if getattr(source.config, name) != getattr(converted.config, name):
            raise GptlabError(
                f"the models differ in {name}, {getattr(source.config, name)} and {getattr(converted.config, name)};"
                " the second must be a conversion of the first"
            )
    new = rebuild(converted, lambda _, heads: heads)
    modes = source.training, new.training
    source.eval(), new.eval()
    device = source.wte.weight.device
    old = [source.embed(ids.to(device), None, None, None) for ids in batches(rows)]
    mine = [new.embed(ids.to(device), None, None, None) for ids in batches(rows)]
    if not old:
        raise GptlabError("the calibration text is empty; give it at least one token")
    for before, after in zip(source.blocks, new.blocks, strict=True):
        projection = after.attn.c_proj
        inputs: list[Tensor] = []
        handle = projection.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))  # noqa: B023
        halves = Sums.of(projection), Sums.of(projection)
        for i, ((x, where, rotary), (z, place, rotation)) in enumerate(zip(old, mine, strict=True)):
            y = before.attn(before.ln_1(x), where, rotary).flatten(0, 1)
            after.attn(after.ln_1(z), place, rotation)
            f = inputs.pop().flatten(0, 1)
            # Early and late positions to each half in turn.
            middle = len(f) // 2
            halves[i % 2].add(f[:middle], y[:middle])
            halves[1 - i % 2].add(f[middle:], y[middle:])
        handle.remove()
        fitted = _fit(*halves)
        if fitted is not None:
            projection.weight.copy_(fitted[:, : projection.weight.shape[1]])
            if projection.bias is not None:
                projection.bias.copy_(fitted[:, -1])
        old = [(before(x, where, rotary), where, rotary) for x, where, rotary in old]
        mine = [(after(z, place, rotation), place, rotation) for z, place, rotation in mine]
    source.train(modes[0])
    return new.train(modes[1])


@dataclass
class Sums:
    """What a regression on f of what W_0 f lacks of y needs of the tokens; float64 on the CPU.

    Attributes:
        start: (C, N) W_0, with its bias as last column where there is one.
        biased: whether there is one.
        gram: (N, N) sum of f f^T.
        products: (N, C) sum of f (y - W_0 f)^T.
        tokens: how many.
    """

    start: Tensor
    biased: bool
    gram: Tensor
    products: Tensor
    tokens: int = 0

    @classmethod
    def of(cls, projection: Linear) -> Sums:
        """Return the sums over no tokens."""
        bias = projection.bias
        weight: Tensor = projection.weight
        start = (weight if bias is None else torch.cat([weight, bias[:, None]], 1)).double().cpu()
        return cls(start, bias is not None, start.new_zeros(start.shape[1], start.shape[1]), torch.zeros_like(start.T))

    def __add__(self, other: Sums) -> Sums:
        gram, products = self.gram + other.gram, self.products + other.products
        return Sums(self.start, self.biased, gram, products, self.tokens + other.tokens)

    def add(self, f: Tensor, y: Tensor) -> None:
        """Take tokens: f (n, H D), y (n, C)."""
        f, y = f.double().cpu(), y.double().cpu()
        if self.biased:
            f = torch.cat([f, f.new_ones(len(f), 1)], 1)
        self.gram += f.T @ f
        self.products += f.T @ (y - f @ self.start.T)
        self.tokens += len(f)

    def solve(self, ridge: float) -> Tensor:
        """Return the (N, C) step from W_0^T that is best with a ridge."""
        width = len(self.products) - self.biased
        weight = ridge * self.products.shape[1] * self.gram.diagonal()[:width].mean() / max(self.tokens, 1)
        # Heads that give nothing have nothing to fit.
        eye = torch.eye(len(self.gram), dtype=torch.float64) * weight.clamp(min=torch.finfo(torch.float64).tiny)
        return torch.linalg.solve(self.gram + eye, self.products)

    def gain(self, step: Tensor) -> Tensor:
        """Return by how much a step lowers the squared error on these tokens."""
        return 2 * (step * self.products).sum() - (step * (self.gram @ step)).sum()


def _fit(one: Sums, other: Sums) -> Tensor | None:
    """Return the new projection (C, N), or None where no ridge helps on the tokens that it was not fitted on."""
    gains = [(one.gain(other.solve(ridge)) + other.gain(one.solve(ridge))).item() for ridge in RIDGES]
    best = max(range(len(RIDGES)), key=gains.__getitem__)
    if not gains[best] > 0:
        return None
    return one.start + (one + other).solve(RIDGES[best]).T
