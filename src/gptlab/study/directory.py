"""The directory of a study: what was requested of it (`study.json`), and results under keys.

A result is computed once, and kept under a key made of everything that it depends on. Whatever interrupts a study, or
changes in its file, leaves the results of the rest usable.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from pydantic import BaseModel, ValidationError

from gptlab.checkpoints.files import write_files
from gptlab.errors import GptlabError
from gptlab.evaluation.tasks import identity
from gptlab.language_model import LanguageModel
from gptlab.study.results import STUDY, encode, explain
from gptlab.study.settings import StudySettings
from gptlab.study.variants import Converted, Loaded, Variant
from gptlab.training.recipe import Recipe

CACHE, DATA, RUNS, CONVERTED = "cache", "data", "runs", "converted"
CODE = {"train": 3, "evaluate": 1, "measure": 1, "convert": 2}
"""Versions of what the stages compute: raised by hand when the same inputs would give other numbers."""


@dataclass(frozen=True)
class Request:
    """A study, and what the command line changes of it.

    Attributes:
        study: the study's file.
        set: changes to its recipe, ``section.key=value``.
        data: prepared data, in place of the recipe's corpus.
        only: variants to compare with the base; none is all.
        seeds: how many seeds, from 0 on, in place of the file's.
        device: ``cpu``, ``cuda``, ...; None takes a GPU where there is one.
    """

    study: StudySettings
    set: tuple[str, ...] = ()
    data: Path | None = None
    only: tuple[str, ...] = ()
    seeds: int | None = None
    device: str | None = None


class _StudyFile(BaseModel):
    """`study.json`: the request, and all that tells the study from others."""

    format: Literal["gptlab study settings"] = "gptlab study settings"
    version: Literal[1] = 1
    request: Request
    whole: dict[str, str | None]
    variants: dict[str, dict[str, Any]]


def claim_directory(request: Request, out: Path, variants: Sequence[Variant], data: str | None) -> None:
    """Write `study.json`, after making sure that the directory is free or holds this study.

    It is the same study as long as name, base and data are the same and no variant is defined otherwise: variants may
    be added, and seeds.

    Args:
        request: the study.
        out: the directory.
        variants: all that the study has.
        data: what tells the training data from others, or None where nothing is trained.

    Raises:
        GptlabError: the directory holds something else, or cannot be written.
    """
    whole = {"name": request.study.name, "base": request.study.base, "data": data}
    parts = {variant.name: _definition(variant, ages=bool(request.study.ages)) for variant in variants}
    if (out / STUDY).exists():
        before = _read(out)
        for name, value in whole.items():
            if (there := before.whole.get(name)) != value:
                raise GptlabError(f"{out} holds another study ({name} {there!r}, not {value!r}); choose another --out")
        for name in sorted(before.variants.keys() & parts.keys()):
            if before.variants[name] != parts[name]:
                raise GptlabError(
                    f"{out} holds another study: variant {name} is defined otherwise; choose another --out"
                )
        parts = before.variants | parts
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise GptlabError(f"{out} holds something that is not a study; choose another --out")
    absolute = dataclasses.replace(request, data=None if request.data is None else request.data.resolve())
    write_files(out, {STUDY: encode(_StudyFile(request=absolute, whole=whole, variants=parts))})


def read_request(out: Path) -> Request:
    """Return what was last requested of the study in a directory, to go on with it.

    Raises:
        GptlabError: no study there, or a `study.json` that is damaged or of another version.
    """
    return _read(out).request


def _read(out: Path) -> _StudyFile:
    path = out / STUDY
    try:
        return _StudyFile.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise GptlabError(f"{out} holds no study to go on with; name the directory that --out was given") from None
    except (OSError, ValueError) as error:
        said = explain(error) if isinstance(error, ValidationError) else error
        raise GptlabError(f"{path} cannot be read ({said}); restore it, or choose another --out") from None


def _definition(variant: Variant, *, ages: bool) -> dict[str, Any]:
    if isinstance(variant, Loaded):
        return {"load": variant.model}
    if isinstance(variant, Converted):
        after = variant.uptraining
        recipe = None if after is None else {"recipe": plain(after.recipe), "of": after.pretraining_tokens}
        return {"convert": variant.changes.to_dict(), "uptrain": recipe}
    recipe = plain(variant.recipe)
    if ages:  # which may be added
        del recipe["budget"]
    return {"recipe": recipe}


def plain(recipe: Recipe) -> dict[str, Any]:
    """Return a recipe as JSON has it."""
    return recipe.model_dump(mode="json")


def key(stage: str, **parts: Any) -> str:
    """Return a short name for a result of a stage, from all that it depends on.

    The stage's version, torch's version and the number of threads are always part of it.
    """
    general = {"stage": stage, "code": CODE[stage], "torch": torch.__version__, "threads": torch.get_num_threads()}
    return hashlib.sha256(json.dumps({**general, **parts}, sort_keys=True).encode()).hexdigest()[:20]


def model_key(lm: LanguageModel) -> str:
    """Return a name for all that a model's answers depend on: its weights, its configuration, its tokenizer."""
    device = str(lm.model.wte.weight.device.type)
    weights = identity(lm.model, "")["sha256"]
    tokenizer = lm.needs_tokenizer().sha256
    return key("evaluate", weights=weights, config=lm.config.to_dict(), tokenizer=tokenizer, device=device)


def cached(directory: Path, name: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return the JSON object kept under a name, or compute and keep it. One that cannot be read is computed again."""
    path = directory / f"{name}.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(values, dict):
            return values
    except (OSError, ValueError):
        pass
    # What JSON makes of the values is returned in any case, so that a result does not depend on whether it was kept.
    content = json.dumps(compute()).encode()
    write_files(directory, {path.name: content + b"\n"})
    return cast(dict[str, Any], json.loads(content))
