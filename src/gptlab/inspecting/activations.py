"""What a model computes on the way: read it, take parts of it out, put in that of another run."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from gptlab.config import ModelConfig
from gptlab.errors import GptlabError
from gptlab.inspecting.running import as_row, check_index, looking
from gptlab.inspecting.sites import Edit, Place, Site, editing, place_of
from gptlab.model.gpt import GPT

Instead = Literal["zero", "mean"]
"""What stands in place of an output that is taken out: zeros, or its mean over the tokens of a text."""


def trace(model: GPT, ids: Tensor | Sequence[int], sites: Iterable[Site]) -> dict[Site, Tensor]:
    """Return what a model computes at some places, from one forward pass.

    Args:
        model: any variant, in any dtype.
        ids: (T,) int64.
        sites: names of places (`gptlab.inspecting.sites` has them all).

    Returns:
        float32 tensors by name, in the order asked for: (T, C); for ``heads.LAYER`` (T, H, D), for ``head.LAYER.HEAD``
        (T, D). They are copies: what is done to them is not done to the model.

    Raises:
        GptlabError: a place that the model does not have, or ids that it cannot read.
    """
    row = as_row(model, ids)
    places = {site: place_of(model.config, site) for site in sites}
    seen: dict[tuple[str, int], Tensor] = {}

    def keep(kind: str, layer: int) -> Edit:
        def edit(x: Tensor) -> Tensor:
            seen[kind, layer] = x[0].float().clone()
            return x

        return edit

    wanted = dict.fromkeys((kind, layer) for kind, layer, _ in places.values())
    with looking(model), editing(model, [(*place, keep(*place)) for place in wanted]):
        model(row, head=lambda hidden, _: hidden)
    return {site: _part(seen[kind, layer], head) for site, (kind, layer, head) in places.items()}


def _part(x: Tensor, head: int | None) -> Tensor:
    return x if head is None else x[:, head].clone()


@contextlib.contextmanager
def patched(model: GPT, activations: Mapping[Site, Tensor], tokens: Collection[int] | None = None) -> Iterator[None]:
    """Put the activations of another run in the place of a model's own inside the ``with`` block.

    Args:
        model: left as it was afterwards, also where an error ends the block.
        activations: by place, of the shapes that `trace` gives them.
        tokens: positions in the text at which they are put in; None: at all of them.

    Raises:
        GptlabError: a place that the model does not have, a tensor of another shape, and at the next forward pass a
            text of another length.
    """
    config = model.config
    places = {site: place_of(config, site) for site in activations}
    edits = []
    for site, (kind, layer, head) in places.items():
        value = activations[site]
        shape = _shape(config, places[site])
        if not isinstance(value, Tensor) or value.shape[1:] != shape or not len(value):
            words = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise GptlabError(f"{site} must be given (T, {', '.join(map(str, shape))}), got {words}")
        for token in tokens or ():
            check_index(len(value), token, "a token to patch")
        edits.append((kind, layer, _putting(site, value.detach(), head, None if tokens is None else sorted(tokens))))
    with editing(model, edits):
        yield


def _shape(config: ModelConfig, place: Place) -> tuple[int, ...]:
    if place.kind != "heads":
        return (config.n_embd,)
    return (config.n_head, config.head_dim) if place.head is None else (config.head_dim,)


def _putting(site: Site, value: Tensor, head: int | None, tokens: list[int] | None) -> Edit:
    """Return a function that puts ``value`` (T, ...) into what is at its place."""

    def edit(x: Tensor) -> Tensor:
        if x.shape[1] != len(value):
            raise GptlabError(
                f"{site} holds {len(value)} tokens and the text has {x.shape[1]}; patch between texts of one length"
            )
        new = x.clone()
        part = new if head is None else new[:, :, head]
        where = slice(None) if tokens is None else torch.tensor(tokens, dtype=torch.int64, device=x.device)
        part[:, where] = value.to(x)[where]
        return new

    return edit


@contextlib.contextmanager
def ablated(
    model: GPT,
    heads: Iterable[tuple[int, int]] = (),
    attention: Iterable[int] = (),
    mlps: Iterable[int] = (),
    sinks: bool = False,
    by: Instead = "zero",
    over: Tensor | Sequence[int] | None = None,
) -> Iterator[None]:
    """Take parts of a model out inside the ``with`` block; everything is put back afterwards, also after an error.

    Args:
        model: any variant, in any dtype.
        heads: (layer, head) of heads whose outputs are taken out. The bias of the output projection stays.
        attention: layers whose whole attention adds nothing.
        mlps: layers whose feed-forward network adds nothing.
        sinks: hide the first tokens that windows leave visible, where they are outside the window.
        by: ``zero``, or ``mean``: its mean over the tokens of the text ``over``.
        over: (T,) int64; only with ``mean``.

    Raises:
        GptlabError: a layer or head that the model does not have, sinks of a model without any, ``mean`` without a
            text, or a text without ``mean``.
    """
    config = model.config
    outs = [_place(config, "heads", layer, head) for layer, head in heads]
    outs += [_place(config, "attention", layer) for layer in attention]
    outs += [_place(config, "mlp", layer) for layer in mlps]
    if by not in ("zero", "mean"):
        raise GptlabError(f"by must be zero or mean, got {by!r}")
    if (by == "mean") != (over is not None):
        raise GptlabError("by='mean' and over=ids go together: the mean is taken over the tokens of a text")
    if sinks and not config.sinks:
        raise GptlabError("the model has no sinks to hide; leave sinks out")
    means: dict[Site, Tensor] = {}
    if over is not None:
        means = {site: x.mean(0) for site, x in trace(model, over, [_name(place) for place in outs]).items()}
    edits = [(place.kind, place.layer, _removing(place.head, means.get(_name(place)))) for place in outs]
    with editing(model, edits), _without_sinks(model) if sinks else contextlib.nullcontext():
        yield


def _place(config: ModelConfig, kind: str, layer: int, head: int | None = None) -> Place:
    check_index(config.n_layer, layer, "layer")
    return Place(kind, layer, None if head is None else check_index(config.n_head, head, "head"))


def _name(place: Place) -> Site:
    kind, layer, head = place
    return f"{kind}.{layer}" if head is None else f"head.{layer}.{head}"


def _removing(head: int | None, mean: Tensor | None) -> Edit:
    """Return a function that puts zeros, or ``mean`` (C,) or (D,), in place of an output."""

    def edit(x: Tensor) -> Tensor:
        new = x.clone()
        (new if head is None else new[:, :, head])[:] = 0.0 if mean is None else mean.to(x)
        return new

    return edit


@contextlib.contextmanager
def _without_sinks(model: GPT) -> Iterator[None]:
    before = [block.attn.visibility for block in model.blocks]
    try:
        for block in model.blocks:
            block.attn.visibility = dataclasses.replace(block.attn.visibility, sinks=0)
        yield
    finally:
        for block, visibility in zip(model.blocks, before, strict=True):
            block.attn.visibility = visibility
