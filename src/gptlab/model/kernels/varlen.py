"""Attention through PyTorch's `varlen_attn`: FlashAttention (Dao 2023) over sequences packed one after the other.

CUDA alone, half precision alone. Documents of a row are sequences of their own, so that what they do not see of each
other is not computed. Its window counts the keys before the query's own: W - 1 for ours of W.

No sinks: their result would have to be merged with the window's by the log-sum-exp of the scores, and `varlen_attn`
returns that without its gradient (PyTorch 2.13).
"""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor

from gptlab.errors import GptlabError
from gptlab.model.kernels.inputs import Inputs
from gptlab.model.masks import Tokens, Visibility

_starts: weakref.WeakKeyDictionary[Tokens, Tensor | None] = weakref.WeakKeyDictionary()
"""What `starts` returned: it reads a tensor back from the device, once for all layers."""


def obstacle(inputs: Inputs) -> str | None:
    """Say why `varlen` cannot compute this, or None."""
    q, queries = inputs.q, inputs.queries
    if inputs.dropout:
        return "does not support dropout"
    if q.device.type != "cuda" or torch.version.hip:
        return f"runs on CUDA only, not on {'ROCm' if torch.version.hip else q.device.type}"
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"computes bfloat16 and float16, not {q.dtype}"
    if q.shape[-1] % 8 or q.shape[-1] > 256:
        return f"needs heads of a multiple of 8, at most 256 wide, not {q.shape[-1]}"
    if inputs.keys is not queries or not queries.in_order:
        return "needs whole sequences without padding or cache"
    if inputs.visibility.left_right is None or inputs.q_sinks is not None:
        return "supports neither sinks nor dilation"
    if not _has_flash_attention(q.device):
        return "needs a GPU of compute capability 8.0 or later"
    asked = {"window_size"} | ({"enable_gqa"} if inputs.k.shape[1] != q.shape[1] else set())
    if missing := asked - _parameters():
        return f"needs a PyTorch whose varlen_attn has {' and '.join(sorted(missing))}; this is {torch.__version__}"
    if queries.documents is not None:
        if torch.compiler.is_compiling():
            return "counts documents, which cannot be compiled"
        if starts(queries) is None:
            return "needs each document in one piece"
    return None


def varlen(inputs: Inputs) -> Tensor:
    """Return what `reference` returns, for whole sequences without sinks or dilation.

    Raises:
        GptlabError: forced where `obstacle` says no.
    """
    if reason := obstacle(inputs):
        raise GptlabError(f"the varlen kernel {reason}; choose another kernel")
    q, dtype = inputs.q, inputs.q.dtype
    return packed(q, inputs.k.to(dtype), inputs.v.to(dtype), inputs.visibility, inputs.queries)


def packed(q: Tensor, k: Tensor, v: Tensor, visibility: Visibility, tokens: Tokens) -> Tensor:
    """Lay the documents of all rows one after the other, attend, and put the rows back: (B, H, T, D)."""
    batch, _, length, _ = q.shape
    begins, window = starts(tokens), visibility.left_right
    assert begins is not None
    assert window is not None
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))  # (B * T, heads, D)
    grouped = {"enable_gqa": True} if q.shape[1] != k.shape[1] else {}
    y = _varlen_attn()(q, k, v, begins, begins, length, length, window_size=window, **grouped)
    return y.unflatten(0, (batch, length)).transpose(1, 2)


def starts(tokens: Tokens) -> Tensor | None:
    """Return where each document begins when all rows are laid one after the other, and where the last ends.

    Returns:
        (N + 1,) int32; None where a document goes on after another, so that it is not one sequence.
    """
    batch, length = tokens.positions.shape
    if tokens.documents is None:
        return torch.arange(0, batch * length + 1, length, dtype=torch.int32, device=tokens.positions.device)
    if tokens not in _starts:
        begins = tokens.documents.diff(dim=1, prepend=tokens.documents[:, :1] - 1) != 0  # (B, T)
        ordered = tokens.documents.sort(dim=1).values
        pieces, different = begins.sum(), (ordered.diff(dim=1) != 0).sum() + batch
        end = begins.new_tensor([batch * length], dtype=torch.int64)
        positions = torch.cat([begins.flatten().nonzero()[:, 0], end]).to(torch.int32)
        _starts[tokens] = positions if pieces == different else None
    return _starts[tokens]


@functools.cache
def _has_flash_attention(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (8, 0)


@functools.cache
def _parameters() -> frozenset[str]:
    """The signature of `varlen_attn` has grown from release to release; 2.10 had no ``window_size``."""
    return frozenset(inspect.signature(_varlen_attn()).parameters)


def _varlen_attn() -> Callable[..., Tensor]:
    """Imported where it is needed: it brings the compiler along, a second or two."""
    from torch.nn.attention.varlen import varlen_attn

    return cast(Callable[..., Tensor], varlen_attn)
