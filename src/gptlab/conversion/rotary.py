"""Learned positions to rotary ones, for a trained model: at once, by way of a blend of both, or to none at all.

A table of positions adds to the stream what a token's place is; rotation makes scores depend on distances. Nothing in
the one tells how the other should be, so something is lost, and two things make it less:

- *The mean of the table stays.* Its mean over positions can be added to every row of ``wte`` and taken from every row
  of the table: the stream is the same. Only what differs from position to position is deleted with the table. Where the
  output head is ``wte`` too, the logits of a position, h wte^T, all grow by the same number, h times the mean, and no
  probability changes.
- *The gauge of queries and keys* is spent so that rotation disturbs attention least (`gptlab.conversion.gauge`).

Or nothing is lost at first: a model with ``position="blend"`` computes what its source does, and training takes it,
while its scales change, to rotary positions (`finish_blend`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from gptlab.config import RopeConfig
from gptlab.conversion.gauge import Gauge, spend_gauge
from gptlab.conversion.layers import assemble, read_heads, rebuild
from gptlab.conversion.statistics import batches
from gptlab.errors import GptlabError, nearest
from gptlab.model.gpt import GPT, SCALES

MOST_TOKENS = 4096
"""Of a longer text, rows spread over it are looked at, of about so many tokens: half of that is enough for 2.7M
parameters."""
HEAD_ROWS = 256
"""Positions whose logits are held at once: 50 MB with GPT-2's vocabulary."""
RotaryMethod = Literal["fit", "gauge", "abrupt"]
"""How a model comes to rotary positions:

- ``fit``: as ``gauge``, and then the queries and keys themselves are fitted to the source's attention.
- ``gauge``: queries and keys are put into the gauge in which rotation disturbs them least, on a calibration text;
  before rotation that changes nothing.
- ``abrupt``: queries and keys stay as they are.
"""


def best_rotary(position: Literal["rope", "blend"]) -> RotaryMethod:
    """Return the method that loses least where there is a calibration text."""
    return "fit" if position == "rope" else "gauge"


@torch.no_grad()
def to_rope(
    model: GPT,
    *,
    method: RotaryMethod = "fit",
    rope: RopeConfig | None = None,
    rows: Tensor | Sequence[Tensor] | None = None,
    seed: int = 0,
) -> GPT:
    """Return a new model with rotary positions in place of learned ones; the source is left as it is.

    On the calibration text (on what is looked at of it, see `MOST_TOKENS`) no method has more nats per token than
    ``abrupt``: where one would, ``abrupt`` it is.

    Args:
        model: the source.
        method: see `RotaryMethod`.
        rope: settings of the rotary positions; None is their default.
        rows: (N, T) int64 token ids, or sequences (T,), for ``fit`` and ``gauge``; best as long as the context.
        seed: of the same.

    Raises:
        GptlabError: a source without learned positions, heads of odd width, an unknown method, no text to fit on.
    """
    return rotated(model, method=method, rope=rope, rows=rows, seed=seed)[0]


@torch.no_grad()
def rotated(
    model: GPT,
    *,
    method: RotaryMethod,
    rope: RopeConfig | None = None,
    rows: Tensor | Sequence[Tensor] | None = None,
    seed: int = 0,
) -> tuple[GPT, RotaryMethod]:
    """Return what `to_rope` returns, and the method that it came by: ``abrupt`` where the one asked for did worse."""
    _check(model, method, rows)
    abrupt = _without_table(_folded(model), rope)
    fitted = None if method == "abrupt" else _fitted(model, rope, rows, method == "fit", seed)
    if fitted is None:
        return abrupt, "abrupt"
    return rebuild(abrupt, lambda layer, _: read_heads(fitted[1].blocks[layer].attn)), method


@torch.no_grad()
def to_blend(
    model: GPT,
    *,
    method: RotaryMethod = "gauge",
    rope: RopeConfig | None = None,
    rows: Tensor | Sequence[Tensor] | None = None,
    seed: int = 0,
) -> GPT:
    """Return a new model between learned and rotary positions, at its start: it gives the source's probabilities.

    With ``gauge`` queries and keys are in the gauge that suits the blend's end. The mean of the table is in ``wte``, so
    that it stays when the table's factor falls; where the head is ``wte`` too, the logits of a position are all greater
    by one number.

    Arguments and errors as `to_rope`, without ``fit``.
    """
    return blended(model, method=method, rope=rope, rows=rows, seed=seed)[0]


