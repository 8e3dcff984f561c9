"""From the answers of single models to `results.json`: means over seeds, differences to the base, effects, claims."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import torch

import gptlab
from gptlab.config import ModelConfig
from gptlab.evaluation.scoring import Result
from gptlab.model import cost
from gptlab.study import costs, statistics
from gptlab.study.assemble_conversion import Looks, conversion, scores
from gptlab.study.claims import claims_of_results
from gptlab.study.files import StudySettings
from gptlab.study.results import (
    About,
    AttentionMap,
    ByPosition,
    Conversion,
    Conversions,
    Copy,
    Corpus,
    Heads,
    Induction,
    Interval,
    Quality,
    Race,
    Results,
    Run,
    Sample,
    Variant,
)
from gptlab.study.variants import Cell, changes, factors_of, kinds_of, study_order

_Row = TypeVar("_Row", Copy, Induction)


@dataclass
class Answers:
    """Everything that is known of one variant; lists have one entry for each run that went to its end.

    Attributes:
        cell: the variant.
        config: its architecture.
        tokens_trained: by each of its runs, or None where nobody wrote it down.
        runs: its training runs, none for a model that was loaded.
        results: score on the held-out text by seed; a model that was loaded has 0.
        by_position: loss by position.
        copies: copying at a distance.
        inductions: induction.
        heads: of the first run.
        samples: of the first run.
        attention_map: of the first run.
        looks: where it is made by conversion, the losses on the way.
    """

    cell: Cell
    config: ModelConfig
    tokens_trained: int | None
    runs: list[Run] = field(default_factory=list)
    results: dict[int, Result] = field(default_factory=dict)
    by_position: list[ByPosition] = field(default_factory=list)
    copies: list[list[Copy]] = field(default_factory=list)
    inductions: list[Induction] = field(default_factory=list)
    heads: Heads | None = None
    samples: list[Sample] = field(default_factory=list)
    attention_map: AttentionMap | None = None
    looks: Looks | None = None


def assemble(
    study: StudySettings,
    answers: Sequence[Answers],
    *,
    seeds: list[int],
    corpus: Corpus,
    recipe: dict[str, Any],
    protocol: str,
    text: str,
    race: Race | None,
    converted: Conversions | None = None,
) -> Results:
    """Return `results.json` of a study.

    Args:
        study: its settings.
        answers: of all variants, the base first.
        seeds: that every variant was trained with.
        corpus: what was trained on, or evaluated on where nothing was trained.
        recipe: of the base, or nothing where all models were loaded.
        protocol: how the held-out text was scored.
        text: what it is called.
        race: the race, if there was one.
        converted: what all conversions have in common, where there are some.
    """
    base = answers[0]
    scored: dict[str, Mapping[int, Result]] = {one.cell.name: one.results for one in answers}
    looks = {one.cell.name: one.looks for one in answers if one.looks is not None}
    configs = {one.cell.name: one.config for one in answers}
    if converted is not None:
        scored |= scores(looks, base.cell.name, base.results)
    named = {}
    for one in answers:
        name, about, difference, reference = one.cell.name, None, None, None
        if one is not base:
            reference = _compared(name, answers, converted)
            difference = statistics.contrast({name: 1.0, reference: -1.0}, scored)
        if converted is not None and name in looks:
            about = conversion(name, looks, configs, base.cell.name, converted.reference, scored)
        named[name] = _variant(one, base.config, study, protocol, text, reference, difference, about)
    sources = {one.cell.load is None for one in answers if one.cell.convert is None}
    kind: Literal["trained", "shipped", "mixed"] = (
        "mixed" if len(sources) > 1 else "trained" if True in sources else "shipped"
    )
    results = Results(
        study=About(
            name=study.name,
            title=study.title,
            question=study.question,
            base=base.cell.name,
            kind=kind,
            tokens=base.tokens_trained or 0,
            seeds=seeds,
            corpus=corpus,
            recipe=recipe,
            factors=list(dict.fromkeys(factor for one in answers for factor in named[one.cell.name].factors)),
            quick=study.quick,
            made_with={"gptlab": gptlab.__version__, "torch": torch.__version__, "threads": torch.get_num_threads()},
            conversion=converted,
        ),
        variants={name: named[name] for name in study_order(study) if name in named},
        effects=statistics.effects({name: variant.factors for name, variant in named.items()}, scored),
        four_sizes=costs.four_sizes(configs, base.cell.name),
        race=race,
    )
    return results.model_copy(update={"claims": claims_of_results(study.claims, results, scored)})


def _compared(name: str, answers: Sequence[Answers], converted: Conversions | None) -> str:
    """The variant that another is compared with: the base, or the base trained on where the other is, too."""
    yardstick = converted.reference if converted is not None else None
    trained_on = any(one.cell.name == name and one.cell.uptrain is not None for one in answers)
    return yardstick if yardstick is not None and trained_on and name != yardstick else answers[0].cell.name


def _variant(
    one: Answers,
    base: ModelConfig,
    study: StudySettings,
    protocol: str,
    text: str,
    reference: str | None,
    difference: Interval | None,
    about: Conversion | None,
) -> Variant:
    contexts, batches = sorted({*study.measure.contexts, one.config.context_length}), sorted(study.measure.batches)
    changed = changes(one.config, base)
    return Variant(
        label=one.cell.label,
        changes=changed,
        kinds=kinds_of(changed),
        reference=reference,
        difference=difference,
        factors=list(one.cell.factors or factors_of(changed)),
        config=one.config,
        source="converted" if one.cell.convert is not None else "trained" if one.cell.load is None else "shipped",
        tokens_trained=one.tokens_trained,
        parameters=costs.parameters(one.config),
        flops_per_token=costs.flops_per_token(one.config, contexts),
        cache=costs.cache_sizes(one.config, contexts, batches),
        receptive_field=cost.receptive_field(one.config),
        runs=one.runs,
        quality=_quality(list(one.results.values()), protocol, text),
        by_position=_mean_positions(one.by_position),
        copying=[_mean_row(rows) for rows in zip(*one.copies, strict=True)],
        induction=_mean_row(one.inductions) if one.inductions else None,
        heads=one.heads,
        attention_map=one.attention_map,
        samples=one.samples,
        conversion=about,
    )


def _quality(results: list[Result], protocol: str, text: str) -> Quality | None:
    if not results:
        return None
    by_run = [result.metrics["nats_per_token"] for result in results]
    return Quality(
        protocol=protocol,
        text=text,
        nats_per_token=_mean(by_run),
        bits_per_byte=_mean([result.metrics["bits_per_byte"] for result in results]),
        documents=len(results[0].scores),
        tokens=sum(score.tokens for score in results[0].scores),
        by_run=by_run,
    )


def _mean_positions(found: list[ByPosition]) -> ByPosition | None:
    if not found:
        return None
    columns = zip(*(one.nats for one in found), strict=True)
    return ByPosition(
        protocol=found[0].protocol,
        buckets=found[0].buckets,
        nats=[_mean(column) for column in columns],
        trained_length=found[0].trained_length,
    )


def _mean_row(rows: Sequence[_Row]) -> _Row:
    """The first row with its real numbers replaced by their means."""
    means = {name: _mean([getattr(row, name) for row in rows]) for name, value in rows[0] if isinstance(value, float)}
    return rows[0].model_copy(update=means)


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
