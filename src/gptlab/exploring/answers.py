"""From questions of the page to what it shows. All numbers are those of `gptlab.inspecting`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from gptlab import inspecting
from gptlab.errors import GptlabError
from gptlab.exploring.calculating import calculator_here
from gptlab.exploring.computing import Check
from gptlab.exploring.packing import pack, shrink
from gptlab.exploring.questions import Effects, Maps, Nothing, OfModel, OfText, Scores, Sharing, Shift, Steps, Without
from gptlab.exploring.shelf import Shelf
from gptlab.language_model import LanguageModel
from gptlab.model import cost
from gptlab.model.masks import Visibility
from gptlab.serving.answers import token_text
from gptlab.serving.bodies import Body


class Read(NamedTuple):
    """A text as a model reads it.

    Attributes:
        lm: the model.
        ids: its tokens, the one that begins a document before them, where there is one.
        n_bytes: of the text that the losses are of: all of it, or what follows the first token.
    """

    lm: LanguageModel
    ids: list[int]
    n_bytes: int


def read(shelf: Shelf, asked: OfText, least: int = 2) -> Read:
    """Return the tokens of a text.

    Raises:
        GptlabError: too few tokens, or more than the model's context.
    """
    lm = shelf.get(asked.model)
    tokenizer, limit = lm.needs_tokenizer(), lm.config.context_length
    start = tokenizer.start_of_text
    own = tokenizer.encode(asked.text)
    ids = own if start is None else [start, *own]
    if len(ids) < least or not own:
        raise GptlabError("the text is too short to look at; type a few words")
    if len(ids) > limit:
        raise GptlabError(
            f"the text has {len(ids):,} tokens and {asked.model} reads {limit:,} at most; make it shorter by about"
            f" {100 * (1 - limit / len(ids)):.0f}%"
        )
    unscored = 0 if start is not None else len(tokenizer.decode_bytes(own[:1]))
    return Read(lm, ids, len(asked.text.encode()) - unscored)


def facts(shelf: Shelf, asked: OfModel, check: Check) -> dict[str, Any]:
    """Describe a model; it is loaded for it."""
    lm = shelf.get(asked.model)
    config = lm.config
    return {
        "parameters": sum(cost.parameters(config).values()),
        "context": config.context_length,
        "vocabulary": lm.vocabulary()["vocab_size"],
        "layers": config.n_layer,
        "heads": config.n_head,
        "keyHeads": config.kv_heads,
        "width": config.head_dim,
        "position": config.position,
        "windows": list(config.windows),
        "sinks": config.sinks,
        "cacheBytesPerToken": cost.cache_bytes_per_token(config, 2),
    }


def losses(shelf: Shelf, asked: OfText, check: Check) -> dict[str, Any]:
    """Say how hard each token was to predict."""
    lm, ids, n_bytes = read(shelf, asked)
    nats = inspecting.token_losses(lm.model, ids)
    tokenizer = lm.needs_tokenizer()
    return {
        "ids": ids,
        "tokens": [token_text(tokenizer, token) for token in ids],
        "losses": nats.tolist(),
        "total": _sum(nats),
        "mean": _mean(nats),
        "bitsPerByte": _sum(nats) / math.log(2) / n_bytes,
    }


def maps(shelf: Shelf, asked: Maps, check: Check) -> Tensor:
    """Return attention maps as uint8 (`gptlab.exploring.packing`), (heads, rows, columns)."""
    lm, ids, _ = read(shelf, asked)
    layer = asked.layer
    visible = inspecting.visible(lm.config, layer, len(ids))
    if asked.n_kv_head is not None:
        sharing = shelf.shared(asked.model, asked.n_kv_head, ids)
        check()
        weights = sharing.in_source_order(inspecting.attention_maps(sharing.model, ids, [layer])[0], layer)
    elif asked.by:
        weights = inspecting.shifted(lm.model, ids, asked.by, [layer]).maps_after[0]
    else:
        weights = shelf.inputs(asked.model, ids).maps(layer)
    if asked.head is not None:
        if asked.head >= lm.config.n_head:
            raise GptlabError(f"head must be 0 to {lm.config.n_head - 1}, got {asked.head}")
        weights = weights[asked.head : asked.head + 1]
    packed = pack(weights.cpu(), visible)
    return packed if asked.size is None else shrink(packed, asked.size)


def share(shelf: Shelf, asked: Sharing, check: Check) -> dict[str, Any]:
    """Convert a model to fewer key/value heads and say what was lost."""
    lm, ids, _ = read(shelf, asked)
    sharing = shelf.shared(asked.model, asked.n_kv_head, ids)
    return {
        "groups": [[list(group) for group in layer] for layer in sharing.groups],
        "keyErrors": sharing.errors.keys.tolist(),
        "valueErrors": sharing.errors.values.tolist(),
        "layerKeyErrors": sharing.layer_errors.keys.tolist(),
        "layerValueErrors": sharing.layer_errors.values.tolist(),
        "before": sharing.loss_before,
        "after": sharing.loss_after,
        "cacheBytesPerToken": [cost.cache_bytes_per_token(one.config, 2) for one in (lm.model, sharing.model)],
    }


def scores(shelf: Shelf, asked: Scores, check: Check) -> dict[str, Any]:
    """Say what a head's scores owe to distance, pair by pair where positions rotate."""
    lm, ids, _ = read(shelf, asked)
    found = inspecting.position_scores(lm.model, ids, asked.layer, asked.head)
    return {
        "total": found.total.tolist(),
        "pairs": None if found.pairs is None else found.pairs.T.tolist(),
        "angles": None if found.angles is None else found.angles.tolist(),
        "note": found.note,
    }