@torch.no_grad()
def blended(
    model: GPT,
    *,
    method: RotaryMethod,
    rope: RopeConfig | None = None,
    rows: Tensor | Sequence[Tensor] | None = None,
    seed: int = 0,
) -> tuple[GPT, RotaryMethod]:
    """Return what `to_blend` returns, and the method that it came by: ``abrupt`` where the one asked for did worse."""
    if method == "fit":
        raise GptlabError("'fit' changes what a model computes, which a blend at its start must not; choose 'gauge'")
    _check(model, method, rows)
    config = dataclasses.replace(model.config, position="blend", rope=rope)
    scales = {"rope_scale": torch.zeros(config.head_dim // 2), "wpe_scale": torch.ones(())}
    scales = {name: scale.to(model.wte.weight.device, torch.float32) for name, scale in scales.items()}
    blend = assemble(config, {**_folded(model).tensors(), **scales}, training=model.training)
    fitted = None if method == "abrupt" else _fitted(model, rope, rows, False, seed)
    if fitted is None:
        return blend, "abrupt"
    return rebuild(blend, lambda layer, heads: fitted[0][layer].apply(heads)), method


@torch.no_grad()
def finish_blend(model: GPT) -> GPT:
    """Return a model whose blend has come to its end as one with rotary positions: the same function, the table gone.

    Raises:
        GptlabError: the model is not a blend, or its scales are not yet 1 and 0.
    """
    if model.config.position != "blend":
        raise GptlabError(f"only a model with position='blend' can be finished, this one has {model.config.position!r}")
    if not bool((model.rope_scale == 1).all()) or model.wpe_scale != 0:
        raise GptlabError(
            f"the blend is not at its end: rope_scale is {model.rope_scale.min():.3g} to {model.rope_scale.max():.3g}"
            f" and wpe_scale {model.wpe_scale:.3g}, not 1 and 0; train it to there: gptlab train uptrain --from"
            " MODEL --data DATA --set blend.ramp=geometric"
        )
    return _without_table(model, model.config.rope)


@torch.no_grad()
def without_positions(model: GPT) -> GPT:
    """Return a new model without positions: a table is deleted but for its mean, or nothing is rotated any more.

    The causal mask alone then tells tokens apart; further training brings back what was lost (Gelberg et al. 2026,
    *DroPE*).

    Raises:
        GptlabError: the model is a blend.
    """
    if model.config.position == "blend":
        raise GptlabError("a blend is on its way to rotary positions; convert the model that it came from")
    config = dataclasses.replace(model.config, position="none", rope=None)
    source = _folded(model) if model.config.position == "learned" else model
    kept = {name: tensor.clone() for name, tensor in source.tensors().items() if name != "wpe.weight"}
    return assemble(config, kept, training=model.training)


def _check(model: GPT, method: str, rows: Tensor | Sequence[Tensor] | None) -> None:
    position = model.config.position
    if position == "blend":
        raise GptlabError("this model is a blend already; train it to its end, or convert the model that it came from")
    if position != "learned":
        raise GptlabError(
            f"only learned positions are converted to rotary ones, this model has position={position!r};"
            " what a table would hold cannot be told from it"
        )
    if method not in get_args(RotaryMethod):
        hint = nearest(method, get_args(RotaryMethod))
        raise GptlabError(f"method of positions must be fit, gauge or abrupt, got {method!r}{hint}")
    if method != "abrupt" and (rows is None or not sum(map(len, rows))):
        raise GptlabError(f"{method!r} looks at a calibration text; give it rows of tokens, or choose 'abrupt'")


def _folded(model: GPT) -> GPT:
    """Return a copy whose table has mean 0 over positions, and ``wte`` that mean; its own tensors throughout."""
    state = {name: tensor.clone() for name, tensor in model.tensors().items()}
    mean = state["wpe.weight"].double().mean(0)
    for name, sign in (("wte.weight", 1), ("wpe.weight", -1)):
        state[name] = (state[name].double() + sign * mean).to(state[name])
    return assemble(model.config, state, training=model.training)


def _without_table(model: GPT, rope: RopeConfig | None) -> GPT:
    """Return a copy with rotary positions alone."""
    config = dataclasses.replace(model.config, position="rope", rope=rope)
    kept = {name: tensor.clone() for name, tensor in model.tensors().items() if name not in ("wpe.weight", *SCALES)}
    return assemble(config, kept, training=model.training)


def _fitted(
    model: GPT, rope: RopeConfig | None, rows: Tensor | Sequence[Tensor] | None, beyond: bool, seed: int
) -> tuple[list[Gauge], GPT] | None:
    """Return the gauge of every layer and the rotary model; None where the model is better off without."""
    rows = _spread([] if rows is None else [row for row in rows if len(row)])
    # Copies in float32, since a fit in bfloat16 would not see its own steps.
    source = rebuild(model, lambda _, heads: heads).float().eval()
    abrupt = _without_table(_folded(source), rope)
    rotated = rebuild(abrupt, lambda _, heads: heads)
    gauges = spend_gauge(source, rotated, rows, beyond=beyond, seed=seed)
    return (gauges, rotated) if _nats(rotated, rows) <= _nats(abrupt, rows) else None


def _spread(rows: list[Tensor]) -> list[Tensor]:
    """Return about `MOST_TOKENS` of a text."""
    n = max(1, min(len(rows), len(rows) * MOST_TOKENS // sum(map(len, rows))))
    return [rows[i * len(rows) // n] for i in range(n)]


def _nats(model: GPT, rows: Sequence[Tensor]) -> float:
    """Return the nats of a text in all: of every token but the first of each row."""
    total = torch.zeros((), dtype=torch.float64)
    for ids in batches(rows):
        ids = ids.to(model.wte.weight.device)
        hidden = model(ids, head=lambda hidden, _: hidden)[:, :-1].flatten(0, 1)
        for x, target in zip(hidden.split(HEAD_ROWS), ids[:, 1:].flatten().split(HEAD_ROWS), strict=True):
            total += F.cross_entropy(model.lm_head(x).float(), target, reduction="sum").double().cpu()
    return total.item()
