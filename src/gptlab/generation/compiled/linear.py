"""Products of whole numbers by the C++ of this directory, by which prompts are read."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from gptlab.generation.compiled import step
from gptlab.generation.compiled.layout import describe
from gptlab.generation.compiled.library import library
from gptlab.model import quantised


def multiply(x: Tensor, weight: Tensor, factors: Tensor, bias: Tensor | None) -> Tensor:
    """Multiply on the CPU, in the whole numbers of the decoding step: see `gptlab.model.quantised.Product`.

    There is no gradient. Where PyTorch is faster, it multiplies.

    Raises:
        NoLibraryError: the C++ cannot be built here.
        MemoryError: there is not enough memory.
    """
    if not library().gptlab_linear_is_fast(8 if factors.dim() == 1 else 4):
        return quantised.multiply(x, weight, factors, bias)
    x = x.detach().float().contiguous()
    weight, factors = weight.contiguous(), factors.contiguous()
    y = torch.empty(*x.shape[:-1], len(weight))
    product = describe(weight, factors, bias)
    failed = library().gptlab_linear(
        ctypes.byref(product),
        ctypes.c_void_p(x.data_ptr()),
        ctypes.c_int64(x.numel() // x.shape[-1]),
        step.n_threads(),
        ctypes.c_void_p(y.data_ptr()),
    )
    if failed:
        raise MemoryError
    return y
