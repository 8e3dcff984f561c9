"""The variants of a study, resolved: every combination of a grid's changes, and those that stand alone."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from gptlab.config import ModelConfig
from gptlab.conversion.changes import Changes
from gptlab.errors import GptlabError, nearest
from gptlab.study.conversions import Uptraining, read_changes, read_uptraining
from gptlab.study.files import NAME, FactorSettings, RaceSettings, StudySettings, UptrainSettings, VariantSettings
from gptlab.study.results import Kind
from gptlab.training.recipe import Recipe, read_recipe

_UPTRAIN = "uptrain."
_ORDER = ("rope", "gqa", "swa")

FIELD_FACTORS = {"position": "rope", "n_kv_head": "gqa", "window": "swa"}
"""The three changes, by the field of `ModelConfig` that each is made in."""


@dataclass(frozen=True)
class Cell:
    """One variant of a study, resolved.

    Attributes:
        name: of the variant.
        label: in words.
        recipe: what it is trained by, seed aside; None for a model that is loaded.
        load: the trained model to load, or None.
        factors: the grid's changes that it has.
        convert: what the base is converted into; None where the variant is not made of it.
        uptrain: how it is trained on then, if it is.
    """

    name: str
    label: str
    recipe: Recipe | None
    load: str | None = None
    factors: tuple[str, ...] = ()
    convert: Changes | None = None
    uptrain: Uptraining | None = None


def cells(study: StudySettings, settings: Sequence[str] = ()) -> list[Cell]:
    """Return the variants of a study, the base first and the others in an order that the file does not decide.

    Args:
        study: the study.
        settings: further changes to the recipe, ``section.key=value``; ``uptrain.section.key=value`` to that of
            uptraining. Where the study trains in no other way, all are for uptraining.

    Raises:
        GptlabError: two variants of one name, no base, or a variant that is impossible, which is named.
    """
    asked = [*_grid(study.grid), *((variant, ()) for variant in study.variant)]
    own = [setting for setting in settings if not setting.startswith(_UPTRAIN)]
    further = [setting.removeprefix(_UPTRAIN) for setting in settings if setting.startswith(_UPTRAIN)]
    if further and study.uptrain is None:
        raise GptlabError(f"the study {study.name} has no [uptrain], so --set {_UPTRAIN}{further[0]} has no effect")
    if study.uptrain is not None and not any(_trains(variant) for variant, _ in asked):
        own, further = [], [setting.removeprefix(_UPTRAIN) for setting in settings]
    return _resolve(asked, study.recipe, [*study.set, *own], study.base, study.uptrain, further)


def study_order(study: StudySettings) -> list[str]:
    """Return the names of a study's variants as a reader expects them: the base, the grid, the rest as in the file."""
    names = [variant.name for variant, _ in _grid(study.grid)] + [variant.name for variant in study.variant]
    return sorted(names, key=lambda name: name != study.base)


def race_cells(race: RaceSettings) -> list[Cell]:
    """Return the variants of a race, as `cells`; all of them are trained."""
    for variant in race.variant:
        if variant.load is not None:
            raise GptlabError(f"{variant.name!r} is to race, so it is trained; give model in place of load")
        if _is_made(variant):
            raise GptlabError(f"{variant.name!r} is to race, so it is trained; give model in place of convert")
    return _resolve([(variant, ()) for variant in race.variant], race.recipe, race.set, race.base)


def _grid(factors: Mapping[str, FactorSettings]) -> list[tuple[VariantSettings, tuple[str, ...]]]:
    names = sorted(factors, key=_rank)
    found = []
    for size in range(len(names) + 1 if names else 0):
        for chosen in itertools.combinations(names, size):
            model: dict[str, Any] = {}
            for name in chosen:
                if again := model.keys() & factors[name].model.keys():
                    raise GptlabError(f"two changes of the grid set {min(again)}; a grid combines different settings")
                model |= factors[name].model
            label = " + ".join(factors[name].label or name for name in chosen)
            variant = VariantSettings(name="-".join(chosen) or "base", label=label or None, model=model)
            found.append((variant, chosen))
    return found


def _rank(factor: str) -> tuple[int, str]:
    return (_ORDER.index(factor) if factor in _ORDER else len(_ORDER), factor)


