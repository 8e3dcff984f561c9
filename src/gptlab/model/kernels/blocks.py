"""What FlexAttention asks about a visibility: a function of one pair of indices, and which blocks to compute.

Both are derived from `gptlab.model.masks`, which alone says which keys a query may see.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from gptlab.model.masks import PADDING, Tokens, Visibility, sees


def mask_mod(
    visibility: Visibility, queries: Tokens, keys: Tokens
) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Return `Visibility.visible` as FlexAttention asks for it: a function of the indices (b, h, q, k) of one pair.

    What it captures are tensors whose sizes do not depend on the number of tokens: the code that is compiled for
    one window, and one length, serves all others. Where a whole model is compiled, all is taken as it is.
    """
    own = keys is queries and queries.in_order  # then a token's index is its position
    numbers: Sequence[int | Tensor | None] = visibility.numbers
    if not torch.compiler.is_compiling():
        device = queries.positions.device
        numbers = [None if n is None else torch.full((), n, device=device) for n in visibility.numbers]
    q_positions, k_positions = (None if own else _fixed_size(t.positions) for t in (queries, keys))
    q_documents = k_documents = None
    if queries.documents is not None and keys.documents is not None:
        q_documents, k_documents = (_fixed_size(d) for d in (queries.documents, keys.documents))

    def seen(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        together = None
        if q_documents is not None and k_documents is not None:
            together = q_documents[b, q] == k_documents[b, k]
        if q_positions is not None and k_positions is not None:
            q, k = q_positions[b, q], k_positions[b, k]
        return sees(q, k, together, *numbers)

    return seen


def blocks(visibility: Visibility, queries: Tokens, keys: Tokens, size: int) -> tuple[Tensor, Tensor]:
    """Divide queries and keys into blocks: where may any query see any key, and where does each see all?

    Told from the least and greatest position and document of each block. The first answer may be yes where no
    pair is visible, the second no where all are; never the other way round.

    Returns:
        Two (B, ceil(Tq / size), ceil(Tk / size)) bool.
    """
    far = torch.iinfo(torch.int64).max
    q, k = queries.positions, keys.positions
    q_low, q_high = (x[..., None] for x in _extremes(q, size))  # (B, nQ, 1)
    k_low, k_high = (x[:, None] for x in _extremes(k, size))  # (B, 1, nK)
    q_first = _extremes(q.masked_fill(q == PADDING, far), size)[0][..., None]  # the lowest that is not padding
    k_first = _extremes(k.masked_fill(k == PADDING, far), size)[0][:, None]
    some = k_first <= q_high
    every = (k_low != PADDING) & (k_high <= q_first)
    if visibility.span is not None:
        some &= (q_first - k_high < visibility.span) | (k_first < visibility.sinks)
        near = q_high - k_low < (visibility.span if visibility.dilation == 1 else 0)
        every &= near | (k_high < visibility.sinks)
    if queries.documents is not None and keys.documents is not None:
        q_from, q_to = (x[..., None] for x in _extremes(queries.documents, size))
        k_from, k_to = (x[:, None] for x in _extremes(keys.documents, size))
        some &= (q_from <= k_to) & (k_from <= q_to)
        every &= (q_from == k_to) & (k_from == q_to)
    for block, x in ((every, k), (every.mT, q)):  # a last block that is not whole is not full
        block &= torch.arange(1, block.shape[-1] + 1, device=x.device) * size <= x.shape[1]
    return some | (q_low == PADDING), every


def _extremes(x: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Least and greatest of each block: (B, T) -> twice (B, ceil(T / size)). The last token fills the last block up."""
    n = -(-x.shape[1] // size)
    index = torch.arange(n * size, device=x.device).clamp(max=x.shape[1] - 1)
    low, high = x[:, index].unflatten(1, (n, size)).aminmax(dim=-1)
    return low, high


def _fixed_size(x: Tensor) -> Tensor:
    """(B, T) -> (B, the next power of two), a size that compiled code may take as given."""
    if not torch.compiler.is_compiling():
        x = F.pad(x, (0, (1 << (x.shape[1] - 1).bit_length()) - x.shape[1]))
        torch._dynamo.mark_static(x)
    return x
