"""Several changes of a trained model at once, in the order that loses least.

heads -> positions -> windows -> output projections -> context -> rope scaling

Heads come before positions: as long as positions do not rotate keys, a head's keys may be mixed freely, afterwards only
pair by pair. Positions come before windows, since they are fitted with the whole context in sight. Output projections
are fitted when all that heads compute has changed. A longer context comes last: what is fitted is fitted on texts of a
length that the source knows.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from gptlab.config import ModelConfig, RopeConfig
from gptlab.conversion.changes import Changes, target
from gptlab.conversion.context import extend_context, rescale
from gptlab.conversion.heads import LOOKING, best_grouping, best_method, regroup, repeat_heads
from gptlab.conversion.refit import refit_outputs
from gptlab.conversion.rotary import (
    RotaryMethod,
    best_rotary,
    blended,
    finish_blend,
    rotated,
    without_positions,
)
from gptlab.conversion.statistics import collect_statistics
from gptlab.conversion.windows import narrow
from gptlab.errors import GptlabError
from gptlab.model.gpt import GPT

__all__ = ["Changes", "Converted", "Step", "convert", "plan", "target", "why"]


@dataclass(frozen=True)
class Step:
    """One step of a conversion, in words.

    Attributes:
        name: ``heads``, ``positions``, ``windows``, ``output projections``, ``context`` or ``rope scaling``.
        change: what is done.
        exact: what stays exactly as it was.
        moved: what does not; empty where nothing moves.
        fitted: whether it looks at the calibration text.
    """

    name: str
    change: str
    exact: str
    moved: str = ""
    fitted: bool = False


ORDER = {
    "heads": "heads come first: once positions rotate keys, these can be mixed only pair by pair",
    "positions": "positions come before windows: they are fitted with the whole context in sight",
    "windows": "",
    "output projections": "output projections are fitted when all that heads compute has changed",
    "context": "the context comes last: what is fitted is fitted on texts as long as the source knows",
    "rope scaling": "angles are scaled when nothing is fitted any more",
}
"""Why steps come in this order."""


def why(steps: Sequence[Step]) -> str:
    """Return in words why these steps are taken in this order; empty for a single one."""
    return "; ".join(ORDER[step.name] for step in steps if ORDER[step.name]) if len(steps) > 1 else ""


@dataclass(frozen=True)
class Converted:
    """A converted model, and what was done, in order."""

    model: GPT
    steps: tuple[Step, ...]


def plan(config: ModelConfig, changes: Changes, *, calibrated: bool) -> tuple[Step, ...]:
    """Return the steps that a conversion will take, in order; none where the configuration stays the same.

    Args:
        config: of the source.
        changes: what is asked.
        calibrated: whether there is a calibration text.

    Raises:
        GptlabError: as `target`.
    """
    return tuple(step for step, _ in _steps(config, changes, None, calibrated))


def convert(model: GPT, changes: Changes, rows: Tensor | Sequence[Tensor] | None = None) -> Converted:
    """Return a converted copy of a model and what was done; the source is left as it is.

    Args:
        model: the source.
        changes: what is asked.
        rows: (N, T) int64 token ids, or sequences (T,), the calibration text; None or empty: from the weights alone.

    Raises:
        GptlabError: as `target`.
    """
    rows = [] if rows is None else list(rows)
    steps = _steps(model.config, changes, rows, bool(rows))
    new = model
    with warnings.catch_warnings():
        # On the way a window may be as long as the context; what counts is whether it is in the end.
        warnings.simplefilter("ignore", UserWarning)
        taken = []
        for step, act in steps:
            made = act(model, new)
            new, step = made if isinstance(made, tuple) else (made, step)
            taken.append(step)
    if new is model:
        new = repeat_heads(model, model.config.kv_heads)
    return Converted(new, tuple(taken))


Act = Callable[[GPT, GPT], GPT | tuple[GPT, Step]]
"""Takes the source and what the steps before made of it; gives the step too where another one was taken."""


def _steps(
    config: ModelConfig, changes: Changes, rows: Sequence[Tensor] | None, calibrated: bool
) -> list[tuple[Step, Act]]:
    """Return what is to be done, in order."""
    new = target(config, changes)
    steps: list[tuple[Step, Act]] = []
    if new.n_kv_head != config.n_kv_head:
        steps.append(_heads(config, changes, rows, calibrated))
    if new.position != config.position:
        steps.append(_positions(config, changes, rows, calibrated))
    if (new.windows, new.sinks, new.dilations) != (config.windows, config.sinks, config.dilations):
        steps.append(_windows(config, new))
    if changes.refit and not calibrated:
        raise GptlabError("refit fits the output projections on a calibration text; give one, or leave it out")
    aligned = new.kv_heads < config.kv_heads and (changes.method or best_method(config)) == "procrustes"
    pays = calibrated and aligned and new.position == config.position
    if changes.refit or (changes.refit is None and pays):
        steps.append(_output_projections(rows))
    if new.context_length != config.context_length:
        steps.append(_context(config, new, changes))
    if new.position == "rope" and _turns(new.rope) != _turns(changes.rope or config.rope):
        steps.append(_scaling(new))
    return steps


def _heads(config: ModelConfig, changes: Changes, rows: Sequence[Tensor] | None, calibrated: bool) -> tuple[Step, Act]:
    asked = changes.n_kv_head
    assert asked is not None
    before = f"{config.kv_heads} key/value head{'s' * (config.kv_heads > 1)}"
    if asked > config.kv_heads:
        step = Step("heads", f"{before} -> {asked}, each repeated {asked // config.kv_heads} times", "all outputs")
        return step, lambda _, model: repeat_heads(model, asked)
    method = changes.method or best_method(config)
    grouping = changes.grouping or best_grouping(method)
    # The paper's three look at nothing but the weights, except to find groups.
    looks = calibrated and (method in LOOKING or grouping == "fitted")
    exact = "queries and outputs of the heads" if method in ("mean", "first", "random") else ""
    if method in LOOKING:
        kept = ["the order of heads may be any"] if grouping == "fitted" else []
        folds = config.bias and method in ("svd", "procrustes")
        kept += ["value biases go into those of c_proj"] if folds else []
        kept += ["the softmax does not see key biases"] if folds and not config.has_rotation else []
        exact = ", ".join(kept)
    which = "those that fit share" if grouping == "fitted" else "neighbours share"
    by = "the calibration text" if looks else "the weights alone"
    step = Step(
        "heads", f"{before} -> {asked}, method {method}, {which}, by {by}", exact, "keys and values of a group", looks
    )

    def act(_: GPT, model: GPT) -> GPT:
        statistics = collect_statistics(model, rows) if looks and rows is not None else None
        return regroup(model, asked, method=method, grouping=grouping, statistics=statistics, seed=changes.seed)

    return step, act


def _positions(
    config: ModelConfig, changes: Changes, rows: Sequence[Tensor] | None, calibrated: bool
) -> tuple[Step, Act]:
    if config.position == "blend":
        step = Step("positions", "blend -> rope, the table deleted", "all outputs")
        return step, lambda _, model: finish_blend(model)
    if changes.position == "none":
        step = Step("positions", f"{config.position} -> none", "", "scores of heads")
        return step, lambda _, model: without_positions(model)
    assert changes.position is not None
    method: RotaryMethod = changes.rotary or (best_rotary(changes.position) if calibrated else "abrupt")
    if method != "abrupt" and not calibrated:
        raise GptlabError(f"rotary {method!r} is fitted on a calibration text; give one, or choose 'abrupt'")
    if method == "fit" and changes.position == "blend":
        raise GptlabError("rotary 'fit' changes what a model computes, which a blend must not; choose 'gauge'")
    if changes.position == "blend":
        begin, way, rest = "learned -> blend", blended, ": becomes rope during uptraining"
        step = Step("positions", f"{begin}, {method}{rest}", "all outputs", fitted=calibrated)
    else:
        begin, way, rest = "learned -> rope", rotated, ""
        step = Step("positions", f"{begin}, {method}", "", "scores of heads; the table is deleted", calibrated)

    def act(_: GPT, model: GPT) -> tuple[GPT, Step]:
        made, by = way(model, method=method, rope=changes.rope, rows=rows, seed=changes.seed)
        if by == method:
            return made, step
        why = f"{begin}, {by}: {method} would have more nats per token on the calibration text{rest.replace(':', ';')}"
        return made, dataclasses.replace(step, change=why)

    return step, act


def _windows(config: ModelConfig, new: ModelConfig) -> tuple[Step, Act]:
    spans = [w for w in new.windows if w is not None]
    words = "full attention" if not spans else f"window {_layers(new.window)}"
    words += f", sinks {new.sinks}" if new.sinks else ""
    words += f", dilation {_layers(new.dilation)}" if set(new.dilations) != {1} else ""
    exact = "all weights"
    moved = ""
    if set(config.windows) == {None} and spans and set(new.dilations) == {1}:
        exact += f", and outputs up to token {min(spans):,}"
        moved = "outputs from there on" if min(spans) < config.context_length else ""
    else:
        moved = "outputs where other keys are seen"
    return (
        Step("windows", words, exact, moved),
        lambda _, model: narrow(model, new.window, new.sinks, new.dilation),
    )


def _layers(value: Any) -> str:
    return str(value) if isinstance(value, int) else ",".join("none" if v is None else str(v) for v in value)


def _output_projections(rows: Sequence[Tensor] | None) -> tuple[Step, Act]:
    step = Step(
        "output projections",
        "c_proj of each layer fitted to what the source's attention adds",
        "",
        "c_proj itself",
        True,
    )
    return step, lambda source, model: refit_outputs(source, model, rows or [])


def _turns(rope: RopeConfig | None) -> RopeConfig:
    """The settings of rotary positions but the length trained on, which changes with the context."""
    return dataclasses.replace(rope or RopeConfig(), trained_length=None)


def _scaling(new: ModelConfig) -> tuple[Step, Act]:
    rope = new.rope or RopeConfig()
    if rope.scaling is None:
        step = Step("rope scaling", "none: angles as trained", "all weights", "outputs")
    else:
        most = round(new.trained_length * rope.factor)
        words = f"{rope.scaling}, factor {rope.factor:g}: for texts of up to {most:,} tokens"
        words += f", {rope.factor:g} times the {new.trained_length:,} trained on"
        step = Step("rope scaling", words, "all weights", "outputs, at every length")
    return step, lambda _, model: rescale(model, rope)


def _context(config: ModelConfig, new: ModelConfig, changes: Changes) -> tuple[Step, Act]:
    old, length, trained = config.context_length, new.context_length, config.trained_length
    if not new.has_table:
        words = f"{old:,} -> {length:,} tokens: a number, {new.position} positions have no table"
        reach = [w and w * d for w, d in zip(new.windows, new.dilations, strict=True)]
        scaled = new.rope is not None and new.rope.scaling is not None
        if new.position == "rope" and not scaled and any(r is None or r > trained for r in reach):
            words += (
                f"; nothing is done for texts longer than the {trained:,} tokens trained on, which --rope-scaling yarn"
                f" --rope-factor {-(-length // trained)} is for"
            )
        step = Step("context", words, "all")
    else:
        method = changes.extension or "copy"
        how = "copies of the table side by side" if method == "copy" else "further positions at random"
        step = Step("context", f"{old:,} -> {length:,} tokens, {how}", f"outputs up to token {old:,}")
    return step, lambda _, model: extend_context(model, length, method=changes.extension or "copy", seed=changes.seed)
