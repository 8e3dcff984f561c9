"""A study file: which variants of which recipe, how often, and what to measure of them. TOML on disk."""

from __future__ import annotations

import importlib.resources
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from gptlab.errors import GptlabError, nearest
from gptlab.study.findings import Expect
from gptlab.study.papers import CLAIMS
from gptlab.training.toml import read_toml, toml_names

_FOLDER = importlib.resources.files("gptlab") / "study" / "studies"

NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")
"""What a study or a variant may be called."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class VariantSettings(_Section):
    """One variant: fields of `ModelConfig` to train with, a trained model to load, or what to make of the base.

    Attributes:
        name: in results and on the command line.
        label: in words.
        model: fields that differ from the recipe's.
        set: changes to the recipe beside those of the whole study, as the variant's own learning rate.
        load: a built-in model, a directory or a hub name, as `gptlab.load` takes it; nothing is trained then.
        convert: what to convert the base into, see `gptlab.conversion.convert.Changes`; empty is the base as it is.
        uptrain: changes to the recipe of the uptraining, beside those of the whole study. In
            ``distill.teacher=base`` the base is the study's own. False: it is not uptrained.
    """

    name: str
    label: str | None = None
    model: dict[str, Any] = Field(default_factory=dict)
    set: list[str] = Field(default_factory=list)
    load: str | None = None
    convert: dict[str, Any] | None = None
    uptrain: list[str] | Literal[False] | None = None

    @field_validator("uptrain", mode="before")
    @classmethod
    def _settings_or_false(cls, value: Any) -> Any:
        if value is None or value is False or isinstance(value, list):
            return value
        raise ValueError("uptrain takes a list of settings, or false")


class FactorSettings(_Section):
    """A change that a grid combines with all others."""

    label: str | None = None
    model: dict[str, Any]


class CellSettings(_Section):
    """Changes to the recipe of one combination of a grid, as its own learning rate, each ``section.key=value``."""

    set: list[str] = Field(min_length=1)


class UptrainSettings(_Section):
    """How the variants that are made by conversion are uptrained.

    Attributes:
        recipe: a recipe that the package carries, or a file. Its budget counts for nothing.
        set: changes to it, each ``section.key=value``. ``budget.share`` is the length of a run, by default the largest
            of ``shares``; ``budget.of`` the tokens that the base was trained on, where they are not recorded.
        shares: of these tokens, after which a model is evaluated; 0 is right after the conversion.
    """

    recipe: str = "uptrain"
    set: list[str] = Field(default_factory=list)
    shares: list[float] = Field(default_factory=lambda: [0.0, 0.005, 0.01, 0.02, 0.05], min_length=1)


class EvaluationSettings(_Section):
    """What is asked of every model.

    Attributes:
        text: a file, a directory or a name such as ``pydoc``; None is the held-out part of the training data.
        part: of the documents: those to ``tune`` on, or those to ``test`` on, which nothing may be chosen on; a hash of
            a document's text decides. None is ``test`` of held-out documents, and all of another text.
        bytes: of the text that are read at least where there are so many, in whole documents.
        documents: that are read at least where there are so many.
        length: tokens of a window; None is the least trained length of the models.
        positions: how many times this length a model without learned positions is followed.
        pieces: of text that are so long, at most; all models read the same.
        distances: to copy at; None is 16, 32, 64 and on, as far as the context reaches.
        strings: random strings at each distance, and random sequences for induction.
        divergence: windows of the text over which a conversion's outputs are compared with those of its base.
        prompts: what samples begin with; by default the first words of three documents.
        sample_tokens: of each sample.
        dtype: of the products in the blocks while text is scored, ``float32`` or ``bfloat16``.
    """

    text: str | None = None
    part: Literal["tune", "test"] | None = None
    bytes: int = Field(400_000, ge=1000)
    documents: int = Field(100, ge=1)
    length: int | None = Field(None, ge=16)
    positions: int = Field(4, ge=1)
    pieces: int = Field(16, ge=1)
    distances: list[int] | None = None
    strings: int = Field(16, ge=1)
    divergence: int = Field(16, ge=0)
    prompts: list[str] = Field(default_factory=list)
    sample_tokens: int = Field(60, ge=1)
    dtype: Literal["float32", "bfloat16"] = "float32"


class MeasurementSettings(_Section):
    """What is timed.

    Attributes:
        seconds: about how long all timings together may take; points that come too late are left out.
        contexts: tokens before the one that is generated, and lengths of prompts.
        batches: sequences at once.
        training_rows: windows of the training step that is timed; None is the recipe's own.
        timed: false leaves the clock alone; contexts and batches are then those of the cache sizes.
    """

    seconds: float = Field(120.0, ge=0)
    contexts: list[int] = Field(default_factory=lambda: [128, 512, 2048, 8192], min_length=1)
    batches: list[int] = Field(default_factory=lambda: [1, 8], min_length=1)
    training_rows: int | None = Field(None, ge=1)
    timed: bool = True


class ClaimSettings(_Section):
    """A claim of the study's own, stated before anything is trained.

    Attributes:
        claim: in words.
        of: a difference of losses: what each variant's is multiplied by, by name, adding up to 0. ``trigram`` is the
            count model of equal tokens.
        effect: of a factorial in place of that: a factor, or an interaction as ``a x b``.
        expect: where the difference lies: ``lower`` or ``higher`` than 0, by more than the margin; ``equal`` to 0, or
            ``not higher``, within it.
        margin: nats per token; "no loss" means nothing without one.
        tokens: one of the study's ages; None is the last.
        share: of the pre-training, after which conversions are compared; None is the last.
    """

    claim: str
    of: dict[str, float] | None = None
    effect: str | None = None
    expect: Expect
    margin: float = Field(0.0, ge=0, allow_inf_nan=False)
    tokens: int | None = Field(None, ge=1)
    share: float | None = Field(None, ge=0, le=1)

    @model_validator(mode="after")
    def _testable(self) -> ClaimSettings:
        if (self.of is None) == (self.effect is None):
            raise ValueError("give one of of and effect")
        if self.of is not None and (len(self.of) < 2 or abs(sum(self.of.values())) > 1e-9):
            raise ValueError("the weights in of must add up to 0, as in { rope = 1, base = -1 }")
        if self.expect in ("equal", "not higher") and not self.margin:
            raise ValueError(f"expect {self.expect!r} needs a margin: the difference that would not matter")
        if self.tokens is not None and self.share is not None:
            raise ValueError("give one of tokens and share")
        return self


class StudySettings(_Section):
    """A study file.

    Attributes:
        name: of the study; a file's own name where it is left out.
        title: a heading.
        question: what the study is to answer.
        recipe: what every variant is trained by: a recipe that the package carries, or a file.
        set: changes to the recipe, each ``section.key=value``.
        seeds: every variant is trained once with each.
        base: the variant that the others are compared with.
        variant: variants one by one.
        grid: changes of which every combination is a variant.
        cell: changes to the recipe of single combinations of the grid, by name.
        rates: learning rates to search: every variant that is trained from scratch is trained with each of them.
        ages: tokens after which to compare the variants that are trained from scratch, ascending. Each is the end of a
            run of its own; their beginning, up to where the schedule ``wsd`` begins its decay, is trained once.
        oldest_seeds: how many of the seeds, the first, go on to the last of the ages; None is all of them.
        uptrain: how variants that are made by conversion are uptrained; None leaves them as they were converted.
        evaluate: what is asked of every model.
        measure: what is timed.
        claims: which claims of papers to examine, see `gptlab.study.papers.CLAIMS`.
        claim: claims of the study's own. Together with those of papers about losses they are the family over which
            p-values are corrected.
        quick: the study shows what there is to see, in minutes.
        needs_data: refuse to start on the recipe's corpus; prepared data or a corpus must be named.
    """

    name: str = ""
    title: str
    question: str
    recipe: str = "pocket"
    set: list[str] = Field(default_factory=list)
    seeds: list[int] = Field(default_factory=lambda: [0], min_length=1)
    base: str = "base"
    variant: list[VariantSettings] = Field(default_factory=list)
    grid: dict[str, FactorSettings] = Field(default_factory=dict)
    cell: dict[str, CellSettings] = Field(default_factory=dict)
    rates: list[float] = Field(default_factory=list)
    ages: list[int] = Field(default_factory=list)
    oldest_seeds: int | None = Field(None, ge=1)
    uptrain: UptrainSettings | None = None
    evaluate: EvaluationSettings = EvaluationSettings()
    measure: MeasurementSettings = MeasurementSettings()
    claims: list[str] = Field(default_factory=list)
    claim: list[ClaimSettings] = Field(default_factory=list)
    quick: bool = False
    needs_data: bool = False


def study_names() -> list[str]:
    """The studies that the package carries."""
    return toml_names(_FOLDER)


def read_study(name_or_path: str) -> StudySettings:
    """Read a study by name or from a file.

    Raises:
        GptlabError: an unknown name or key (with the nearest right one), or an impossible value.
    """
    values = read_toml("study", name_or_path, _FOLDER)
    values.setdefault("name", Path(name_or_path).stem)
    return make_study(values)


def make_study(values: Mapping[str, Any]) -> StudySettings:
    """Return the study of plain values, as TOML and JSON give them.

    Raises:
        GptlabError: an unknown key (with the nearest right one), or an impossible value.
    """
    try:
        study = StudySettings(**values)
    except ValidationError as error:
        raise GptlabError(_explain(error)) from None
    if not NAME.fullmatch(study.name):
        raise GptlabError(f"a study is named by small letters, digits and hyphens, got {study.name!r}")
    if len(set(study.seeds)) < len(study.seeds) or min(study.seeds) < 0:
        raise GptlabError(f"seeds of study {study.name} must be different numbers of at least 0, got {study.seeds}")
    if study.uptrain is not None and not all(0 <= share <= 1 for share in study.uptrain.shares):
        raise GptlabError(f"uptrain.shares must lie between 0 and 1, got {study.uptrain.shares}")
    if study.ages != sorted(set(study.ages)) or any(tokens < 1 for tokens in study.ages):
        raise GptlabError(f"ages of study {study.name} must be numbers of tokens that ascend, got {study.ages}")
    if study.oldest_seeds is not None and len(study.ages) < 2:
        raise GptlabError(f"oldest_seeds of study {study.name} has no effect without two ages; leave it out")
    if len(set(study.rates)) < len(study.rates) or any(rate <= 0 for rate in study.rates):
        raise GptlabError(f"rates of study {study.name} must be different numbers above 0, got {study.rates}")
    for own in study.claim:
        if own.tokens is not None and own.tokens not in study.ages:
            raise GptlabError(f"the claim {own.claim!r} is about {own.tokens:,} tokens, which is none of the ages")
        if own.share is not None and (study.uptrain is None or own.share not in study.uptrain.shares):
            raise GptlabError(f"the claim {own.claim!r} is about a share of {own.share:g}, none of uptrain.shares")
    for claim in study.claims:
        if claim not in CLAIMS:
            raise GptlabError(f"unknown claim {claim!r}{nearest(claim, CLAIMS)}; there are {', '.join(CLAIMS)}")
    return study


def _explain(error: ValidationError) -> str:
    first = error.errors()[0]
    path = [str(part) for part in first["loc"]]
    where = ".".join(path)
    if first["type"] == "extra_forbidden":
        known = _home(path).model_fields
        return f"unknown setting {where!r} in the study{nearest(path[-1], known)}; there are {', '.join(known)}"
    if first["type"] == "missing":
        return f"the study lacks {where}; add it"
    if first["type"] == "value_error":
        return f"impossible value for {where} in the study: {first['msg'].removeprefix('Value error, ')}"
    return f"impossible value for {where} in the study: {first['msg'].lower()}, got {first['input']!r}"


def _home(path: list[str]) -> type[BaseModel]:
    """The section that the last of a path of keys and numbers stands in."""
    sections: dict[str, type[BaseModel]] = {
        "variant": VariantSettings,
        "grid": FactorSettings,
        "cell": CellSettings,
        "claim": ClaimSettings,
        "uptrain": UptrainSettings,
        "evaluate": EvaluationSettings,
        "measure": MeasurementSettings,
    }
    return sections.get(path[0], StudySettings) if len(path) > 1 else StudySettings
