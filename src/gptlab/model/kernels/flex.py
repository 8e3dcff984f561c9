"""Attention through PyTorch's FlexAttention (Dong et al. 2024): one kernel, compiled for the visibility at hand.

Forward and backward on CUDA, forward alone on the CPU: there the operator knows neither gradients nor the log-sum-exp
of the scores (PyTorch 2.13). Sinks that see queries of their own are therefore not a second set of keys whose result is
merged, as in `banded`, but a second half of every query and key, as in `sdpa`: one way for both devices.

Compilation takes seconds. The compiled code serves every length and window: it is made anew only for another dtype,
another number or width of heads, one sequence or several, one token or several, one block of keys or several, and,
where there is padding or documents, another batch or twice the length.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gptlab.errors import GptlabError
from gptlab.model.kernels.blocks import blocks, mask_mod
from gptlab.model.kernels.inputs import Inputs
from gptlab.model.kernels.sdpa import two_kinds_of_scores
from gptlab.model.masks import Tokens, Visibility

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

BLOCK = 128
"""Queries, and keys, of a block: all of it is computed or none. FlexAttention's own default."""
KERNELS_KEPT = 256
"""Compiled variants kept at a time; torch's default of 8 is less than one model with and without documents takes."""
TRITON = importlib.util.find_spec("triton") is not None

_block_masks: weakref.WeakKeyDictionary[Tokens, dict[Visibility, BlockMask]] = weakref.WeakKeyDictionary()
"""All layers of a model that share a visibility share its mask: they are called with one and the same `Tokens`."""


def obstacle(inputs: Inputs) -> str | None:
    """Say why `flex` cannot compute this, or None."""
    q = inputs.q
    if inputs.dropout:
        return "does not support dropout"
    if q.device.type not in ("cpu", "cuda"):
        return f"runs on the CPU and on CUDA, not on {q.device.type}"
    if q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"computes float32, bfloat16 and float16, not {q.dtype}"
    if q.device.type == "cpu":
        if torch.is_grad_enabled() and any(x.requires_grad for x in inputs.tensors):
            return "computes no gradients on the CPU"
        # PyTorch 2.13 reads values that are a view of the projection from the projection's beginning: silently wrong.
        return "cannot be a part of what is compiled on the CPU" if torch.compiler.is_compiling() else None
    if q.shape[-1] < 16:
        return f"needs heads at least 16 wide on CUDA, not {q.shape[-1]}"
    return None if TRITON else "needs the package triton on CUDA"


def flex(inputs: Inputs) -> Tensor:
    """Return what `reference` returns; time and memory grow with the blocks of keys and queries that see each other.

    Raises:
        GptlabError: forced where `obstacle` says no, or where nothing can be compiled.
    """
    if reason := obstacle(inputs):
        raise GptlabError(f"the flex kernel {reason}; choose another kernel")
    q, k, v, visibility, queries, keys, _, q_sinks = inputs
    scale, k, v = 1 / math.sqrt(q.shape[-1]), k.to(q.dtype), v.to(q.dtype)
    if q_sinks is not None:
        q, k = two_kinds_of_scores(q, q_sinks, k, visibility, keys)
    block_mask = _block_mask(visibility, queries, keys)
    arguments = {"block_mask": block_mask, "scale": scale, "enable_gqa": q.shape[1] != k.shape[1]}
    if torch.compiler.is_compiling():
        return _flex_attention()(q, k, v, **arguments)
    try:
        with torch._dynamo.config.patch(recompile_limit=KERNELS_KEPT):
            return _compiled()(q, k, v, **arguments)
    except torch._dynamo.exc.TorchDynamoException as error:
        reason = str(error).strip().split("\n", 1)[0]
        raise GptlabError(
            f"the flex kernel could not be compiled ({reason}); it needs a C++ compiler on the CPU and Triton on CUDA;"
            " choose another kernel"
        ) from error


def _flex_attention() -> Callable[..., Tensor]:
    """Imported where it is needed: it brings the compiler along, a second or two."""
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention


@functools.cache
def _compiled() -> Callable[..., Tensor]:
    return torch.compile(_flex_attention(), dynamic=True, fullgraph=True)


def _block_mask(visibility: Visibility, queries: Tokens, keys: Tokens) -> BlockMask:
    if keys is not queries or torch.compiler.is_compiling():
        return _make_block_mask(visibility, queries, keys)
    masks = _block_masks.setdefault(queries, {})
    if visibility not in masks:
        masks[visibility] = _make_block_mask(visibility, queries, keys)
    return masks[visibility]


def _make_block_mask(visibility: Visibility, queries: Tokens, keys: Tokens) -> BlockMask:
    from torch.nn.attention.flex_attention import BlockMask

    lengths = (queries.positions.shape[1], keys.positions.shape[1])
    seen = mask_mod(visibility, queries, keys)
    if keys is queries and queries.in_order and queries.documents is None:  # all rows are alike
        queries = keys = queries.first_row()
    some, every = blocks(visibility, queries, keys, BLOCK)
    return BlockMask.from_kv_blocks(
        *_listed(some & ~every), *_listed(every), BLOCK_SIZE=BLOCK, mask_mod=seen, seq_lengths=lengths
    )


def _listed(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """(B, nQ, nK) bool -> how many for each query block (B, 1, nQ), and which, those first: (B, 1, nQ, nK), int32."""
    order = chosen.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return chosen.sum(-1, dtype=torch.int32)[:, None], order.to(torch.int32)[:, None]
