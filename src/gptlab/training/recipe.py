"""A recipe: everything that defines a training run but the corpus. TOML on disk."""

from __future__ import annotations

import difflib
import importlib.resources
import tomllib
from collections.abc import Mapping
from typing import Any, Literal, get_args

from pydantic import Field, SerializerFunctionWrapHandler, ValidationError, model_serializer

from gptlab.config import ModelConfig, with_changes
from gptlab.errors import GptlabError, nearest
from gptlab.training.settings import (
    KINDS,
    BatchSettings,
    BlendSettings,
    BudgetSettings,
    DataSettings,
    DistillSettings,
    NarrowSettings,
    OptimizerSettings,
    ScheduleSettings,
    Section,
    TokenizerSettings,
    TrainSettings,
)
from gptlab.training.toml import read_toml, toml_names

_FOLDER = importlib.resources.files("gptlab") / "recipes"


class Recipe(Section):
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
        for section in {"budget", "batch"} & values.keys():
            values[section] = {k: v for k, v in values[section].items() if v is not None or k not in _LATER}
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

    def length(self, config: ModelConfig) -> int:
        """Return the tokens of a window.

        Raises:
            GptlabError: more than the model's context.
        """
        length = self.batch.length or config.context_length
        if length > config.context_length:
            raise GptlabError(
                f"batch.length={length} exceeds the model's context of {config.context_length} tokens; lower it, or"
                " leave it out for windows as long as the context"
            )
        return length

    def steps(self, length: int, n_windows: int) -> int:
        """Return the steps of the run, for windows of ``length`` tokens, ``n_windows`` of them an epoch."""
        budget = self.budget
        if budget.steps is not None:
            return budget.steps
        tokens = budget.tokens
        if budget.share is not None:
            if budget.of is None:
                raise GptlabError(
                    f"budget.share={budget.share} is a share of an unknown number of tokens; set budget.of"
                )
            tokens = round(budget.share * budget.of)
        if tokens is not None:
            return max(tokens // (self.batch.size * length), 1)
        return max(int((budget.epochs or 0) * n_windows / self.batch.size), 1)


_LATER = ("distill", "blend", "narrow", "share", "of", "length")


def recipe_names() -> list[str]:
    """The recipes that the package carries."""
    return toml_names(_FOLDER)


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
    values = read_toml("recipe", name_or_path, _FOLDER)
    own = bool(values.get("model"))
    for setting in settings or []:
        _apply(values, setting)
    if model:
        values["model"] = with_changes(values.get("model", {}), model)
    if base is not None:
        values["base"] = base
    recipe = make_recipe(values)
    if recipe.base is None:
        recipe.model_for(recipe.tokenizer.vocab_size)  # refuse an impossible model now, not after reading the corpus
    elif recipe.model:
        fields = ", ".join(f"model.{name}" for name in recipe.model)
        way = "take a recipe that sets nothing of the model, such as finetune" if own else "leave that out"
        raise GptlabError(
            f"the model comes from {recipe.base}, so {fields} cannot be set; {way}, or change the model first with"
            f" gptlab convert {recipe.base}"
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
        raise GptlabError(f"{section!r} is not a section of the recipe, so --set {setting} has nowhere to go")
    if section == "budget" and name in KINDS:  # another kind of budget takes the place of the recipe's
        for other in [key for key in target if key != "of" or name != "share"]:
            del target[other]
    target[name] = value


def _is_section(name: str) -> bool:
    return name == "model" or bool(_fields(name))


def _fields(section: str) -> dict[str, Any]:
    """The settings of a section of the recipe, which may be off by default; empty where it is none."""
    kind: Any = Recipe.model_fields[section].annotation
    candidates = [getattr(one, "model_fields", None) for one in (kind, *get_args(kind))]
    return next((fields for fields in candidates if fields), {})


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
