"""A recipe: everything that defines a training run but the corpus. TOML on disk."""

from __future__ import annotations

import difflib
import importlib.resources
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from gptlab.config import ModelConfig
from gptlab.errors import GptlabError, nearest


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TokenizerSettings(_Section):
    """Which tokenizer, where the data or the base model do not bring one; `vocab_size` counts for ``bpe`` only."""

    kind: Literal["gpt2", "bytes", "chars", "bpe"] = "bpe"
    vocab_size: int = Field(4096, ge=257)


class DataSettings(_Section):
    """How a corpus becomes batches.

    Attributes:
        corpus: what `gptlab train` prepares where it is given neither prepared data nor a corpus.
        held_out: share of the documents kept for validation; counts where the corpus is not prepared already.
        items: every line is a document and a row of its own, as in makemore's names.
        documents: attention stays inside documents where a window holds several.
    """

    corpus: list[str] = Field(default_factory=lambda: ["stdlib"], min_length=1)
    held_out: float = Field(0.01, gt=0, lt=0.5)
    items: bool = False
    documents: bool = False


class BatchSettings(_Section):
    """The global batch, in windows of the model's context.

    Attributes:
        size: windows of one step, over all processes.
        micro: windows at once on one process; None is all of its share. Changes memory, and results by rounding only.
    """

    size: int = Field(8, ge=1)
    micro: int | None = Field(None, ge=1)


class OptimizerSettings(_Section):
    """AdamW (Loshchilov and Hutter 2019), or Muon (Jordan et al. 2024) for the blocks' matrices and AdamW for the rest.

    Muon's update is scaled to the size of AdamW's (Liu et al. 2025, *Muon is scalable for LLM training*), so that one
    learning rate serves both.
    """

    name: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = Field(1e-3, gt=0, le=1)
    weight_decay: float = Field(0.1, ge=0)
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.95, ge=0, lt=1)
    momentum: float = Field(0.95, ge=0, lt=1)
    clip_norm: float = Field(1.0, gt=0)


class ScheduleSettings(_Section):
    """The learning rate over the run: a linear warm-up, then ``kind``.

    Attributes:
        kind: ``cosine`` to the end; ``wsd``, constant with a linear decay at the end (Hu et al. 2024, *MiniCPM*); or
            ``constant``.
        warmup_steps: steps of the warm-up.
        final_share: the rate at the end, as a share of the full one.
        decay_share: share of the run that ``wsd`` decays in.
    """

    kind: Literal["cosine", "wsd", "constant"] = "cosine"
    warmup_steps: int = Field(100, ge=0)
    final_share: float = Field(0.1, ge=0, le=1)
    decay_share: float = Field(0.2, gt=0, le=1)


class BudgetSettings(_Section):
    """How long to train: exactly one of steps, tokens, epochs and share.

    Attributes:
        steps: of the optimizer.
        tokens: that are predicted.
        epochs: passes over the training data.
        share: of the tokens that the base was trained on, as in the GQA paper's uptraining (alpha = 0.05 there).
        of: how many those are; None asks the base (see `gptlab.training.schedules.with_count`).
    """

    steps: int | None = Field(None, ge=1)
    tokens: int | None = Field(None, ge=1)
    epochs: float | None = Field(None, gt=0, allow_inf_nan=False)
    share: float | None = Field(None, gt=0, allow_inf_nan=False)
    of: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _exactly_one(self) -> BudgetSettings:
        given = [name for name in _KINDS if getattr(self, name) is not None]
        if len(given) != 1:
            one_of = " and ".join([", ".join(f"budget.{name}" for name in _KINDS[:-1]), f"budget.{_KINDS[-1]}"])
            raise ValueError(f"give one of {one_of}, got {' and '.join(given) or 'none'}")
        if self.of is not None and self.share is None:
            raise ValueError("budget.of is what budget.share is a share of, and has no effect without it")
        return self


_KINDS = ("steps", "tokens", "epochs", "share")


