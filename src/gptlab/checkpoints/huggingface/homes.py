"""Which class of transformers computes exactly what a configuration says, and what must be rewritten to move in.

| positions | key/value heads | windows | home |
|---|---|---|---|
| learned, none | one per query head | none | GPT-2 |
| learned, none | 1 | none | GPTBigCode |
| learned, none | between | none | GPT-2, each key/value head repeated |
| rotary | any | none, or one of 2 or more for all layers | StarCoder2 |
| the same with RMSNorm and SwiGLU | any | none | Llama |
| the same with RMSNorm and SwiGLU, without biases | any | one of 2 or more for all layers | Mistral |
| anything else | | | code of its own (`custom`) |
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor

from gptlab.checkpoints.files import Checkpoint
from gptlab.config import ModelConfig, RopeConfig


class Home(NamedTuple):
    """Where a model lives in transformers.

    Attributes:
        family: transformers' ``model_type``.
        rewritten: what is written otherwise than it was, with the same function.
        lost: what the home does not have, though it computes the same.
    """

    family: str
    rewritten: tuple[str, ...] = ()
    lost: tuple[str, ...] = ()


def obstacle(config: ModelConfig) -> str | None:
    """Name the feature for which no class of transformers computes this model; None where one does."""
    config = without_idle_windows(config)
    windows = set(config.windows)
    windowed = windows != {None}
    if config.position == "blend":
        return "position='blend', a stage on the way from learned to rotary positions"
    gated = config.norm == "rms" and config.mlp == "swiglu" and config.has_rotation
    if (config.norm != "layer" or config.mlp != "gelu") and not gated:
        return f"norm={config.norm!r} with mlp={config.mlp!r} and {config.position} positions"
    if config.has_rotation:
        if windowed and config.sinks:
            return f"sinks={config.sinks}: no class has tokens that stay visible outside the window"
        if set(config.dilations) != {1}:
            return f"dilation={config.dilation}: no class has windows with gaps"
        if len(windows) > 1:
            return f"windows that differ from layer to layer ({config.window})"
        if windows == {1}:
            return "window=1, which transformers computes wrongly with a cache"
        if gated and windowed and config.bias:
            return f"window={config.window} with biases: Mistral has none"
        return None
    return f"window={config.window} with {config.position} positions: no class has both" if windowed else None


def home_of(config: ModelConfig) -> Home:
    """Return the home of a model that has no `obstacle`."""
    rewritten, lost = [], []
    config_ = without_idle_windows(config)
    if config_ != config:
        rewritten.append("windows as wide as the context, which hide nothing, are left out")
    if config.norm == "rms":
        family = "llama" if set(config.windows) == {None} else "mistral"
    elif config.has_rotation:
        family = "starcoder2"
    else:
        family = "gpt_bigcode" if config.kv_heads == 1 < config.n_head else "gpt2"
    if not config.bias and config.norm == "layer":
        rewritten.append("biases, which the model does not have, are written as 0")
    if config.rope is not None and config.rope.scaling == "ntk":
        rewritten.append("NTK scaling is written as the base that it amounts to")
    if set(config.score_factors) != {1.0}:
        rewritten.append("the factors of the scores are multiplied into the weights of the queries")
    if config.position == "none":
        rewritten.append("a table of positions is written, all 0")
        lost.append(f"texts of more than {config.context_length:,} tokens, where the table ends")
    if family == "gpt2" and config.kv_heads != config.n_head:
        times = config.n_head // config.kv_heads
        lost.append(
            f"the saving of {config.kv_heads} key/value heads: each is repeated {times} times, so that weights and"
            f" cache are those of {config.n_head} again"
        )
    return Home(family, tuple(rewritten), tuple(lost))


def without_idle_windows(config: ModelConfig) -> ModelConfig:
    """Return the configuration without windows, where the longest text that it can read fits into all of them."""
    wide = all(w is None or w >= config.context_length for w in config.windows) and set(config.dilations) == {1}
    if config.has_table and wide and config.window is not None:
        return dataclasses.replace(config, window=None, sinks=0, dilation=1)
    return config


def move_in(checkpoint: Checkpoint, family: str) -> Checkpoint:
    """Return the same function in the fields that a family has.

    Factors of scores always go into the weights: GPT-2 has fields for them, but the fused attention of transformers 4
    ignores these silently, and other programs do not have them.

    Args:
        checkpoint: of a configuration without `obstacle`.
        family: transformers' ``model_type``.
    """
    config, state = without_idle_windows(checkpoint.config), dict(checkpoint.state)
    if not config.bias and config.norm == "layer":
        config, state = _with_biases(config, state)
    if config.position == "none":
        config = dataclasses.replace(config, position="learned")
        state["wpe.weight"] = torch.zeros(config.context_length, config.n_embd, dtype=state["wte.weight"].dtype)
    if config.rope is not None and config.rope.scaling == "ntk":
        grown = config.rope.theta * config.rope.factor ** (config.head_dim / (config.head_dim - 2))
        config = dataclasses.replace(config, rope=RopeConfig(theta=grown))
    if set(config.score_factors) != {1.0}:
        for layer, factor in enumerate(config.score_factors):
            for kind in ("weight", "bias") if config.bias else ("weight",):
                rows = state[f"h.{layer}.attn.c_attn.{kind}"].clone()
                rows[: config.n_embd] *= factor
                state[f"h.{layer}.attn.c_attn.{kind}"] = rows
        config = dataclasses.replace(config, scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False)
    if family == "gpt2" and config.kv_heads != config.n_head:
        config, state = _repeated(config, state)
    return checkpoint._replace(config=config, state=state)


def _with_biases(config: ModelConfig, state: dict[str, Tensor]) -> tuple[ModelConfig, dict[str, Tensor]]:
    shapes = {name: len(tensor) for name, tensor in state.items() if name.startswith(("h.", "ln_f"))}
    biases = {
        f"{name.removesuffix('weight')}bias": torch.zeros(size, dtype=state["wte.weight"].dtype)
        for name, size in shapes.items()
    }
    return dataclasses.replace(config, bias=True), state | biases


def _repeated(config: ModelConfig, state: dict[str, Tensor]) -> tuple[ModelConfig, dict[str, Tensor]]:
    times = config.n_head // config.kv_heads
    for layer in range(config.n_layer):
        for kind in ("weight", "bias"):
            name = f"h.{layer}.attn.c_attn.{kind}"
            heads = state[name].unflatten(0, (-1, config.head_dim))
            q, k, v = heads.split([config.n_head, config.kv_heads, config.kv_heads])
            state[name] = torch.cat([q, k.repeat_interleave(times, 0), v.repeat_interleave(times, 0)]).flatten(0, 1)
    return dataclasses.replace(config, n_kv_head=config.n_head), state
