"""Attention maps in 8 bits, for the page to draw: 0 is a key that is hidden from the query, 1 to 255 its weight.

A byte b stands for the weight ((b - 1) / 254)^2: the root spends more of the 255 steps on small weights, which are most
of them. A weight comes back within 0.004 of what it was, and one below 0.01 within 0.0004.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

STEPS = 254


def pack(weights: Tensor, visible: Tensor) -> Tensor:
    """Return (H, T, T) weights, of which (T, T) ``visible`` count, as (H, T, T) uint8."""
    steps = 1 + (weights.clamp(0, 1).sqrt() * STEPS).round()
    return torch.where(visible, steps, 0.0).to(torch.uint8)


def unpack(packed: Tensor) -> Tensor:
    """Return the weights, float32, that the page reads from uint8; hidden keys have none."""
    return ((packed.float() - 1).clamp(min=0) / STEPS).square()


def shrink(packed: Tensor, size: int) -> Tensor:
    """Return (H, S, S) uint8 with S = min(T, ``size``): of all that falls on a pixel, the largest."""
    if packed.shape[-1] <= size:
        return packed
    return F.adaptive_max_pool2d(packed.float(), size).to(torch.uint8)