class TrainSettings(_Section):
    """The loop.

    Attributes:
        seed: of the initialisation, the order of the data and dropout.
        dtype: of the products; weights, gradients and optimizer state are float32 in any case.
        compile: ``auto`` compiles where the run is long enough to pay for it, and goes on without where it fails.
        recompute: compute each block again in the backward pass instead of keeping what is inside it.
        evaluate_every: steps from one look at the validation stream to the next.
        evaluate_tokens: look at that many tokens of it only, always the first; None is all.
        save_every: steps from one checkpoint to the next; None is ``evaluate_every``.
        keep_last: how many of the latest checkpoints stay; the best one stays in any case.
    """

    seed: int = Field(0, ge=0, lt=2**63)
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    compile: Literal["auto"] | bool = "auto"
    recompute: bool = False
    evaluate_every: int = Field(500, ge=1)
    evaluate_tokens: int | None = Field(None, ge=2)  # the first one is not predicted
    save_every: int | None = Field(None, ge=1)
    keep_last: int = Field(2, ge=1)


class DistillSettings(_Section):
    """A teacher (Hinton et al. 2015): the loss is (1 - weight) cross-entropy + weight T^2 KL(teacher || student).

    Attributes:
        teacher: a model by name or directory, with the student's tokenizer and at least its context.
        weight: share of the divergence in the loss.
        temperature: T, what the logits of both are divided by in the divergence.
    """

    teacher: str
    weight: float = Field(1.0, gt=0, le=1)
    temperature: float = Field(1.0, gt=0, allow_inf_nan=False)


class BlendSettings(_Section):
    """From learned positions to rotary ones, for a base of position ``blend``; the last model has position ``rope``.

    Attributes:
        ramp: ``geometric`` turns all pairs together, from 2^-12 of their angle to all of it; ``pairs`` one after the
            other, from the slowest to the fastest, each in the same way.
        rope_end: share of the run at which rotation is whole.
        wpe_start: share of the run until which the learned positions stay whole.
        wpe_end: share of the run at which they are gone.
    """

    ramp: Literal["geometric", "pairs"] = "geometric"
    rope_end: float = Field(0.4, gt=0, le=1)
    wpe_start: float = Field(0.2, ge=0, lt=1)
    wpe_end: float = Field(0.6, gt=0, le=1)

    @model_validator(mode="after")
    def _in_order(self) -> BlendSettings:
        if self.wpe_start >= self.wpe_end:
            raise ValueError(
                f"blend.wpe_start={self.wpe_start} must lie before blend.wpe_end={self.wpe_end}: the learned positions"
                " fall from whole to nothing between the two"
            )
        return self


class NarrowSettings(_Section):
    """Wider windows at the beginning; evaluation sees the model's own all the time.

    Attributes:
        first: the window to begin with, in tokens that it reaches back; None is the context.
        stages: windows before the model's own, each smaller than the one before by the same factor; None halves.
        end: share of the run at which the model's own windows are reached.
    """

    first: int | None = Field(None, ge=2)
    stages: int | None = Field(None, ge=1)
    end: float = Field(0.5, gt=0, le=1)