def _resolve(
    asked: Sequence[tuple[VariantSettings, tuple[str, ...]]],
    recipe: str,
    settings: list[str],
    base: str,
    uptrain: UptrainSettings | None = None,
    further: Sequence[str] = (),
) -> list[Cell]:
    found: dict[str, Cell] = {}
    if any(setting.partition("=")[0].strip() == "train.seed" for setting in settings):
        raise GptlabError(
            "train.seed has no effect in a study, whose seeds are named by themselves; leave it out of set"
        )
    for variant, factors in asked:
        name = variant.name
        if not NAME.fullmatch(name):
            raise GptlabError(f"a variant is named by small letters, digits and hyphens, got {name!r}")
        if name in found:
            raise GptlabError(f"two variants are called {name!r}; rename one")
        label = variant.label or ("base" if name == base else name)
        if _is_made(variant):
            found[name] = _made(variant, label, base, uptrain, further)
            continue
        if variant.load is not None:
            if variant.model:
                raise GptlabError(f"variant {name!r} is loaded, so model has no effect; give load or model")
            found[name] = Cell(name, label, None, variant.load)
            continue
        try:
            plan = read_recipe(recipe, settings, variant.model)
        except GptlabError as error:
            raise GptlabError(f"variant {name!r} is impossible: {error}") from None
        if plan.base is not None:
            raise GptlabError(
                f"a study trains from scratch, but the recipe {recipe} goes on from {plan.base}; change it"
            )
        found[name] = Cell(name, label, plan, None, factors or factors_of(variant.model))
    if not found:
        raise GptlabError("the study has no variants; add [[variant]] entries or a [grid]")
    if base not in found:
        hint = nearest(base, found)
        raise GptlabError(f"no variant is the base {base!r}{hint}; set base to one of {', '.join(found)}")

    def place(cell: Cell) -> tuple[Any, ...]:
        return (
            cell.name != base,
            cell.convert is not None,
            len(cell.factors),
            [_rank(factor) for factor in cell.factors],
            cell.name,
        )

    return sorted(found.values(), key=place)


def _is_made(variant: VariantSettings) -> bool:
    """Is it made of the base?"""
    return variant.convert is not None or variant.uptrain is not None


def _trains(variant: VariantSettings) -> bool:
    return variant.load is None and not _is_made(variant)


def _made(
    variant: VariantSettings, label: str, base: str, uptrain: UptrainSettings | None, further: Sequence[str]
) -> Cell:
    """A variant that is made of the base."""
    name = variant.name
    if name == base:
        raise GptlabError(f"variant {name!r} is the base, so it cannot be converted from it; give load or model")
    if variant.load is not None or variant.model:
        field = "load" if variant.load is not None else "model"
        raise GptlabError(f"variant {name!r} is made of the base, so {field} has no effect; leave it out")
    changes = read_changes(variant)
    if uptrain is None:
        if variant.uptrain is not None and variant.uptrain is not False:
            raise GptlabError(f"variant {name!r} asks for uptraining, but the study has no [uptrain]; add it")
        if changes == Changes():
            raise GptlabError(f"variant {name!r} converts nothing, and the study has no [uptrain]; it is the base")
    elif variant.uptrain is False and changes == Changes():
        raise GptlabError(f"variant {name!r} converts nothing, and is not trained on; it is the base")
    settings = None if variant.uptrain is False else uptrain
    try:
        plan = None if settings is None else read_uptraining(settings, variant.uptrain or (), further)
    except GptlabError as error:
        raise GptlabError(f"variant {name!r} is impossible: {error}") from None
    asked = dict(variant.convert or {})
    if asked.get("position") == "blend":
        asked["position"] = "rope"
    return Cell(name, label, None, None, factors_of(asked), changes, plan)


def yardstick(found: Sequence[Cell]) -> Cell | None:
    """Return the base that is trained on like the others, without a conversion and without settings of its own."""
    plain = (cell for cell in found if cell.convert == Changes() and cell.uptrain and not cell.uptrain.own)
    return next(plain, None)


def factors_of(changes: Mapping[str, Any]) -> tuple[str, ...]:
    """Return which of the three changes these fields of `ModelConfig` make."""
    found = {FIELD_FACTORS[name] for name in changes if name in FIELD_FACTORS}
    if changes.get("position", "rope") != "rope":
        found.discard("rope")
    return tuple(sorted(found, key=_rank))


FIELD_KINDS: dict[str, Kind] = {
    "position": "rope",
    "rope": "rope",
    "n_kv_head": "gqa",
    "window": "swa",
    "sinks": "swa",
    "dilation": "swa",
}
"""To which of the three changes a field of `ModelConfig` belongs."""


def kinds_of(changes: Iterable[str]) -> list[Kind]:
    """Return which changes these fields of `ModelConfig` make: of the three, or another."""
    made = {FIELD_KINDS.get(name, "other") for name in changes}
    return [kind for kind in get_args(Kind) if kind in made]


def changes(config: ModelConfig, base: ModelConfig) -> dict[str, Any]:
    """Return the fields in which a configuration differs from another, with their values."""
    before = base.to_dict()
    return {name: value for name, value in config.to_dict().items() if value != before.get(name)}


def chosen_cells(found: list[Cell], only: Sequence[str], base: str) -> list[Cell]:
    """Return the base and the variants of these names, with the yardstick where one of them is trained on.

    Raises:
        GptlabError: no variant of a name (with the nearest right one).
    """
    names = [cell.name for cell in found]
    for name in only:
        if name not in names:
            raise GptlabError(f"no variant {name!r}{nearest(name, names)}; there are {', '.join(names)}")
    standard = yardstick(found)
    always = {base}
    if standard is not None and any(cell.uptrain is not None and cell.name in only for cell in found):
        always.add(standard.name)
    return [cell for cell in found if not only or cell.name in (*only, *always)]