def shift(shelf: Shelf, asked: Shift, check: Check) -> dict[str, Any]:
    """Move a text to other positions and say what changed."""
    lm, ids, _ = read(shelf, asked)
    found = inspecting.shifted(lm.model, ids, asked.by, [])
    return {
        "before": _mean(found.losses_before),
        "after": _mean(found.losses_after),
        "largestLossChange": found.largest_loss_change,
        "largestWeightChange": found.largest_weight_change,
    }


def steps(shelf: Shelf, asked: Steps, check: Check) -> dict[str, Any]:
    """Continue a text and show each step."""
    lm, ids, _ = read(shelf, asked, least=1)
    found = []
    for step in inspecting.generation_steps(
        lm, ids, asked.n, seed=asked.seed, temperature=float(asked.temperature), top=8
    ):
        check()
        found.append(step)
    layers: dict[Visibility, list[int]] = {}  # caches of those that see alike hold alike
    for layer, visibility in enumerate(cost.visibilities(lm.config)):
        layers.setdefault(visibility, []).append(layer)
    return {
        "prompt": len(ids),
        "layers": list(layers.values()),
        "windows": [visibility.window for visibility in layers],
        "sinks": lm.config.sinks,
        "steps": [
            {
                "candidates": [[one.text, one.probability, one.chance] for one in step.candidates],
                "chosen": [step.chosen.text, step.chosen.probability, step.chosen.chance],
                "slots": [step.slots[own[0]] for own in layers.values()],
                "bytes": step.cache_bytes,
                "seconds": step.seconds,
                "ends": step.ends,
            }
            for step in found
        ],
    }


def effects(shelf: Shelf, asked: Effects, check: Check) -> dict[str, Any]:
    """Measure by how much the loss changes when one head is taken out, for every head of a layer."""
    lm, ids, _ = read(shelf, asked)
    found = inspecting.head_effects(lm.model, ids, lambda done, of: check(), [asked.layer])
    return {"effects": found[0].tolist()}


def without(shelf: Shelf, asked: Without, check: Check) -> dict[str, Any]:
    """Take parts of a model out and say what becomes of the loss."""
    lm, ids, _ = read(shelf, asked)
    before = inspecting.token_losses(lm.model, ids)
    heads = [(layer, head) for layer, head in asked.heads]
    with inspecting.ablated(lm.model, heads=heads, attention=asked.attention, sinks=asked.sinks):
        after = inspecting.token_losses(lm.model, ids)
    return {
        "before": _mean(before),
        "after": _mean(after),
        "changes": (after - before).tolist(),
    }


def costs(shelf: Shelf, asked: Nothing, check: Check) -> dict[str, Any]:
    """Measure this machine, and return what the calculator of the report starts from."""
    return calculator_here(shelf.device)


def _sum(nats: Tensor) -> float:
    return nats.double().sum().item()


def _mean(nats: Tensor) -> float:
    return nats.double().mean().item()


ANSWERS: Mapping[str, tuple[type[Body], Callable[[Shelf, Any, Check], dict[str, Any] | Tensor]]] = {
    "facts": (OfModel, facts),
    "losses": (OfText, losses),
    "maps": (Maps, maps),
    "share": (Sharing, share),
    "scores": (Scores, scores),
    "shift": (Shift, shift),
    "steps": (Steps, steps),
    "effects": (Effects, effects),
    "without": (Without, without),
    "costs": (Nothing, costs),
}
"""What can be asked, by the last part of its address: the body that belongs to it, and what answers."""