class Recipe(_Section):
    """Everything that defines a run but the data.

    Attributes:
        base: a trained model to go on from, or None to start from random weights; then `model` and `tokenizer` are its.
        model: fields of `ModelConfig`, and ``preset`` to start from; the tokenizer decides `vocab_size`.
        tokenizer: which tokenizer.
        data: how the corpus becomes batches.
        batch: how large a step is.
        optimizer: what a step does.
        schedule: the learning rate over the run.
        budget: how long the run is.
        train: the loop.
        distill: a teacher to learn from, or None.
        blend: how a base of position ``blend`` becomes rotary on the way, or None.
        narrow: wider windows at the beginning, or None.
        parallel: how several processes share the work: ``ddp`` copies the model, ``fsdp`` divides it (FSDP2).
    """

    base: str | None = None
    model: dict[str, Any] = Field(default_factory=dict)
    tokenizer: TokenizerSettings = TokenizerSettings()
    data: DataSettings = DataSettings()
    batch: BatchSettings = BatchSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    schedule: ScheduleSettings = ScheduleSettings()
    budget: BudgetSettings = BudgetSettings(steps=1000)
    train: TrainSettings = TrainSettings()
    distill: DistillSettings | None = None
    blend: BlendSettings | None = None
    narrow: NarrowSettings | None = None
    parallel: Literal["ddp", "fsdp"] = "ddp"

    @model_serializer(mode="wrap")
    def _without_what_is_off(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave unset what came later, so that an older recipe, which may be the name of a run, stays what it was."""
        values: dict[str, Any] = dump(self)
        values = {name: value for name, value in values.items() if value is not None or name not in _LATER}
        if "budget" in values:
            values["budget"] = {k: v for k, v in values["budget"].items() if v is not None or k not in _LATER}
        return values

    def model_for(self, vocab_size: int) -> ModelConfig:
        """Return the model's configuration for a tokenizer of ``vocab_size`` ids.

        Raises:
            GptlabError: an impossible model, or fields of one beside `base`.
        """
        fields = dict(self.model)
        if "vocab_size" in fields:
            raise GptlabError(
                "model.vocab_size has no effect in a recipe; the tokenizer decides it: set tokenizer.kind"
            )
        preset = str(fields.pop("preset", "tiny"))
        return ModelConfig.preset(preset, **fields, vocab_size=vocab_size)

    def steps(self, context_length: int, n_windows: int) -> int:
        """Return the steps of the run, for windows of ``context_length`` tokens, ``n_windows`` of them an epoch."""
        budget = self.budget
        if budget.steps is not None:
            return budget.steps
        tokens = budget.tokens
        if budget.share is not None:
            if budget.of is None:
                raise GptlabError(f"budget.share={budget.share} is a share of no number; set budget.of to the tokens")
            tokens = round(budget.share * budget.of)
        if tokens is not None:
            return max(tokens // (self.batch.size * context_length), 1)
        return max(int((budget.epochs or 0) * n_windows / self.batch.size), 1)


_LATER = ("distill", "blend", "narrow", "share", "of")


def recipe_names() -> list[str]:
    """The recipes that the package carries."""
    folder = importlib.resources.files("gptlab") / "recipes"
    return sorted(item.name.removesuffix(".toml") for item in folder.iterdir() if item.name.endswith(".toml"))


def read_recipe(
    name_or_path: str,
    settings: list[str] | None = None,
    model: Mapping[str, Any] | None = None,
    base: str | None = None,
) -> Recipe:
    """Read a recipe by name or from a file, with changes on top.

    Args:
        name_or_path: a recipe that the package carries, or a TOML file.
        settings: ``section.key=value``.
        model: further fields of `ModelConfig`.
        base: a trained model to go on from.

    Raises:
        GptlabError: an unknown name, section or key (with the nearest right one), or an impossible value.
    """
    if name_or_path in recipe_names():
        text = (importlib.resources.files("gptlab") / "recipes" / f"{name_or_path}.toml").read_text(encoding="utf-8")
    elif Path(name_or_path).is_file():
        try:
            text = Path(name_or_path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise GptlabError(f"the recipe {name_or_path} cannot be read: {error}") from None
    else:
        hint = nearest(name_or_path, recipe_names())
        raise GptlabError(f"no recipe {name_or_path!r}{hint}; give a .toml file or one of {', '.join(recipe_names())}")
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise GptlabError(f"the recipe {name_or_path} is no valid TOML: {error}") from None
    for setting in settings or []:
        _apply(values, setting)
    if model:
        values.setdefault("model", {}).update(model)
    if base is not None:
        values["base"] = base
    recipe = make_recipe(values)
    if recipe.base is None:
        recipe.model_for(recipe.tokenizer.vocab_size)  # refuse an impossible model now, not after reading the corpus
    elif recipe.model:
        fields = ", ".join(f"model.{name}" for name in recipe.model)
        raise GptlabError(
            f"the model comes from {recipe.base}, so {fields} cannot be set; leave it out, or train from scratch"
        )
    return recipe


def make_recipe(values: Mapping[str, Any]) -> Recipe:
    """Return the recipe of plain values, as TOML and JSON give them.

    Raises:
        GptlabError: an unknown section or key (with the nearest right one), or an impossible value.
    """
    try:
        return Recipe(**values)
    except ValidationError as error:
        raise GptlabError(_explain(error)) from None


def change_recipe(recipe: Recipe, settings: list[str]) -> Recipe:
    """Return the recipe with ``section.key=value`` settings on top.

    Raises:
        GptlabError: as `read_recipe`.
    """
    values = recipe.model_dump(mode="json")
    for setting in settings:
        _apply(values, setting)
    return make_recipe(values)


def differences(old: Recipe, new: Recipe) -> dict[str, tuple[Any, Any]]:
    """Return the settings, by dotted name, that differ between two recipes: (old, new)."""
    before, after = (_flat(recipe.model_dump(mode="json")) for recipe in (old, new))
    return {
        name: (before.get(name), after.get(name))
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name)
    }


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat


def _apply(values: dict[str, Any], setting: str) -> None:
    key, equals, text = setting.partition("=")
    section, dot, name = key.strip().partition(".")
    single = not dot and section in Recipe.model_fields and not _is_section(section)
    if not equals or not (name or single):
        raise GptlabError(f"--set takes section.key=value, for instance budget.steps=200, got {setting!r}")
    try:
        value = tomllib.loads(f"value = {text.strip()}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    if single:
        values[section] = value
        return
    target = values.setdefault(section, {})
    if not isinstance(target, dict):
        raise GptlabError(f"{section!r} is no section of the recipe, so --set {setting} has nowhere to go")
    if section == "budget" and name in _KINDS:  # another kind of budget takes the place of the recipe's
        for other in [key for key in target if key != "of" or name != "share"]:
            del target[other]
    target[name] = value


def _is_section(name: str) -> bool:
    return name == "model" or bool(_fields(name))


def _fields(section: str) -> dict[str, Any]:
    """The settings of a section of the recipe, which may be off by default; empty where it is none."""
    kind: Any = Recipe.model_fields[section].annotation
    found = [getattr(one, "model_fields", None) for one in (kind, *get_args(kind))]
    return next((fields for fields in found if fields), {})


def _explain(error: ValidationError) -> str:
    # A wrong name first: what it was meant to set may be missing because of it.
    first = min(error.errors(), key=lambda one: one["type"] != "extra_forbidden")
    path = [str(part) for part in first["loc"]]
    if first["type"] == "extra_forbidden":
        home = Recipe.model_fields if len(path) == 1 else _fields(path[0])
        everywhere = {name: f"{section}.{name}" for section in Recipe.model_fields for name in _fields(section)}
        hint = nearest(path[-1], home)
        if not hint and (elsewhere := difflib.get_close_matches(path[-1], everywhere, n=1, cutoff=0.8)):
            hint = f" (did you mean {everywhere[elsewhere[0]]!r}?)"
        return f"unknown setting {'.'.join(path)!r} in the recipe{hint}"
    if first["type"] == "value_error":
        return first["msg"].removeprefix("Value error, ")
    if first["type"] == "missing":
        return f"{'.'.join(path)} is missing in the recipe; set it, or leave the section [{path[0]}] out"
    # A field that may be one of several types names the type that failed after itself.
    path = path[: 1 + (path[0] in Recipe.model_fields and _is_section(path[0]))]
    return f"impossible value for {'.'.join(path)} in the recipe: {first['msg'].lower()}, got {first['input']!r}"
