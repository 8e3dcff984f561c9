"""Where the heads of a model look."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
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
    shape = (len(chosen), config.n_head, length, length)
    check_maps(config, len(chosen), length, row.device)
    inputs = layer_inputs(model, ids, positions, chosen)
    maps = torch.empty(shape, device=row.device)
    for i, layer in enumerate(chosen):
        maps[i] = inputs.maps(layer)
    return maps


def check_maps(config: ModelConfig, n_layer: int, length: int, device: torch.device) -> None:
    """Refuse maps of so many layers where they take more memory than there is."""
    said = f"maps of {n_layer * config.n_head} heads at {length:,} tokens take"
    check_memory(4 * n_layer * config.n_head * length**2, device, said, "take fewer layers or a shorter text")


@dataclass(frozen=True, eq=False)
class LayerInputs:
    """What the attention of each layer reads of one text: it gives maps of any layer without another forward pass.

    Attributes:
        model: that read the text; it must not be changed as long as maps are asked for.
        by_layer: what `CausalSelfAttention.weights` takes.
    """

    model: GPT
    by_layer: Mapping[int, tuple[Any, ...]]

    def maps(self, layer: int) -> Tensor:
        """Return the weights of a layer's heads, (H, T, T) float32."""
        with looking(self.model):
            return self.model.blocks[layer].attn.weights(*self.by_layer[layer])[0]

    @property
    def n_bytes(self) -> int:
        """Of the hidden states that are held."""
        return sum(inputs[0].nbytes for inputs in self.by_layer.values())


def layer_inputs(
    model: GPT, ids: Tensor | Sequence[int], positions: Tensor | None = None, layers: Sequence[int] | None = None
) -> LayerInputs:
    """Read a text once and keep what the attention of each layer reads: 4 * layers * T * C bytes.

    Args:
        model: any variant, in any dtype.
        ids: (T,) int64.
        positions: (T,) int64, where the tokens stand; None: from 0 on.
        layers: which; None: all.
    """
    row = as_row(model, ids)
    chosen = range(model.config.n_layer) if layers is None else layers
    found: dict[int, tuple[Any, ...]] = {}

    def keep(layer: int, _: CausalSelfAttention, inputs: tuple[Any, ...]) -> None:
        found[layer] = inputs[:3]

    with looking(model), contextlib.ExitStack() as stack:
        for layer in set(chosen):
            stack.enter_context(hooked([model.blocks[layer].attn], functools.partial(keep, layer)))
        model(row, positions=None if positions is None else positions[None].to(row.device), head=lambda x, _: x)
    return LayerInputs(model, found)


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
