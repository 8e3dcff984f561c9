"""The attention of one layer taken apart into heads, and a model put together again from changed ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gptlab.config import ModelConfig
from gptlab.model.attention import CausalSelfAttention
from gptlab.model.gpt import GPT


class Heads(NamedTuple):
    """The weights of one layer's attention by head; float64 on the CPU, in which any weight is exact.

    Attributes:
        q: (H, D, C + 1) queries; the last column is the bias, 0 where the model has none.
        k: (H_kv, D, C + 1) keys.
        v: (H_kv, D, C + 1) values.
        o: (H, C, D) how each head's output enters the residual stream.
        bias: (C,) of that output, 0 where the model has none.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    bias: Tensor

    def expanded(self) -> Heads:
        """Return the same function with a key and a value of its own for every query head."""
        times = len(self.q) // len(self.k)
        return self._replace(k=self.k.repeat_interleave(times, 0), v=self.v.repeat_interleave(times, 0))


def read_heads(attention: CausalSelfAttention) -> Heads:
    """Take a layer's attention apart."""
    n_head, n_kv_head, width = attention.n_head, attention.n_kv_head, attention.head_dim
    rows = _with_bias(attention.c_attn.weight, attention.c_attn.bias).unflatten(0, (-1, width))
    out = _with_bias(attention.c_proj.weight, attention.c_proj.bias)
    o = out[:, :-1].unflatten(1, (n_head, width)).transpose(0, 1)
    q, k, v = rows.split([n_head, n_kv_head, n_kv_head])
    return Heads(q, k, v, o, out[:, -1])


def _with_bias(weight: Tensor, bias: Tensor | None) -> Tensor:
    """(out, in) and (out,) -> (out, in + 1)."""
    bias = weight.new_zeros(len(weight)) if bias is None else bias
    return torch.cat([weight, bias[:, None]], 1).detach().double().cpu()


@torch.no_grad()
def rebuild(model: GPT, change: Callable[[int, Heads], Heads], **settings: Any) -> GPT:
    """Return a new model whose every attention is changed; the source keeps its weights, all of them its own.

    Args:
        model: the source.
        change: called with the index of a layer and its `Heads`; returns the new ones.
        **settings: fields of the new configuration that differ.
    """
    config = dataclasses.replace(model.config, **settings)
    state = {name: tensor.clone() for name, tensor in model.tensors().items()}
    for layer, block in enumerate(model.blocks):
        heads = change(layer, read_heads(block.attn))
        rows = torch.cat([heads.q, heads.k, heads.v]).flatten(0, 1)
        out = torch.cat([heads.o.transpose(0, 1).flatten(1), heads.bias[:, None]], 1)
        for name, values in (("c_attn", rows), ("c_proj", out)):
            like = state[f"h.{layer}.attn.{name}.weight"]
            state[f"h.{layer}.attn.{name}.weight"] = values[:, :-1].to(like, copy=True)
            if config.bias:
                state[f"h.{layer}.attn.{name}.bias"] = values[:, -1].to(like, copy=True)
    return assemble(config, state, training=model.training)


def assemble(config: ModelConfig, state: Mapping[str, Tensor], *, training: bool) -> GPT:
    """Return a model that holds these very tensors.

    Args:
        config: the model's configuration.
        state: every tensor by name, as `GPT.tensors` gives them.
        training: dropout on or off.
    """
    with torch.device("meta"):
        new = GPT(config)
    new.load_state_dict(state, strict=not config.tie_embeddings, assign=True)
    new.tie()
    return new.train(training)
