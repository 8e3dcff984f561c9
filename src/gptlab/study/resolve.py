"""The plan of a study: everything that can be known, and checked, before the work begins."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import gptlab
from gptlab.checkpoints.hub import locate
from gptlab.config import ModelConfig
from gptlab.errors import GptlabError
from gptlab.progress import Report
from gptlab.study.ages import check_ages
from gptlab.study.claims import check_claims
from gptlab.study.directory import DATA, Request, claim_directory, model_key
from gptlab.study.evaluator import check_settings
from gptlab.study.results import Kind
from gptlab.study.settings import EvaluationSettings, StudySettings
from gptlab.study.uptraining import START, Milestone
from gptlab.study.variants import (
    Converted,
    Loaded,
    Trained,
    Variant,
    changes_of,
    choose,
    converted_config,
    kinds_of,
    read_variants,
    reference,
)
from gptlab.text.documents import open_documents
from gptlab.text.shards import Dataset, open_dataset, prepare
from gptlab.text.tokenizers import Tokenizer
from gptlab.training.loop import rows_of
from gptlab.training.parallel import join
from gptlab.training.recipe import Recipe, read_recipe


@dataclass(frozen=True)
class Entry:
    """A variant with all that follows from the study.

    Attributes:
        variant: its definition.
        config: its architecture.
        changes: fields in which that differs from the base's.
        kinds: which changes these are.
        factors: the changes that it combines.
        reference: the variant that it is compared with, None for the base.
        seeds: one run or conversion for each; a model that is loaded has 0.
        tokens: that a finished model has seen, None where it is not recorded.
        milestones: of a conversion, right after it and of its uptraining; else none.
    """

    variant: Variant
    config: ModelConfig
    changes: dict[str, Any]
    kinds: list[Kind]
    factors: list[str]
    reference: str | None
    seeds: tuple[int, ...]
    tokens: int | None
    milestones: tuple[Milestone, ...]

    @property
    def name(self) -> str:
        """The variant's."""
        return self.variant.name


@dataclass(frozen=True)
class Plan:
    """A study, resolved.

    Attributes:
        study: its settings.
        out: its directory.
        device: to train, evaluate and measure on.
        seeds: to train with; none where nothing is trained.
        recipe: of the first variant that is trained, else the study's; decides what a timed training step is.
        dataset: to train on and to fit conversions on, or None.
        entries: the variants, the base first.
        base_key: of the base's weights, where it is loaded and others are made from it; else empty.
        length: tokens of a window of the evaluation, which all models can read.
    """

    study: StudySettings
    out: Path
    device: torch.device
    seeds: tuple[int, ...]
    recipe: Recipe
    dataset: Dataset | None
    entries: tuple[Entry, ...]
    base_key: str
    length: int

    @property
    def base(self) -> Entry:
        """The variant that others change."""
        return self.entries[0]

    @property
    def oldest_seeds(self) -> tuple[int, ...]:
        """Those that are trained to the last of the study's ages, or to the end where it has none."""
        return self.seeds[: self.study.oldest_seeds]

    def base_seed(self, seed: int) -> int:
        """Return the seed of the base that a variant of this seed is made from."""
        return seed if isinstance(self.base.variant, Trained) else 0


