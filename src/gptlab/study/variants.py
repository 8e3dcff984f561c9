"""The variants of a study: every combination of a grid's changes, and those that stand alone."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from gptlab.config import ModelConfig
from gptlab.conversion.changes import Changes, target
from gptlab.errors import GptlabError, nearest
from gptlab.study.results import Kind
from gptlab.study.settings import NAME, StudySettings, VariantSettings
from gptlab.study.uptraining import Uptraining, read_uptraining
from gptlab.training.branch import of_age
from gptlab.training.recipe import Recipe, read_recipe

_UPTRAIN = "uptrain."
_FIRST = ("rope", "gqa", "swa")

KIND_OF_FIELD: dict[str, Kind] = {
    "position": "rope",
    "rope": "rope",
    "n_kv_head": "gqa",
    "window": "swa",
    "sinks": "swa",
    "dilation": "swa",
}
"""To which of the three changes a field of `ModelConfig` belongs."""


@dataclass(frozen=True)
class Trained:
    """A variant that is trained from scratch.

    Attributes:
        name: in results and on the command line.
        label: in words.
        recipe: seed aside.
        factors: the grid's changes that it combines; None where it is not of the grid.
        searched: in a search for the learning rate: the variant that it is a trial of.
    """

    name: str
    label: str
    recipe: Recipe
    factors: tuple[str, ...] | None = None
    searched: str | None = None


@dataclass(frozen=True)
class Loaded:
    """A variant that was trained elsewhere; ``model`` is what `gptlab.load` takes."""

    name: str
    label: str
    model: str


@dataclass(frozen=True)
class Converted:
    """A variant that is made from the base.

    Attributes:
        name: in results and on the command line.
        label: in words.
        changes: what the base is converted into.
        uptraining: what follows; None leaves it as it was converted.
    """

    name: str
    label: str
    changes: Changes
    uptraining: Uptraining | None


Variant = Trained | Loaded | Converted


def read_variants(study: StudySettings, settings: Sequence[str] = ()) -> list[Variant]:
    """Return the variants of a study as a reader expects them: the base, the grid, the rest as in the file.

    Args:
        study: the study.
        settings: further changes to the recipe, ``section.key=value``; ``uptrain.section.key=value`` to that of
            uptraining. Where the study trains in no other way, all are for uptraining.

    Raises:
        GptlabError: two variants of one name, no base, or a variant that is impossible, which is named.
    """
    asked = [*_grid(study), *((variant, None) for variant in study.variant)]
    own = [setting for setting in settings if not setting.startswith(_UPTRAIN)]
    further = [setting.removeprefix(_UPTRAIN) for setting in settings if setting.startswith(_UPTRAIN)]
    if further and study.uptrain is None:
        raise GptlabError(f"the study {study.name} has no [uptrain], so --set {_UPTRAIN}{further[0]} has no effect")
    if study.uptrain is not None and not any(v.load is None and not _converts(v) for v, _ in asked):
        own, further = [], [setting.removeprefix(_UPTRAIN) for setting in settings]
    own = [*study.set, *own]
    if any(setting.partition("=")[0].strip() == "train.seed" for setting in own):
        raise GptlabError("train.seed has no effect in a study, which has seeds of its own; leave it out of set")
    if study.ages and (found := next((s for s in own if s.startswith("budget.")), None)):
        raise GptlabError(f"the study's ages are its budgets, so {found} has no effect; leave it out")
    variants: dict[str, Variant] = {}
    for variant, factors in asked:
        if not NAME.fullmatch(variant.name):
            raise GptlabError(f"a variant is named by small letters, digits and hyphens, got {variant.name!r}")
        if variant.name in variants:
            raise GptlabError(f"two variants are called {variant.name!r}; rename one")
        label = variant.label or ("base" if variant.name == study.base else variant.name)
        if variant.set and (_converts(variant) or variant.load is not None):
            raise GptlabError(
                f"variant {variant.name!r} is not trained by the recipe, so set has no effect; leave it out"
            )
        if _converts(variant):
            variants[variant.name] = _converted(variant, label, study, further)
        elif variant.load is not None:
            if variant.model:
                raise GptlabError(f"variant {variant.name!r} is loaded, so model has no effect; give load or model")
            variants[variant.name] = Loaded(variant.name, label, variant.load)
        else:
            recipe = _recipe(variant, study.recipe, [*own, *variant.set])
            if study.ages:
                recipe = of_age(recipe, study.ages[-1])
            for trial in _trials(Trained(variant.name, label, recipe, factors), study.rates):
                variants[trial.name] = trial
    if not variants:
        raise GptlabError("the study has no variants; add [[variant]] entries or a [grid]")
    base = next((v.name for v in variants.values() if isinstance(v, Trained) and v.searched == study.base), study.base)
    if base not in variants:
        hint, names = nearest(base, variants), ", ".join(variants)
        raise GptlabError(f"no variant is the base {base!r}{hint}; set base to one of {names}")
    return sorted(variants.values(), key=lambda variant: variant.name != base)


def _trials(variant: Trained, rates: Sequence[float]) -> list[Trained]:
    """A variant with each of the learning rates of a search; itself where none is searched."""
    if not rates:
        return [variant]
    trials = []
    for rate in rates:
        optimizer = variant.recipe.optimizer.model_copy(update={"learning_rate": rate})
        recipe = variant.recipe.model_copy(update={"optimizer": optimizer})
        trials.append(Trained(f"{variant.name}-{rate:g}", f"{variant.label}, {rate:g}", recipe, None, variant.name))
    return trials


def _grid(study: StudySettings) -> list[tuple[VariantSettings, tuple[str, ...]]]:
    factors, names = study.grid, sorted(study.grid, key=rank)
    variants = []
    for size in range(len(names) + 1 if names else 0):
        for chosen in itertools.combinations(names, size):
            model: dict[str, Any] = {}
            for name in chosen:
                if again := model.keys() & factors[name].model.keys():
                    raise GptlabError(f"two changes of the grid set {min(again)}; a grid combines different settings")
                model |= factors[name].model
            label = " + ".join(factors[name].label or name for name in chosen)
            cell = "-".join(chosen) or "base"
            changes = study.cell[cell].set if cell in study.cell else []
            variants.append((VariantSettings(name=cell, label=label or None, model=model, set=changes), chosen))
    known = [variant.name for variant, _ in variants]
    for cell in study.cell:
        if cell not in known:
            raise GptlabError(
                f"the study has [cell.{cell}], but the grid has no {cell!r}{nearest(cell, known)}; there are"
                f" {', '.join(known) or 'none'}"
            )
    return variants


def rank(factor: str) -> tuple[int, str]:
    """Return the place of a change: the three that gptlab is about come first."""
    return (_FIRST.index(factor) if factor in _FIRST else len(_FIRST), factor)


def _converts(variant: VariantSettings) -> bool:
    return variant.convert is not None or variant.uptrain is not None


def _recipe(variant: VariantSettings, recipe: str, settings: list[str]) -> Recipe:
    try:
        plan = read_recipe(recipe, settings, variant.model)
    except GptlabError as error:
        raise _impossible(variant.name, error) from None
    if plan.base is not None:
        raise GptlabError(f"a study trains from scratch, but the recipe {recipe} continues {plan.base}; change it")
    return plan


def _converted(variant: VariantSettings, label: str, study: StudySettings, further: Sequence[str]) -> Converted:
    name, settings = variant.name, study.uptrain
    if name == study.base:
        raise GptlabError(f"variant {name!r} is the base, so it cannot be converted from it; give load or model")
    if variant.load is not None or variant.model:
        field = "load" if variant.load is not None else "model"
        raise GptlabError(f"variant {name!r} is made from the base, so {field} has no effect; leave it out")
    try:
        changes = Changes.from_dict(variant.convert or {})
        if settings is None or variant.uptrain is False:
            uptraining = None
        else:
            uptraining = read_uptraining(settings, variant.uptrain or (), further)
    except GptlabError as error:
        raise _impossible(name, error) from None
    if settings is None and variant.uptrain not in (None, False):
        raise GptlabError(f"variant {name!r} asks for uptraining, but the study has no [uptrain]; add it")
    if changes == Changes() and uptraining is None:
        raise GptlabError(f"variant {name!r} converts nothing and is not uptrained, so it is the base; leave it out")
    return Converted(name, label, changes, uptraining)


def _impossible(name: str, error: GptlabError) -> GptlabError:
    return GptlabError(f"variant {name!r} is impossible: {error}")


def continued_base(variants: Sequence[Variant]) -> Converted | None:
    """Return the base after the same uptraining as the others, without a conversion and without settings of its own."""
    same = (variant for variant in variants if isinstance(variant, Converted) and variant.changes == Changes())
    return next((variant for variant in same if variant.uptraining and not variant.uptraining.settings), None)


def reference(variant: Variant, variants: Sequence[Variant]) -> str | None:
    """Return the variant that another is compared with: the base, or the continued base where it was uptrained, too.

    Args:
        variant: one of the variants.
        variants: all of them, the base first, for which it is None.
    """
    if variant == variants[0]:
        return None
    continued = continued_base(variants)
    if continued is None or continued == variant or not isinstance(variant, Converted) or variant.uptraining is None:
        return variants[0].name
    return continued.name


def choose(variants: Sequence[Variant], only: Sequence[str]) -> list[Variant]:
    """Return the variants of these names with those that they are compared with; all where none is named.

    Raises:
        GptlabError: no variant of a name (with the nearest right one).
    """
    by_name = {variant.name: variant for variant in variants}
    for name in only:
        if name not in by_name:
            raise GptlabError(f"no variant {name!r}{nearest(name, by_name)}; there are {', '.join(by_name)}")
    chosen = {variants[0].name, *only, *(reference(by_name[name], variants) for name in only)}
    return [variant for variant in variants if not only or variant.name in chosen]


def changes_of(config: ModelConfig, base: ModelConfig) -> dict[str, Any]:
    """Return the fields in which a configuration differs from another, with their values as JSON."""
    before, after = dataclasses.asdict(base), dataclasses.asdict(config)
    changes = {name: value for name, value in after.items() if value != before[name]}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in changes.items()}


def kinds_of(changes: Mapping[str, Any]) -> list[Kind]:
    """Return which changes these fields of `ModelConfig` make: of the three, or another."""
    made = {KIND_OF_FIELD.get(name, "other") for name in changes}
    if changes.get("position", "rope") != "rope":
        made = made - {"rope"} | {"other"}
    return [kind for kind in get_args(Kind) if kind in made]


def converted_config(variant: Converted, base: ModelConfig) -> ModelConfig:
    """Return the architecture that a conversion and its uptraining end with.

    Raises:
        GptlabError: an impossible conversion, with the variant's name.
    """
    try:
        config = target(base, variant.changes)
    except GptlabError as error:
        raise _impossible(variant.name, error) from None
    if config.position != "blend":
        return config
    if variant.uptraining is None or variant.uptraining.recipe.blend is None:
        raise GptlabError(
            f"variant {variant.name!r} is impossible: position 'blend' becomes 'rope' by uptraining with a schedule of"
            ' its own; add [uptrain], and uptrain = ["blend.ramp=geometric"] to the variant'
        )
    return ModelConfig.from_dict({**config.to_dict(), "position": "rope"})
