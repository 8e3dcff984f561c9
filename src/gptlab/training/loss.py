"""Cross-entropy over a large vocabulary without the (tokens x vocabulary) matrix of logits in memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

IGNORED = -100
"""The target of a position that counts nothing, such as padding."""

LOGITS_BYTES = {"cpu": 1 << 27, "cuda": 1 << 28}
"""Most bytes of logits held at once: many tokens make efficient products, and GPT-2 has 100 kB of logits for each."""

SOFTMAX_BYTES = {"cpu": 1 << 23}
"""Most bytes of float32 that the softmax works on at once; on the CPU few enough to stay in its cache."""


_IDS = 8192
"""Ids of the vocabulary whose gradient is computed at once."""

Slope = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""`softmax_slope`, or a compiled form of it."""


def softmax_slope(logits: Tensor, safe: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Return the cross-entropy of some tokens, and its slope but for the targets' own elements.

    Args:
        logits: (n, V) in any dtype; softmax and sums are in float32. Those of float32 are overwritten.
        safe: (n, 1) int64 targets, any id where the token does not count.
        counts: (n, 1) bool: does the token count?

    Returns:
        (n, 1) float32 nats, 0 where the token does not count; and the softmax (n, V) in the logits' dtype, likewise.
    """
    of_target = logits.gather(1, safe).float()
    x = logits.float()
    highest = x.amax(-1, keepdim=True)
    x = x.sub_(highest).exp_()
    total = x.sum(-1, keepdim=True)
    nats = (highest + total.log() - of_target) * counts
    return nats, x.mul_(counts / total).to(logits.dtype)


def cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, slope: Slope = softmax_slope) -> Tensor:
    """Return the summed cross-entropy in nats of ``targets``, as a float32 scalar.

    The same value and gradients as ``F.cross_entropy(hidden @ weight.T, targets, reduction="sum")``, but logits are
    computed for a few tokens at a time, and the gradients right with them: in the forward pass, so that no product is
    done twice (the idea of Liger's fused linear cross-entropy, Hsu et al. 2024). Under autocast the products are in its
    dtype; softmax and the sums are in float32.

    Args:
        hidden: (..., C) what comes out of the last layer norm.
        weight: (V, C) the output projection.
        targets: (...) int64 ids, or `IGNORED`.
        slope: how softmax and loss are computed, between the products.
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    # Inside a function of autograd this can no longer be told: there gradients are off, and evaluation needs none.
    training = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    chosen = slope if training else None
    loss: Tensor = _ChunkedCrossEntropy.apply(hidden.flatten(0, -2), weight, targets.flatten(), dtype, chosen)  # type: ignore[no-untyped-call]
    return loss


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype, slope: Slope | None
    ) -> Tensor:
        device, n_ids = hidden.device.type, len(weight)
        low = weight.to(dtype)
        total = torch.zeros((), device=hidden.device)
        dhidden = None if slope is None else torch.empty_like(hidden)
        dweight = None if slope is None else torch.empty(weight.shape, device=hidden.device)
        chunk = _at_once(LOGITS_BYTES.get(device, 1 << 27), n_ids * dtype.itemsize)
        rows = _at_once(SOFTMAX_BYTES.get(device, 1 << 62), n_ids * 4)
        with torch.autocast(device, enabled=False):
            for first in range(0, len(hidden), chunk):
                x, wanted = hidden[first : first + chunk].to(dtype), targets[first : first + chunk, None]
                counts = wanted != IGNORED
                safe = wanted.masked_fill(~counts, 0)
                logits = x @ low.T  # (n, V)
                for part in zip(logits.split(rows), safe.split(rows), counts.split(rows), strict=True):
                    total += _nats(*part) if slope is None else _nats_and_slope(*part, slope)
                if dhidden is not None and dweight is not None:
                    dhidden[first : first + chunk] = logits @ low
                    for ids in range(0, n_ids, _IDS):  # or the products' results would be held whole beside the sum
                        part_of_sum = logits[:, ids : ids + _IDS].T @ x
                        if first == 0:
                            dweight[ids : ids + _IDS] = part_of_sum
                        else:
                            dweight[ids : ids + _IDS] += part_of_sum
        ctx.save_for_backward(dhidden, dweight)
        ctx.dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        dhidden, dweight = ctx.saved_tensors
        # In place: the gradient of a vocabulary is too large to be held twice, and nobody else reads it.
        return dhidden * dloss, dweight.mul_(dloss).to(ctx.dtype), None, None, None


def _at_once(limit: int, each: int) -> int:
    """The largest power of two of which so many, of ``each`` bytes, stay within the limit; at least 1."""
    return 1 << (max(limit // each, 1).bit_length() - 1)


def _nats(logits: Tensor, safe: Tensor, counts: Tensor) -> Tensor:
    logits = logits.float()
    return ((logits.logsumexp(-1, keepdim=True) - logits.gather(1, safe)) * counts).sum()


def _nats_and_slope(logits: Tensor, safe: Tensor, counts: Tensor, slope: Slope) -> Tensor:
    """Return the loss of some tokens, and leave its slope in place of their logits."""
    nats, dlogits = slope(logits, safe, counts)
    # The target's softmax less one, from the loss: nothing cancels where the model is sure.
    logits.copy_(dlogits).scatter_(1, safe, torch.expm1(-nats).to(logits.dtype))
    return nats.sum()
