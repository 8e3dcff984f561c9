"""Sliding-window attention in blocks: time and memory O(T * W) where a masked full product is O(T * T).

A block of queries sees only the keys from the oldest window of its first query to its last query. Blocks are computed
one after the other, forward and backward, so that the scores of one block are all that is ever held. The backward
pass computes the scores again from the saved log-sum-exp (as FlashAttention does; Dao et al. 2022).

Sinks join each block's softmax as additional columns. Dilation by d is a plain window on d interleaved subsequences.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gptlab.errors import GptlabError
from gptlab.model.masks import Tokens, Visibility

BLOCK = 256
"""Queries of a block; on two CPU cores 128 and 512 were slower."""


class Piece(NamedTuple):
    """One block of queries with the keys of one kind that it may see: slices of the sequence, and the mask."""

    queries: slice
    keys: slice
    visible: Tensor  # (B or 1, 1, 1, n_queries, n_keys) bool


def applies(visibility: Visibility, queries: Tokens, keys: Tokens, dropout: float) -> bool:
    """Can `banded` compute this? It needs a window, whole sequences without padding, and no dropout."""
    return visibility.window is not None and keys is queries and queries.in_order and dropout == 0.0


def banded(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visibility: Visibility,
    queries: Tokens,
    keys: Tokens,
    dropout: float = 0.0,
    q_sinks: Tensor | None = None,
) -> Tensor:
    """Return what `reference` returns, for a window over whole sequences.

    Raises:
        GptlabError: forced where `applies` says no.
    """
    if not applies(visibility, queries, keys, dropout):
        raise GptlabError("the banded kernel needs a window, whole sequences without padding or cache, and no dropout")
    k, v = k.to(q.dtype), v.to(q.dtype)
    group = q.shape[1] // k.shape[1]
    q = q.unflatten(1, (-1, group))  # (B, H_kv, G, T, D)
    q_sinks = q if q_sinks is None else q_sinks.unflatten(1, (-1, group))
    y: Tensor = _Banded.apply(q, q_sinks, k, v, visibility, queries)  # type: ignore[no-untyped-call]
    return y.flatten(1, 2)


def _pieces(visibility: Visibility, tokens: Tokens) -> Iterator[tuple[slice, Piece | None, Piece]]:
    """Yield for every block of queries: its slice, its sinks outside the band (or None), and its band of keys."""
    length, step, span = tokens.positions.shape[1], visibility.dilation, visibility.span
    assert span is not None
    for residue in range(step):
        for first in range(residue, length, BLOCK * step):
            rows = slice(first, min(first + BLOCK * step, length), step)
            band = slice(max(first - span + 1, residue), rows.stop, step)
            here = tokens.at(rows)
            sinks = None
            outside = min(visibility.sinks, length)
            if outside:
                seen = visibility.visible(here, tokens.at(slice(0, outside)))
                sinks = Piece(rows, slice(0, outside), seen[:, None, None])
            near = tokens.at(band)
            seen = visibility.visible(here, near) & (near.positions >= outside)[:, None, :]
            yield rows, sinks, Piece(rows, band, seen[:, None, None])


def _scores(q: Tensor, k: Tensor, piece: Piece, scale: float) -> Tensor:
    """(B, H_kv, G, n_queries, n_keys) float32, minus infinity where a key is not visible."""
    scores = (q[..., piece.queries, :] @ k[:, :, None, piece.keys].transpose(-2, -1)).float() * scale
    return scores.masked_fill_(~piece.visible, -math.inf)


class _Banded(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, q_sinks: Tensor, k: Tensor, v: Tensor, visibility: Visibility, tokens: Tokens
    ) -> Tensor:
        scale = 1 / math.sqrt(q.shape[-1])
        y = torch.empty_like(q)
        total = q.new_empty(q.shape[:-1], dtype=torch.float32)  # log-sum-exp of each query's scores
        for rows, sinks, band in _pieces(visibility, tokens):
            scores = _scores(q, k, band, scale)
            if sinks is not None:
                scores = torch.cat([_scores(q_sinks, k, sinks, scale), scores], dim=-1)
            total[..., rows] = scores.logsumexp(-1)
            weights = (scores - total[..., rows, None]).exp_().to(v.dtype)
            values = v[:, :, None, band.keys]
            if sinks is not None:
                values = torch.cat([v[:, :, None, sinks.keys], values], dim=-2)
            y[..., rows, :] = weights @ values
        ctx.save_for_backward(q, q_sinks, k, v, y, total)
        ctx.visibility, ctx.tokens = visibility, tokens
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        q, q_sinks, k, v, y, total = ctx.saved_tensors
        scale = 1 / math.sqrt(q.shape[-1])
        dq, dq_sinks = torch.zeros_like(q), torch.zeros_like(q_sinks)
        dk, dv = torch.zeros_like(k, dtype=torch.float32), torch.zeros_like(v, dtype=torch.float32)
        delta = (dy.float() * y.float()).sum(-1)  # (B, H_kv, G, T)
        for rows, sinks, band in _pieces(ctx.visibility, ctx.tokens):
            for piece, queries, gradient in ((sinks, q_sinks, dq_sinks), (band, q, dq)):
                if piece is None:
                    continue
                weights = (_scores(queries, k, piece, scale) - total[..., rows, None]).exp_()
                slope = dy[..., rows, :]
                dv[:, :, piece.keys] += (weights.to(v.dtype).transpose(-2, -1) @ slope).sum(2)
                inner = (slope @ v[:, :, None, piece.keys].transpose(-2, -1)).float() - delta[..., rows, None]
                dscores = (weights * inner * scale).to(q.dtype)
                gradient[..., rows, :] = dscores @ k[:, :, None, piece.keys]
                dk[:, :, piece.keys] += (dscores.transpose(-2, -1) @ queries[..., rows, :]).sum(2)
        return dq, dq_sinks, dk.to(k.dtype), dv.to(v.dtype), None, None