def resolve(request: Request, out: Path, report: Report) -> Plan:
    """Check a study and claim its directory; prepare its data where that was not done.

    Args:
        request: the study.
        out: its directory.
        report: called when data are prepared.

    Raises:
        GptlabError: an impossible variant or setting, a directory that holds something else, no data.
    """
    study = request.study
    with join(request.device) as group:
        device = group.device
    every = read_variants(study, request.set)
    variants = choose(every, request.only)
    recipes = _recipes(variants, every)
    seeds = _seeds(request, trains=bool(recipes))
    _check_models(variants)
    recipe = recipes[0] if recipes else read_recipe(study.recipe, [*study.set, *request.set])
    dataset = open_dataset(request.data) if recipes and request.data is not None else None
    corpus = f"corpus {' '.join(recipe.data.corpus)}" if recipes else None
    claim_directory(request, out, every, corpus if dataset is None else dataset.sha256)

    base, tokenizer, base_key = variants[0], None, ""
    if isinstance(base, Loaded) and any(isinstance(variant, Converted) for variant in variants):
        lm = gptlab.load(base.model, dtype="float32")
        tokenizer, base_key = lm.needs_tokenizer(), model_key(lm)
    if dataset is None and recipes:
        dataset = _prepare(recipe, out / DATA, tokenizer, report)
    if dataset is not None and tokenizer is not None and tokenizer.sha256 != dataset.tokenizer.sha256:
        raise GptlabError(
            f"the data {dataset.name} was prepared with a tokenizer other than that of the base {base.name}; prepare it"
            " again with --tokenizer and the model that the base loads"
        )
    configs = _configs(variants, 0 if dataset is None else dataset.tokenizer.vocab_size)
    entries = _entries(variants, configs, dataset, seeds)
    if study.ages:
        for entry in entries:
            if not isinstance(entry.variant, Trained):
                raise GptlabError(f"the study has ages, but variant {entry.name!r} is not trained from scratch")
            check_ages(entry.name, entry.variant.recipe, study.ages, entry.variant.recipe.length(entry.config))
    if not request.only:
        check_claims(study.claim, {entry.name: entry.factors for entry in entries})
    length = _length(study.evaluate, configs)
    check_settings(study.evaluate, length, None if dataset is None else dataset.tokenizer)
    return Plan(study, out, device, seeds, recipe, dataset, entries, base_key, length)


def _recipes(variants: Sequence[Variant], every: Sequence[Variant]) -> list[Recipe]:
    """The recipes of all training, those from scratch first."""
    recipes = [variant.recipe for variant in variants if isinstance(variant, Trained)]
    if any(isinstance(variant, Converted) for variant in variants):
        # Also of those that were not chosen: data are what all conversions are fitted on and evaluated on.
        recipes += [v.uptraining.recipe for v in every if isinstance(v, Converted) and v.uptraining is not None]
    return recipes


def _seeds(request: Request, *, trains: bool) -> tuple[int, ...]:
    """Return the seeds to train with, after refusing what is missing or has no effect."""
    name = request.study.name
    if not trains:
        if request.seeds is not None or request.data is not None:
            raise GptlabError(f"the study {name} trains none of its variants, so --seeds and --data have no effect")
        return ()
    if request.seeds is not None and request.seeds < 1:
        raise GptlabError(f"--seeds takes the number of seeds, at least 1, got {request.seeds}")
    if request.study.needs_data and request.data is None and not any(s.startswith("data.corpus") for s in request.set):
        raise GptlabError(
            f"the study {name} needs data: name prepared data by --data, or texts by --corpus; see gptlab prepare"
        )
    return tuple(request.study.seeds if request.seeds is None else range(request.seeds))


def _check_models(variants: Sequence[Variant]) -> None:
    """Refuse models that are not there and impossible conversions; the size of the vocabulary does not matter yet."""
    for variant in variants:
        if isinstance(variant, Loaded):
            locate(variant.model)
    base = variants[0]
    made = [variant for variant in variants if isinstance(variant, Converted)]
    if made and isinstance(base, Loaded):
        config = gptlab.load(base.model, dtype="float32").config
    elif made and isinstance(base, Trained):
        config = base.recipe.model_for(base.recipe.tokenizer.vocab_size)
    for variant in made:
        converted_config(variant, config)


def _prepare(recipe: Recipe, where: Path, tokenizer: Tokenizer | None, report: Report) -> Dataset:
    if (where / "index.json").exists():
        return open_dataset(where)
    report({"event": "phase", "phase": "prepare", "what": ", ".join(recipe.data.corpus), "done": 0, "of": 1})
    documents = open_documents(recipe.data.corpus, per_line=recipe.data.items)
    return prepare(documents, tokenizer or recipe.tokenizer, where, held_out=recipe.data.held_out)


