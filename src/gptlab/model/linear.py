"""The one weight product of the model."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@functools.cache
def fast_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16 faster than float32."""
    return bool(torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())


class Linear(nn.Module):
    """``y = x W^T + b``: every projection of the model and its output head.

    There is one class so that a decoding engine can change how weights are stored and multiplied in one
    place. The product is computed in the weight's dtype; the caller keeps its residual stream in float32.

    Attributes:
        weight: (out_features, in_features). OpenAI and Hugging Face store GPT-2's as (in, out) ("Conv1D").
        bias: (out_features,) or None.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None

    def forward(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        return F.linear(x.to(self.weight.dtype), self.weight, self.bias)
