"""A recipe: everything that defines a training run but the corpus. TOML on disk."""

from __future__ import annotations

import importlib.resources
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gptlab.config import ModelConfig
from gptlab.errors import GptlabError, nearest


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TokenizerSettings(_Section):
    """Which tokenizer; `vocab_size` counts for ``bpe`` only."""

    kind: Literal["gpt2", "bytes", "chars", "bpe"] = "bpe"
    vocab_size: int = Field(4096, ge=257)


class TrainSettings(_Section):
    """The loop. Lengths are in tokens, rates in parameters per step (AdamW, Loshchilov and Hutter 2019)."""

    steps: int = Field(1000, ge=1)
    batch_size: int = Field(8, ge=1)
    learning_rate: float = Field(1e-3, gt=0, le=1)
    final_learning_rate: float = Field(1e-4, ge=0, le=1)
    warmup_steps: int = Field(100, ge=0)
    weight_decay: float = Field(0.1, ge=0)
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.95, ge=0, lt=1)
    clip_norm: float = Field(1.0, gt=0)
    held_out: float = Field(0.01, gt=0, lt=0.5)
    evaluate_every: int = Field(500, ge=1)
    evaluate_tokens: int = Field(200_000, ge=2)  # the first one is not predicted
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    compile: bool = False
    seed: int = Field(0, ge=0)


class Recipe(_Section):
    """A model, a tokenizer and a loop.

    Attributes:
        model: fields of `ModelConfig`, and ``preset`` to start from; the tokenizer decides `vocab_size`.
        tokenizer: which tokenizer, trained where it needs training.
        train: the loop.
    """

    model: dict[str, Any] = Field(default_factory=dict)
    tokenizer: TokenizerSettings = TokenizerSettings()
    train: TrainSettings = TrainSettings()

    def model_for(self, vocab_size: int) -> ModelConfig:
        """Return the model's configuration for a tokenizer of ``vocab_size`` ids."""
        fields = dict(self.model)
        if "vocab_size" in fields:
            raise GptlabError(
                "model.vocab_size has no effect in a recipe; the tokenizer decides it: set tokenizer.kind"
            )
        preset = str(fields.pop("preset", "tiny"))
        return ModelConfig.preset(preset, **fields, vocab_size=vocab_size)


def recipe_names() -> list[str]:
    """The recipes that the package carries."""
    folder = importlib.resources.files("gptlab") / "recipes"
    return sorted(item.name.removesuffix(".toml") for item in folder.iterdir() if item.name.endswith(".toml"))


def read_recipe(name_or_path: str, settings: list[str] | None = None, model: Mapping[str, Any] | None = None) -> Recipe:
    """Read a recipe by name or from a file, with changes on top.

    Args:
        name_or_path: a recipe that the package carries, or a TOML file.
        settings: ``section.key=value``.
        model: further fields of `ModelConfig`.

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
    values.setdefault("model", {}).update(model or {})
    try:
        recipe = Recipe(**values)
    except ValidationError as error:
        raise GptlabError(_explain(error)) from None
    recipe.model_for(recipe.tokenizer.vocab_size)  # refuse an impossible model now, not after reading the corpus
    return recipe


def _apply(values: dict[str, Any], setting: str) -> None:
    key, equals, text = setting.partition("=")
    section, dot, name = key.strip().partition(".")
    if not (equals and dot and name):
        raise GptlabError(f"--set takes section.key=value, for instance train.steps=200, got {setting!r}")
    try:
        value = tomllib.loads(f"value = {text.strip()}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    if not isinstance(values.setdefault(section, {}), dict):
        raise GptlabError(f"{section!r} is no section of the recipe, so --set {setting} has nowhere to go")
    values[section][name] = value


def _explain(error: ValidationError) -> str:
    first = error.errors()[0]
    path = [str(part) for part in first["loc"]]
    if first["type"] == "extra_forbidden":
        sections: dict[str, type[BaseModel]] = {"tokenizer": TokenizerSettings, "train": TrainSettings}
        home = sections.get(path[0], Recipe) if len(path) > 1 else Recipe
        return f"unknown setting {'.'.join(path)!r} in the recipe{nearest(path[-1], home.model_fields)}"
    return f"impossible value for {'.'.join(path)} in the recipe: {first['msg'].lower()}, got {first['input']!r}"