def _configs(variants: Sequence[Variant], vocab_size: int) -> dict[str, ModelConfig]:
    """The architectures, with the vocabulary of the data where a variant is trained from scratch."""
    configs: dict[str, ModelConfig] = {}
    for variant in variants:  # the base first, of which others are made
        match variant:
            case Trained():
                try:
                    configs[variant.name] = variant.recipe.model_for(vocab_size)
                except GptlabError as error:
                    raise GptlabError(f"variant {variant.name!r} is impossible: {error}") from None
            case Loaded():
                configs[variant.name] = gptlab.load(variant.model, dtype="float32").config
            case Converted():
                configs[variant.name] = converted_config(variant, configs[variants[0].name])
    return configs


def _length(settings: EvaluationSettings, configs: Mapping[str, ModelConfig]) -> int:
    """The tokens of a window of the evaluation."""
    name = min(configs, key=lambda name: configs[name].context_length)
    least = configs[name].context_length
    if settings.length is not None and settings.length > least:
        raise GptlabError(
            f"evaluate.length is {settings.length:,}, but variant {name!r} was trained on windows of {least:,} tokens;"
            " set it to no more than that, and evaluate.positions to go further"
        )
    return settings.length or least


def _entries(
    variants: Sequence[Variant], configs: Mapping[str, ModelConfig], dataset: Dataset | None, seeds: tuple[int, ...]
) -> tuple[Entry, ...]:
    base = variants[0]
    pretrained = _tokens(base, configs[base.name], dataset)
    entries = []
    for variant in variants:
        config = configs[variant.name]
        changes = changes_of(config, configs[base.name])
        kinds = kinds_of(changes)
        factors: list[str] = [kind for kind in kinds if kind != "other"]
        tokens, seeded = pretrained, not isinstance(variant, Loaded)
        milestones: tuple[Milestone, ...] = ()
        if isinstance(variant, Converted):
            milestones = (START, *_milestones(variant, config, base, pretrained))
            tokens = None if pretrained is None else pretrained + milestones[-1].tokens
            seeded = variant.uptraining is not None or isinstance(base, Trained)
        elif variant != base:
            tokens = _tokens(variant, config, dataset)
        if isinstance(variant, Trained) and variant.factors is not None:
            factors = list(variant.factors)
        compared, own = reference(variant, variants), seeds if seeded else (0,)
        entries.append(Entry(variant, config, changes, kinds, factors, compared, own, tokens, milestones))
    return tuple(entries)


def _milestones(
    variant: Converted, config: ModelConfig, base: Variant, pretrained: int | None
) -> tuple[Milestone, ...]:
    if variant.uptraining is None:
        return ()
    tokens = variant.uptraining.pretraining_tokens or pretrained
    if tokens is None:
        name = base.model if isinstance(base, Loaded) else base.name
        raise GptlabError(
            f"uptraining takes shares of the tokens that {name} was trained on, which are not recorded; state them by"
            " budget.of in [uptrain] set"
        )
    return variant.uptraining.milestones(config.context_length, tokens)


def _tokens(variant: Variant, config: ModelConfig, dataset: Dataset | None) -> int | None:
    """The tokens that a run sees, or that a loaded model saw where a card beside it says so."""
    if isinstance(variant, Trained) and dataset is not None:
        length = variant.recipe.length(config)
        rows, _ = rows_of(dataset, variant.recipe, length)
        return variant.recipe.steps(length, len(rows)) * variant.recipe.batch.size * length
    return card_tokens(variant.model) if isinstance(variant, Loaded) else None


def card_tokens(model: str) -> int | None:
    """Return the tokens that a model was trained on, from the card beside it; None where there is none."""
    try:
        tokens = json.loads((locate(model) / "card.json").read_text(encoding="utf-8"))["tokens_trained"]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return tokens if isinstance(tokens, int) else None
