"""Sliding-window attention in blocks: time and memory O(T * W) where a masked full product is O(T * T).

A block of queries sees only the keys from the oldest window of its first query to its last query. Blocks are computed
one after the other, forward and backward, so that the scores of one block are all that is ever held. The backward
pass computes the weights again from the saved log-sum-exp of each query's scores (Dao et al. 2022, *FlashAttention*).
Without a window the band is all that came before: half of the square.

Sinks are a second, small set of keys, seen by queries of their own; the two results are merged by their log-sum-exp.
Dilation by d is a plain window on d interleaved subsequences.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gptlab.errors import GptlabError
from gptlab.model.kernels.inputs import Inputs
from gptlab.model.masks import Tokens, Visibility

BLOCK = 128
"""Queries of a block; on two CPU cores with a window of 256, blocks of 64 and 256 were slower."""
HIDDEN = -1e30
"""Added to the score of a key that is not visible. Finite: a block that sees nothing of one set gives no NaN."""


class Piece(NamedTuple):
    """A block of queries and one set of keys: where they stand in the sequence, and what to add to their scores."""

    rows: slice
    keys: slice
    mask: Tensor  # (B or 1, 1, n_rows, n_keys) float32: 0 or HIDDEN

    def mask_for(self, group: int) -> Tensor:
        """The mask for `fold`ed queries: once for each query head of a group."""
        return self.mask if group == 1 else self.mask.repeat(1, 1, group, 1)


def applies(inputs: Inputs) -> bool:
    """Can `banded` compute this? It needs whole sequences without padding, and no dropout."""
    return inputs.keys is inputs.queries and inputs.queries.in_order and inputs.dropout == 0.0


def banded(inputs: Inputs) -> Tensor:
    """Return what `reference` returns, for whole sequences.

    Raises:
        GptlabError: forced where `applies` says no.
    """
    if not applies(inputs):
        raise GptlabError("the banded kernel needs whole sequences without padding or cache, and no dropout")
    q, q_sinks = inputs.q, inputs.q_sinks
    k, v = inputs.k.to(q.dtype), inputs.v.to(q.dtype)  # a cache may keep them in another
    y: Tensor = _Banded.apply(q, q_sinks, k, v, inputs.visibility, inputs.queries)  # type: ignore[no-untyped-call]
    return y


def blocks(visibility: Visibility, tokens: Tokens) -> Iterator[list[Piece]]:
    """Yield for every block of queries its band of keys, and its sinks if there are any."""
    length, step = tokens.positions.shape[1], visibility.dilation
    span = visibility.span or length
    n_sinks = min(visibility.sinks, length)
    if tokens.plain:  # all rows are alike
        tokens = tokens.first_row()
    masks: dict[tuple[int, ...], Tensor] = {}

    def piece(rows: slice, keys: slice, lowest: int) -> Piece:
        """``lowest``: keys at positions below it belong to the other set."""
        inside = lowest <= keys.start
        shape = (rows.start - keys.start, rows.stop - rows.start, keys.stop - keys.start, keys.stop)
        key = shape[:3] if inside and keys.start > 0 else (*shape, lowest)
        if key not in masks or not tokens.plain:
            seen = visibility.visible(tokens.at(rows), tokens.at(keys))
            seen &= (tokens.at(keys).positions >= lowest)[:, None]
            masks[key] = torch.zeros(seen.shape, device=seen.device).masked_fill_(~seen, HIDDEN)[:, None]
        return Piece(rows, keys, masks[key])

    for residue in range(min(step, length)):
        for first in range(residue, length, BLOCK * step):
            rows = slice(first, min(first + BLOCK * step, length), step)
            pieces = [piece(rows, slice(max(first - span + 1, residue), rows.stop, step), n_sinks)]
            if n_sinks:
                pieces.append(piece(rows, slice(0, n_sinks), 0))
            yield pieces


class _Banded(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, q_sinks: Tensor | None, k: Tensor, v: Tensor, visibility: Visibility, tokens: Tokens
    ) -> Tensor:
        group = q.shape[1] // k.shape[1]
        y = torch.empty_like(q)
        total = q.new_empty(q.shape[:-1], dtype=torch.float32)  # (B, H, T), log-sum-exp of each query's scores
        for pieces in blocks(visibility, tokens):
            rows = pieces[0].rows
            out, lse = _attend(fold(q, rows, group), k, v, pieces[0], group)
            for sinks in pieces[1:]:
                to_sinks = q if q_sinks is None else q_sinks
                other, other_lse = _attend(fold(to_sinks, rows, group), k, v, sinks, group)
                both = torch.logaddexp(lse, other_lse)
                share, other_share = ((part - both).exp()[..., None] for part in (lse, other_lse))
                out, lse = (out * share + other * other_share).to(q.dtype), both
            unfold(y, rows, group)[:] = out.unflatten(2, (group, -1))
            unfold(total, rows, group)[:] = lse.unflatten(2, (group, -1))
        ctx.save_for_backward(q, q_sinks, k, v, y, total)
        ctx.visibility, ctx.tokens, ctx.group = visibility, tokens, group
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        q, q_sinks, k, v, y, total = ctx.saved_tensors
        dq = torch.zeros_like(q)
        dq_sinks = None if q_sinks is None else torch.zeros_like(q_sinks)
        # For the band, for the sinks: queries, and where their gradient goes.
        of_kind = ((q, dq), (q, dq) if q_sinks is None or dq_sinks is None else (q_sinks, dq_sinks))
        dk, dv = (torch.zeros(x.shape, device=x.device) for x in (k, v))  # sums of many blocks: float32
        for pieces in blocks(ctx.visibility, ctx.tokens):
            for piece, (queries, gradient) in zip(pieces, of_kind, strict=False):
                dy_, q_, y_, total_ = (fold(x, piece.rows, ctx.group) for x in (dy, queries, y, total))
                dq_, dk_, dv_ = _attend_backward(dy_, q_, k, v, y_, total_, piece, ctx.group)
                unfold(gradient, piece.rows, ctx.group)[:] += dq_.unflatten(2, (ctx.group, -1))
                dk[:, :, piece.keys] += dk_
                dv[:, :, piece.keys] += dv_
        return dq, dq_sinks, dk.to(k.dtype), dv.to(v.dtype), None, None


def unfold(x: Tensor, rows: slice, group: int) -> Tensor:
    """A view of some queries: (B, H, T, ...) -> (B, H_kv, G, n_rows, ...)."""
    return x.unflatten(1, (-1, group))[:, :, :, rows]


def fold(x: Tensor, rows: slice, group: int) -> Tensor:
    """Some queries, those of a group one below the other: (B, H, T, ...) -> (B, H_kv, G * n_rows, ...)."""
    return unfold(x, rows, group).flatten(2, 3)


def _fused(q: Tensor) -> bool:
    """Is one operator for a block's scores, softmax and values the fastest? Elsewhere they are written out.

    The CPU's operator multiplies bfloat16 far from the processor's rate: written out and compiled is twice as fast.
    """
    return q.device.type == "cpu" and not (torch.compiler.is_compiling() and q.dtype == torch.bfloat16)


def _attend(q: Tensor, k: Tensor, v: Tensor, piece: Piece, group: int) -> tuple[Tensor, Tensor]:
    """Return the output (B, H_kv, G * n_rows, D) for one set of keys, and the log-sum-exp of the scores, float32."""
    k, v, mask = k[:, :, piece.keys], v[:, :, piece.keys], piece.mask_for(group)
    if _fused(q):
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, False, attn_mask=mask)
    scores = (q @ k.transpose(-2, -1)).float() / math.sqrt(q.shape[-1]) + mask
    lse = scores.logsumexp(-1)
    return (scores - lse[..., None]).exp().to(v.dtype) @ v, lse


def _attend_backward(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor, piece: Piece, group: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q and of one set of keys and values; ``y`` and ``lse`` are those of all sets together."""
    k, v, mask = k[:, :, piece.keys], v[:, :, piece.keys], piece.mask_for(group)
    if _fused(q):
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            dy, q, k, v, y, lse, 0.0, False, attn_mask=mask
        )
    # Transposed, keys by queries: as the products need it. Were it what the forward pass computes, torch.compile would
    # take it from there, and so keep all scores of all blocks.
    scale = 1 / math.sqrt(q.shape[-1])
    weights = ((k @ q.mT).float() * scale + mask.mT - lse[..., None, :]).exp()
    inner = (v @ dy.mT).float() - (dy.float() * y.float()).sum(-1)[..., None, :]
    dscores = (weights * inner * scale).to(q.dtype)
    return dscores.mT @ k, dscores @ q, weights.to(dy.dtype) @ dy
