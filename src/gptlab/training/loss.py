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
"""Ids of the vocabulary that a product takes at once."""

LogitsGradient = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""`softmax_gradient`, or a compiled form of it."""


Work = Callable[[Tensor, slice], Tensor]
"""What is done with the logits (n, V) of some tokens: return sums over them, and leave the gradient of the first sum in
place of the logits where `wants_gradient`."""


def softmax_gradient(logits: Tensor, safe: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Return the cross-entropy of some tokens, and its gradient but for the targets' own elements.

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


def cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, gradient: LogitsGradient = softmax_gradient
) -> Tensor:
    """Return the summed cross-entropy in nats of ``targets``, as a float32 scalar.

    The same value and gradients as ``F.cross_entropy(hidden @ weight.T, targets, reduction="sum")``, but logits are
    computed for a few tokens at a time, and the gradients right with them: in the forward pass, so that no product is
    done twice (the idea of Liger's fused linear cross-entropy, Hsu et al. 2024). Under autocast the products are in its
    dtype; softmax and the sums are in float32.

    Args:
        hidden: (..., C) what comes out of the last layer norm.
        weight: (V, C) the output projection.
        targets: (...) int64 ids, or `IGNORED`.
        gradient: how softmax and loss are computed, between the products.
    """
    wanted = targets.flatten()
    chosen = gradient if wants_gradient(hidden, weight) else None

    def work(logits: Tensor, where: slice) -> Tensor:
        targets = wanted[where, None]
        counts = targets != IGNORED
        safe = targets.masked_fill(~counts, 0)
        total = torch.zeros(1, device=logits.device)
        for part in zip(
            in_processor_cache(logits, logits),
            in_processor_cache(safe, logits),
            in_processor_cache(counts, logits),
            strict=True,
        ):
            total += _nats(*part) if chosen is None else _nats_and_gradient(*part, chosen)
        return total

    return sum_in_chunks(hidden, weight, work)[0]


def wants_gradient(hidden: Tensor, weight: Tensor) -> bool:
    """Will anybody ask for gradients? Inside a function of autograd this can no longer be told."""
    return torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)


def product_dtype(weight: Tensor) -> torch.dtype:
    """The dtype of a product with this weight: autocast's, else its own."""
    device = weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


def sum_in_chunks(hidden: Tensor, weight: Tensor, work: Work, held: int = 1) -> Tensor:
    """Return the sums of ``work`` over all tokens, float32; only the first of them has gradients.

    Args:
        hidden: (..., C) float32.
        weight: (V, C) the output projection.
        work: see `Work`; called for a few tokens at a time, in their order.
        held: how many times the logits' memory ``work`` holds at once.
    """
    with_gradient, dtype = wants_gradient(hidden, weight), product_dtype(weight)
    sums: Tensor = _Chunks.apply(hidden.flatten(0, -2), weight, dtype, work, held, with_gradient)  # type: ignore[no-untyped-call]
    return sums


def in_processor_cache(x: Tensor, logits: Tensor) -> tuple[Tensor, ...]:
    """Cut the rows of ``x`` into parts, so few that the softmax over their ``logits`` stays in the cache."""
    return x.split(_at_once(SOFTMAX_BYTES.get(logits.device.type, 1 << 62), logits.shape[1] * 4))


class _Chunks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, dtype: torch.dtype, work: Work, held: int, with_gradient: bool
    ) -> Tensor:
        device, n_ids = hidden.device.type, len(weight)
        # A copy of all weights in the products' dtype, and products as large as them, would be held whole.
        pieces = [slice(first, first + _IDS) for first in range(0, n_ids, _IDS)]
        sums: list[Tensor] = []
        dhidden = torch.zeros_like(hidden) if with_gradient else None
        dweight = torch.empty(weight.shape, device=hidden.device) if with_gradient else None
        chunk = _at_once(LOGITS_BYTES.get(device, 1 << 27), n_ids * dtype.itemsize * held)
        with torch.autocast(device, enabled=False):
            for first in range(0, len(hidden), chunk):
                where = slice(first, first + chunk)
                x = hidden[where].to(dtype)
                logits = x.new_empty(len(x), n_ids)  # (n, V)
                for ids in pieces:
                    torch.mm(x, weight[ids].to(dtype).T, out=logits[:, ids])
                sums.append(work(logits, where))
                if dhidden is not None and dweight is not None:
                    for ids in pieces:
                        dhidden[where] += torch.mm(logits[:, ids], weight[ids].to(dtype))
                        part_of_sum = torch.mm(logits[:, ids].T, x)
                        if first == 0:
                            dweight[ids] = part_of_sum
                        else:
                            dweight[ids] += part_of_sum
        ctx.save_for_backward(dhidden, dweight)
        ctx.dtype = weight.dtype
        return torch.stack(sums).sum(0)

    @staticmethod
    def backward(ctx: Any, dsums: Tensor) -> tuple[Tensor | None, ...]:
        dhidden, dweight = ctx.saved_tensors
        # In place: the gradient of a vocabulary is too large to be held twice, and nobody else reads it.
        return dhidden * dsums[0], dweight.mul_(dsums[0]).to(ctx.dtype), None, None, None, None


def _at_once(limit: int, each: int) -> int:
    """The largest power of two of which so many, of ``each`` bytes, stay within the limit; at least 1."""
    return 1 << (max(limit // each, 1).bit_length() - 1)


def _nats(logits: Tensor, safe: Tensor, counts: Tensor) -> Tensor:
    logits = logits.float()
    return ((logits.logsumexp(-1, keepdim=True) - logits.gather(1, safe)) * counts).sum()


def _nats_and_gradient(logits: Tensor, safe: Tensor, counts: Tensor, gradient: LogitsGradient) -> Tensor:
    """Return the loss of some tokens, and leave its gradient in place of their logits."""
    nats, dlogits = gradient(logits, safe, counts)
    # The target's softmax less one, from the loss: nothing cancels where the model is sure.
    logits.copy_(dlogits).scatter_(1, safe, torch.expm1(-nats).to(logits.dtype))
    return nats.sum()
