"""A longer context: learned positions copied side by side (Beltagy et al. 2020, *Longformer*, section 5).

A learned table ends at its last position. Longformer begins the further ones as copies of the whole table: position
T + i as position i, and so on. Heads that look at the tokens just before then find them at every place but the few
after a seam. Up to T tokens the model computes the same; beyond, it was never trained, and a little training is due.

Rotary positions and models without positions have no table: there the context length is but a number, and what is
computed stays the same at every length. The length trained on stays known (`gptlab.config.RopeConfig.trained_length`):
``yarn`` is worked out from it. How well a model of rotary positions does beyond the texts that it was trained
on is a matter of their scaling (`rescale`).
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch

from gptlab.config import ModelConfig, RopeConfig
from gptlab.conversion.layers import assemble
from gptlab.errors import GptlabError
from gptlab.model.gpt import GPT

Extension = Literal["copy", "random"]
"""Where further learned positions start: as copies, or as a new model's, for comparison."""


def check_length(config: ModelConfig, length: int) -> None:
    """Refuse lengths that a model's context cannot be extended to.

    Raises:
        GptlabError: a length below the model's own.
    """
    if length < config.context_length:
        raise GptlabError(
            f"a context of {length:,} is shorter than the model's {config.context_length:,}; a shorter text needs no"
            " conversion"
        )


def with_trained_length(config: ModelConfig) -> RopeConfig:
    """Return a model's settings of rotary positions with the length that it was trained on written down."""
    return dataclasses.replace(config.rope or RopeConfig(), trained_length=config.trained_length)


@torch.no_grad()
def extend_context(model: GPT, length: int, *, method: Extension = "copy", seed: int = 0) -> GPT:
    """Return a new model for texts of ``length`` tokens; up to its old length the source computes the same.

    Args:
        model: the source.
        length: the new ``context_length``.
        method: see `Extension`; without a table there is nothing to start.
        seed: of ``random``.

    Raises:
        GptlabError: as `check_length`.
    """
    check_length(model.config, length)
    config = dataclasses.replace(model.config, context_length=length)
    if model.config.position == "rope" and length != model.config.context_length:
        config = dataclasses.replace(config, rope=with_trained_length(model.config))
    state = {name: tensor.clone() for name, tensor in model.tensors().items()}
    if config.has_table:
        table = state["wpe.weight"]  # (T, C)
        if method == "copy":
            longer = table.repeat(-(-length // len(table)), 1)[:length]
        else:
            longer = GPT(config, seed).wpe.weight.detach().to(table)
            longer[: len(table)] = table
        state["wpe.weight"] = longer.clone()
    return assemble(config, state, training=model.training)


@torch.no_grad()
def rescale(model: GPT, rope: RopeConfig) -> GPT:
    """Return a copy of a model of rotary positions whose angles are scaled otherwise (`gptlab.model.rope`)."""
    config = dataclasses.replace(model.config, rope=rope)
    return assemble(config, {name: tensor.clone() for name, tensor in model.tensors().items()}, training=model.training)
