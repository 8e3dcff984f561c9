"""`gptlab convert`."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gptlab.cli.model_options import DilationFlag, SinksFlag, WindowFlag, overrides
from gptlab.errors import GptlabError

if TYPE_CHECKING:
    from torch import Tensor

    from gptlab.config import ModelConfig
    from gptlab.conversion.changes import Changes
    from gptlab.conversion.convert import Step
    from gptlab.language_model import LanguageModel

HELD_OUT = 4096
"""Tokens that are kept back to measure on."""


def convert(
    source: Annotated[str, typer.Argument(help="A built-in model, a directory, a run, gpt2, or owner/name.")],
    out: Annotated[Path, typer.Option(help="Directory of the converted model; must not exist.")],
    n_kv_head: Annotated[
        int | None, typer.Option("--n-kv-head", help="Key/value heads: fewer by sharing, more by repetition.")
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            help="How heads share: svd, uncentred, activations, procrustes, mean, first or random (default: the best)."
        ),
    ] = None,
    grouping: Annotated[
        str | None, typer.Option(help="Which heads share: fitted or contiguous (default: goes with the method).")
    ] = None,
    position: Annotated[
        str | None,
        typer.Option(help="rope, none, or blend: rope after gptlab train uptrain."),
    ] = None,
    rotary: Annotated[
        str | None, typer.Option(help="How positions become rotary: fit, gauge or abrupt (default: the best).")
    ] = None,
    window: WindowFlag = None,
    sinks: SinksFlag = None,
    dilation: DilationFlag = None,
    context: Annotated[
        int | None, typer.Option(help="Longest text; learned positions are copied, as Longformer does.")
    ] = None,
    rope_scaling: Annotated[
        str | None,
        typer.Option(
            "--rope-scaling", help="For texts longer than trained: yarn, ntk, linear, llama3, or none (rope only)."
        ),
    ] = None,
    rope_factor: Annotated[
        float | None, typer.Option("--rope-factor", help="How many times longer than the context of its training.")
    ] = None,
    calibration: Annotated[
        str | None, typer.Option(help="Text to fit on: a file, a directory, or a name (default: pydoc).")
    ] = None,
    calibration_tokens: Annotated[
        int | None, typer.Option(help="Tokens of it to fit on (default: 8,192, or 8 for each channel).")
    ] = None,
    no_calibration: Annotated[
        bool, typer.Option("--no-calibration", help="Use the weights alone; a text only measures the result.")
    ] = False,
    refit: Annotated[
        bool | None,
        typer.Option("--refit/--no-refit", help="Fit output projections afterwards (default: after procrustes)."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
) -> None:
    """Turn a trained model into one of another architecture, and say what that moved."""
    if no_calibration and (calibration is not None or calibration_tokens is not None):
        raise GptlabError("--no-calibration leaves --calibration and --calibration-tokens without effect; drop one")
    if no_calibration and rotary in ("fit", "gauge"):
        raise GptlabError(
            f"--rotary {rotary} is fitted on a calibration text; leave --no-calibration out, or take --rotary abrupt"
        )
    if no_calibration and refit:
        raise GptlabError("--refit fits on a calibration text; leave --no-calibration out, or --refit")
    if calibration_tokens is not None and calibration_tokens < 1:
        raise GptlabError(f"--calibration-tokens must be at least 1, got {calibration_tokens}")
    if out.exists():
        raise GptlabError(f"{out} already exists; choose another --out, or remove it")
    fields = overrides(position, n_kv_head, window, sinks, dilation)
    if "window" in fields and fields["window"] is None:
        fields["window"] = [None]  # to a conversion None alone says that nothing is asked
    asked = {
        **fields,
        "method": method,
        "grouping": grouping,
        "rotary": rotary,
        "context_length": context,
        "rope_scaling": rope_scaling,
        "rope_factor": rope_factor,
        "refit": refit,
        "seed": seed,
    }
    asked = {name: value for name, value in asked.items() if value is not None}
    if not asked.keys() - {"refit", "seed"}:
        raise GptlabError(
            "no change is asked for; give --n-kv-head, --position, --window, --context, --rope-scaling, or several"
        )
    from gptlab import checkpoints
    from gptlab.checkpoints import hub
    from gptlab.conversion.convert import Changes, plan

    changes = Changes.from_dict(asked)
    directory = hub.locate(source)
    # What is impossible is refused before any weight is read.
    try:
        steps = plan(checkpoints.read_config(directory), changes, calibrated=not no_calibration)
    except GptlabError as error:
        raise GptlabError(_by_flags(str(error))) from None
    if not steps:
        said = f"{source} already has these settings; nothing is written"
        print(json.dumps({"source": {"name": source}, "steps": []}, indent=2) if as_json else said)
        return
    if not as_json:
        _show_plan(source, steps)
    import gptlab

    lm = gptlab.load(source, dtype="float32")
    fit, held_out, text = _texts(lm, steps, calibration, calibration_tokens, no_calibration)
    new, facts = _convert(lm, changes, fit, held_out)
    facts = {"source": _identity(lm, source, directory), "changes": changes.to_dict(), "calibration": text, **facts}
    gptlab.save(new, out, files=_files(source, facts))
    if as_json:
        print(json.dumps({**facts, "out": str(out)}, indent=2))
    else:
        for planned, step in zip(steps, facts["steps"], strict=True):
            if step["change"] != planned.change:
                print(f"instead of what was planned, {step['name']}: {step['change']}")
        _show(facts, source, out, new.config.position == "blend")


def _by_flags(sentence: str) -> str:
    """Name the flags of this command in place of the fields that a sentence advises to set or to leave out."""
    for name in ("n_kv_head", "rope_scaling", "rope_factor"):
        sentence = re.sub(rf"\b{name}\b(?!=)", f"--{name.replace('_', '-')}", sentence)
    return sentence.replace("set position to 'rope'", "give --position rope").replace("set --", "give --")


def _texts(
    lm: LanguageModel, steps: Sequence[Step], calibration: str | None, n_tokens: int | None, none: bool
) -> tuple[list[Tensor] | None, list[Tensor], dict[str, Any] | None]:
    """Return the rows to fit on, those to measure on, and what to say of both."""
    from gptlab.conversion import calibration as texts

    if lm.tokenizer is None:
        if calibration is None and (none or not any(step.fitted for step in steps)):
            return None, [], None
        lm.needs_tokenizer()
    assert lm.tokenizer is not None
    length = min(lm.config.context_length, texts.LONGEST_ROW)
    n_fit = 0 if none else -(-(n_tokens or texts.default_tokens(lm.config.n_embd)) // length)
    n_held_out = -(-HELD_OUT // length)
    name = calibration or texts.DEFAULT_TEXT
    try:
        rows = texts.calibration_rows(lm.tokenizer, length, (n_fit + n_held_out) * length, name)
    except GptlabError:
        if none:  # nothing depends on the text but the measurement
            return None, [], None
        raise
    fit, held_out = ([], rows) if none else texts.keep_back(rows, n_held_out)
    n_fit = min(n_fit, len(fit))
    fit = [fit[i * len(fit) // n_fit] for i in range(n_fit)]  # of a short text no more than was asked for
    about: dict[str, Any] = {"text": name}
    for key, some in (("fitted_on", fit), ("measured_on", held_out)):
        if some:
            about[key] = {"tokens": sum(map(len, some)), "sha256": texts.sha256_of_rows(some)}
    return fit or None, held_out, about


def _convert(
    lm: LanguageModel, changes: Changes, fit: list[Tensor] | None, held_out: list[Tensor]
) -> tuple[LanguageModel, dict[str, Any]]:
    """Return the converted model, and what it is like beside its source."""
    import dataclasses

    from gptlab.conversion.convert import convert
    from gptlab.conversion.drift import measure_drift
    from gptlab.language_model import LanguageModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the plan has warned
        converted = convert(lm.model, changes, fit)
    outputs = dataclasses.asdict(measure_drift(lm.model, converted.model, held_out)) if held_out else None
    facts = {
        "steps": [dataclasses.asdict(step) for step in converted.steps],
        "model": converted.model.config.to_dict(),
        "parameters": {"before": _size(lm.config), "after": _size(converted.model.config)},
        "cache": _caches(lm.config, converted.model.config),
        "outputs": outputs,
    }
    return LanguageModel(converted.model, lm.tokenizer), facts


def _size(config: ModelConfig) -> int:
    from gptlab.model import cost

    return sum(cost.parameters(config).values())


def _caches(before: ModelConfig, after: ModelConfig) -> dict[str, Any]:
    """Return the bytes of a bfloat16 cache, each model at its own context."""
    from gptlab.model import cost

    pairs = (("before", before), ("after", after))
    return {
        name: {"tokens": config.context_length, "bytes": cost.cache_bytes(config, config.context_length, 2)}
        for name, config in pairs
    }


def _identity(lm: LanguageModel, source: str, directory: Path) -> dict[str, Any]:
    """Return what tells the source from other models, and where it came from itself."""
    from gptlab.evaluation.tasks import identity
    from gptlab.training.budget import tokens_trained

    facts = {**identity(lm.model, source), "tokens_trained": tokens_trained(source)}
    for name in ("conversion", "import"):
        earlier = directory / f"{name}.json"
        if earlier.is_file():
            facts[name] = json.loads(earlier.read_text(encoding="utf-8"))
    return facts


def _files(source: str, facts: Mapping[str, Any]) -> dict[str, bytes]:
    """Return what is written beside the weights."""
    files: dict[str, Mapping[str, Any]] = {"conversion.json": facts}
    if facts["source"]["tokens_trained"] is not None:
        # What a budget that is a share of the pre-training asks for.
        files["card.json"] = {"converted_from": source, "tokens_trained": facts["source"]["tokens_trained"]}
    return {name: json.dumps(values, indent=2).encode() + b"\n" for name, values in files.items()}


def _show_plan(source: str, steps: Sequence[Step]) -> None:
    from gptlab.conversion.convert import why

    print(f"{source}:")
    for number, step in enumerate(steps, 1):
        print(f"{number}. {step.name}: {step.change}")
        for label, words in (("exact", step.exact), ("moved", step.moved)):
            if words:
                print(f"   {label}: {words}")
    if reason := why(steps):
        print(f"in this order: {reason}")


def _show(facts: Mapping[str, Any], source: str, out: Path, blend: bool) -> None:
    size, cache, outputs = facts["parameters"], facts["cache"], facts["outputs"]
    print(f"parameters: {size['before']:,} -> {size['after']:,}")
    old, new = cache["before"], cache["after"]
    at = f"at {new['tokens']:,} tokens" if old["tokens"] == new["tokens"] else "at the whole context of each"
    print(f"cache {at}, bfloat16: {old['bytes'] / 2**20:,.2f} -> {new['bytes'] / 2**20:,.2f} MiB")
    if outputs is None:
        print("outputs: not measured, because there is no text")
    else:
        moved = outputs["after"] - outputs["before"]
        print(
            f"outputs on {outputs['tokens']:,} tokens of {facts['calibration']['text']} that nothing was fitted on:"
            f" {outputs['before']:.4f} -> {outputs['after']:.4f} nats per token ({moved:+.4f}),"
            f" KL(source || converted) {outputs['kl']:.4f}"
        )
    settings = ["budget.share=0.05"]
    if new["tokens"] <= old["tokens"]:  # beyond its own context the source can teach nothing
        settings.append(f"distill.teacher={source}")
    if blend:
        settings.append("blend.ramp=geometric")
    if facts["source"]["tokens_trained"] is None:
        settings.insert(1, "budget.of=TOKENS")
    print(f"saved: {out}\ntry it: gptlab generate --model {out}")
    changes = " ".join(f"--set {setting}" for setting in settings)
    print(f"continue its training: gptlab train uptrain --from {out} --data DATA {changes}")
