"""Where the heads of a model look."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from gptlab.config import ModelConfig
from gptlab.errors import GptlabError
from gptlab.generation.memory import check_memory
from gptlab.inspecting.running import as_row, check_index, looking
from gptlab.model import cost
from gptlab.model.attention import CausalSelfAttention
from gptlab.model.gpt import GPT
from gptlab.model.masks import Tokens


def attention_maps(model: GPT, ids: Tensor | Sequence[int], layers: Sequence[int] | None = None) -> Tensor:
    """Return what every head looks at, from one forward pass through the explicit softmax.

    All maps together take 4 * layers * H * T^2 bytes: 25 MB for the 4 layers and 6 heads of ``pocket`` at 512 tokens,
    604 MB for those of GPT-2 small at 1,024. Where that is not free it is refused.

    Args:
        model: any variant, in any dtype.
        ids: (T,) int64.
        layers: which layers, in this order; None: all.

    Returns:
        (layers, H, T, T) float32, [layer, head, query, key]; rows sum to 1, and are 0 where `visible` is False.

    Raises:
        GptlabError: a layer that the model does not have, ids that it cannot read, or more memory than there is.
    """
    return maps_at(model, ids, None, layers)


def maps_at(model: GPT, ids: Tensor | Sequence[int], positions: Tensor | None, layers: Sequence[int] | None) -> Tensor:
    """Return what `attention_maps` does for a text whose tokens stand at ``positions``, (T,) int64; None: from 0 on."""
    row = as_row(model, ids)
    config, length = model.config, row.shape[1]
    chosen = list(range(config.n_layer)) if layers is None else list(layers)
    for layer in chosen:
        check_index(config.n_layer, layer, "layer")
    if not chosen:
        raise GptlabError("there is no layer to look at; leave layers out for all")
    said = f"maps of {len(chosen) * config.n_head} heads at {length:,} tokens take"
    shape = (len(chosen), config.n_head, length, length)
    check_memory(4 * torch.Size(shape).numel(), row.device, said, "take fewer layers or a shorter text")
    maps = torch.empty(shape, device=row.device)

    def fill(attention: CausalSelfAttention, inputs: tuple[Any, ...]) -> None:
        weights = attention.weights(*inputs[:3])[0]
        for i, layer in enumerate(chosen):
            if model.blocks[layer].attn is attention:
                maps[i] = weights

    with looking(model), hooked([model.blocks[layer].attn for layer in set(chosen)], fill):
        model(row, positions=None if positions is None else positions[None].to(row.device), head=lambda x, _: x)
    return maps


@contextlib.contextmanager
def hooked(modules: Iterable[torch.nn.Module], look: Callable[[Any, tuple[Any, ...]], None]) -> Iterator[None]:
    """Call ``look(module, inputs)`` before each of these modules computes, inside the ``with`` block."""
    with contextlib.ExitStack() as stack:
        for module in modules:
            stack.callback(module.register_forward_pre_hook(look).remove)
        yield


def visible(config: ModelConfig, layer: int, length: int) -> Tensor:
    """Return which keys each query of a layer may see: causal, and within the window or among the sinks.

    Args:
        config: of the model.
        layer: from 0.
        length: tokens of the text, T.

    Returns:
        (T, T) bool, [query, key].

    Raises:
        GptlabError: a layer that the model does not have, or no token.
    """
    check_index(config.n_layer, layer, "layer")
    if length < 1:
        raise GptlabError(f"a text has at least one token, got {length}")
    tokens = Tokens(torch.arange(length)[None])
    return cost.visibilities(config)[layer].visible(tokens, tokens)[0]
