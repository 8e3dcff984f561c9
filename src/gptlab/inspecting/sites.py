"""Places inside a model where something can be read, put in or taken out, by name.

    residual.3     what block 3 reads: the residual stream before it, (T, C); residual.L, after the last block
    attention.3    what the attention of layer 3 adds to the residual stream, (T, C)
    heads.3        the outputs of its heads, before the output projection mixes them, (T, H, D)
    head.3.5       that of head 5 alone, (T, D)
    mlp.3          what the feed-forward network of layer 3 adds to the residual stream, (T, C)

Each is one hook on one module, so that reading and writing are the same for every variant. The residual stream between
the two halves of a layer is ``residual.3 + attention.3``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from torch import Tensor

from gptlab.config import ModelConfig
from gptlab.errors import GptlabError, nearest
from gptlab.model.gpt import GPT

Site = str
"""The name of a place, such as ``attention.3``."""
KINDS = ("residual", "attention", "heads", "mlp")
Edit = Callable[[Tensor], Tensor]
"""Takes what is at a place, (B, T, C) or for heads (B, T, H, D), and returns what shall be there."""


class Place(NamedTuple):
    """A site, taken apart; ``head`` is None for all heads of a layer."""

    kind: str
    layer: int
    head: int | None = None


def sites(config: ModelConfig, *kinds: str) -> list[Site]:
    """Return the names of all places of some kinds, from the embeddings up.

    Args:
        config: of the model.
        *kinds: ``residual``, ``attention``, ``heads``, ``mlp``; none is all four.

    Raises:
        GptlabError: an unknown kind.
    """
    for kind in kinds:
        if kind not in KINDS:
            raise GptlabError(f"there is no kind of site {kind!r}{nearest(kind, KINDS)}; there are {', '.join(KINDS)}")
    wanted = kinds or KINDS
    every = [f"{kind}.{layer}" for layer in range(config.n_layer) for kind in KINDS if kind in wanted]
    return [*every, *[f"residual.{config.n_layer}"] * ("residual" in wanted)]


def place_of(config: ModelConfig, site: Any) -> Place:
    """Take the name of a site apart.

    Raises:
        GptlabError: not a name, or a layer or head that the model does not have.
    """
    kind, *numbers = site.split(".") if isinstance(site, str) else [""]
    known = {**dict.fromkeys(KINDS, 1), "head": 2}
    if known.get(kind) != len(numbers) or not all(number.isdecimal() for number in numbers):
        hint = nearest(kind, known) if kind not in known else ""
        raise GptlabError(
            f"{site!r} is not a site{hint}; sites are residual.LAYER, attention.LAYER, heads.LAYER, head.LAYER.HEAD and"
            " mlp.LAYER, such as attention.0"
        )
    layers = config.n_layer + (kind == "residual")  # one more: after the last block
    values = [int(number) for number in numbers]
    for value, end, what in zip(values, (layers, config.n_head), ("layer", "head"), strict=False):
        if value >= end:
            raise GptlabError(f"{site}: the model has no {what} {value}; here it must be 0 to {end - 1}")
    return Place("heads" if kind == "head" else kind, *values)


@contextlib.contextmanager
def editing(model: GPT, edits: Iterable[tuple[str, int, Edit]]) -> Iterator[None]:
    """Let functions read and replace what is at some places inside the ``with`` block; leave nothing on the model.

    Functions at one place are called in the order of their ``with`` blocks, and within one in the order given.

    Args:
        model: whose `GPT.forward` calls them.
        edits: kind and layer of each place, and what to do there.
    """
    with contextlib.ExitStack() as stack:
        for kind, layer, edit in edits:
            stack.callback(_hook(model, kind, layer, edit).remove)
        yield


def _hook(model: GPT, kind: str, layer: int, edit: Edit) -> Any:
    if kind == "residual":
        reader = model.blocks[layer] if layer < model.config.n_layer else model.ln_f
        return reader.register_forward_pre_hook(lambda _, inputs: (edit(inputs[0]), *inputs[1:]))
    block = model.blocks[layer]
    if kind == "heads":
        width = model.config.head_dim
        return block.attn.c_proj.register_forward_pre_hook(
            lambda _, inputs: (edit(inputs[0].unflatten(-1, (-1, width))).flatten(-2), *inputs[1:])
        )
    module = block.attn if kind == "attention" else block.mlp
    return module.register_forward_hook(lambda _module, _inputs, output: edit(output))
