"""Cross-entropy over a large vocabulary without the (tokens x vocabulary) matrix of logits in memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

IGNORED = -100
"""The target of a position that counts nothing, such as padding."""

CHUNK = {"cpu": 256, "cuda": 2048}
"""Tokens whose logits are held at once: few enough to stay near the processor, enough for efficient products."""


def cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Return the summed cross-entropy in nats of ``targets``, as a float32 scalar.

    The same value and gradients as ``F.cross_entropy(hidden @ weight.T, targets, reduction="sum")``, but logits are
    computed for a few tokens at a time, and the gradients right with them: in the forward pass, so that no product is
    done twice (the idea of Liger's fused linear cross-entropy, Hsu et al. 2024). Under autocast the products are in its
    dtype; softmax and the sums are in float32.

    Args:
        hidden: (..., C) what comes out of the last layer norm.
        weight: (V, C) the output projection.
        targets: (...) int64 ids, or `IGNORED`.
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    # Inside a function of autograd this can no longer be told: there gradients are off, and evaluation needs none.
    training = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    loss: Tensor = _ChunkedCrossEntropy.apply(hidden.flatten(0, -2), weight, targets.flatten(), dtype, training)  # type: ignore[no-untyped-call]
    return loss


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype, training: bool
    ) -> Tensor:
        low = weight.to(dtype)
        total = torch.zeros((), device=hidden.device)
        dhidden = torch.empty_like(hidden) if training else None
        dweight = torch.zeros(weight.shape, device=hidden.device) if training else None
        chunk = CHUNK.get(hidden.device.type, 256)
        with torch.autocast(hidden.device.type, enabled=False):
            for first in range(0, len(hidden), chunk):
                x, wanted = hidden[first : first + chunk].to(dtype), targets[first : first + chunk, None]
                counts = wanted != IGNORED
                safe = wanted.masked_fill(~counts, 0)
                logits = (x @ low.T).float()  # (n, V)
                scale = logits.logsumexp(-1, keepdim=True)
                total += ((scale - logits.gather(1, safe)) * counts).sum()
                if dhidden is not None and dweight is not None:
                    slope = logits.sub_(scale).exp_()  # softmax, then minus one at the target
                    slope.scatter_add_(1, safe, torch.full_like(scale, -1.0)).mul_(counts)
                    slope = slope.to(dtype)
                    dhidden[first : first + chunk] = slope @ low
                    dweight += slope.T @ x
        ctx.save_for_backward(dhidden, dweight)
        ctx.dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        dhidden, dweight = ctx.saved_tensors
        return dhidden * dloss, (dweight * dloss).to(ctx.dtype), None, None, None
