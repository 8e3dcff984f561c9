"""From the answers of single models to `results.json`: means over seeds, differences, effects, claims."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import TypeVar

import torch

import gptlab
from gptlab.conversion.calibration import default_tokens
from gptlab.conversion.rotary import MOST_TOKENS
from gptlab.evaluation.scoring import Result
from gptlab.evaluation.trigram import DEFINITION
from gptlab.model import cost
from gptlab.study import costs, statistics
from gptlab.study.claims import TRIGRAM, claims_of_results
from gptlab.study.directory import plain
from gptlab.study.evaluate import Evaluation
from gptlab.study.make import Made
from gptlab.study.resolve import Entry, Plan
from gptlab.study.results import (
    About,
    Age,
    Baseline,
    ByPosition,
    Checkpoint,
    Conversion,
    Conversions,
    Copy,
    Corpus,
    Induction,
    Interval,
    Quality,
    Rate,
    Results,
    Variant,
)
from gptlab.study.statistics import Scored, at, at_age, contrast, residual, unit_of
from gptlab.study.variants import Converted, Loaded, Trained, continued_base, rank

_Row = TypeVar("_Row", Copy, Induction)


def assemble(plan: Plan, made: Mapping[tuple[str, int], Made], evaluation: Evaluation) -> Results:
    """Return `results.json` of a study.

    Args:
        plan: of the study.
        made: its runs and models, by variant and seed.
        evaluation: what the models answered.
    """
    scored = all_scores(plan, evaluation)
    variants = _corrected({entry.name: _variant(entry, plan, made, evaluation, scored) for entry in plan.entries})
    trained = [entry.name for entry in plan.entries if isinstance(entry.variant, Trained)]
    results = Results(
        study=_about(plan, evaluation, variants),
        variants=variants,
        effects=statistics.effects({name: variant.factors for name, variant in variants.items()}, scored),
        four_sizes=costs.four_sizes({entry.name: entry.config for entry in plan.entries}, plan.base.name),
        residual=residual(trained, scored),
        baselines=[_baseline(tokens, plan, evaluation) for tokens in sorted(evaluation.baselines)],
        ages=[_age(tokens, plan, variants, evaluation, scored) for tokens in evaluation.ages],
        rates=_rates(plan, variants),
    )
    claims = claims_of_results(plan.study.claims, plan.study.claim, results, scored)
    return results.model_copy(update={"claims": claims})


def all_scores(plan: Plan, evaluation: Evaluation) -> Scored:
    """Return all scores: of finished models by variant, on the way under the names of `at`; the base's own at 0.

    Models have noise of one size that were trained from scratch, and conversions after the same share.
    """
    scores: dict[str, Mapping[int, Result]] = {name: one.scores for name, one in evaluation.answers.items()}
    scores[at(plan.base.name, 0.0)] = scores[plan.base.name]
    seeds = plan.seeds or (0,)  # counts know none: the same beside each
    for tokens, result in evaluation.baselines.items():
        age = tokens if tokens in evaluation.ages else max(evaluation.ages, default=tokens)
        scores[at_age(TRIGRAM, age)] = dict.fromkeys(seeds, result)
    if plan.base.tokens in evaluation.baselines:
        scores[TRIGRAM] = dict.fromkeys(seeds, evaluation.baselines[plan.base.tokens])
    pools = [frozenset(entry.name for entry in plan.entries if isinstance(entry.variant, Trained))]
    for tokens, asked in evaluation.ages.items():
        scores |= {at_age(name, tokens): one.scores for name, one in asked.items()}
        pools.append(frozenset(at_age(name, tokens) for name in asked))
    by_share: dict[float, set[str]] = {}
    for name, course in evaluation.courses.items():
        for share, at_share in course.scores.items():
            scores[at(name, share)] = at_share
            by_share.setdefault(share, set()).add(at(name, share))
        for share, at_share in course.own_context.items():
            scores[at(name, share, own_context=True)] = at_share
    last = {name: max(course.scores) for name, course in evaluation.courses.items() if course.scores}
    pools += [frozenset(names | {n for n, end in last.items() if end == share}) for share, names in by_share.items()]
    return Scored(scores, pools)


def _baseline(tokens: int, plan: Plan, evaluation: Evaluation) -> Baseline:
    """The trigram of so many tokens, beside the first run of the base after as many."""
    result = evaluation.baselines[tokens]
    answers = evaluation.answers if tokens == plan.base.tokens else evaluation.ages.get(tokens, {})
    scores = answers[plan.base.name].scores if plan.base.name in answers else {}
    quality, difference = _quality([result], evaluation), None
    assert quality is not None
    if scores:
        both = {"base": scores[min(scores)], TRIGRAM: result}
        difference = statistics.over_documents(both, {"base": 1.0, TRIGRAM: -1.0}).interval
    return Baseline(label=TRIGRAM, definition=f"{DEFINITION}.", tokens=tokens, quality=quality, difference=difference)


def _age(tokens: int, plan: Plan, variants: Mapping[str, Variant], evaluation: Evaluation, scored: Scored) -> Age:
    """All variants after so many tokens."""
    answers = evaluation.ages[tokens]
    gaps = {n: _difference(at_age(n, tokens), at_age(plan.base.name, tokens), scored) for n in answers}
    counted = tokens if tokens in evaluation.baselines else plan.base.tokens or 0
    return Age(
        tokens=tokens,
        quality={n: own for n, one in answers.items() if (own := _quality(one.scores.values(), evaluation))},
        differences=statistics.corrected({n: g for n, g in gaps.items() if g is not None and n != plan.base.name}),
        effects=statistics.effects({at_age(n, tokens): one.factors for n, one in variants.items()}, scored),
        induction={n: _mean_row(one.inductions) for n, one in answers.items() if one.inductions},
        copying={n: [_mean_row(rows) for rows in zip(*one.copying, strict=True)] for n, one in answers.items()},
        residual=residual([at_age(n, tokens) for n in answers], scored, {at_age(n, tokens): n for n in answers}),
        baseline=_baseline(counted, plan, evaluation) if counted in evaluation.baselines else None,
    )


def _rates(plan: Plan, variants: Mapping[str, Variant]) -> dict[str, list[Rate]]:
    """What a search for the learning rate has found, by variant."""
    rates: dict[str, list[Rate]] = {}
    for entry in plan.entries:
        if isinstance(entry.variant, Trained) and entry.variant.searched is not None:
            quality, rate = variants[entry.name].quality, entry.variant.recipe.optimizer.learning_rate
            nats = None if quality is None else quality.nats_per_token
            one = Rate(learning_rate=rate, variant=entry.name, nats_per_token=nats)
            rates.setdefault(entry.variant.searched, []).append(one)
    return rates


def _corrected(variants: dict[str, Variant]) -> dict[str, Variant]:
    """The variants with the p-values of their differences adjusted for each other."""
    gaps = statistics.corrected({n: one.difference for n, one in variants.items() if one.difference is not None})
    return {n: one.model_copy(update={"difference": gaps.get(n)}) for n, one in variants.items()}


def _about(plan: Plan, evaluation: Evaluation, variants: Mapping[str, Variant]) -> About:
    sources = {variant.source for variant in variants.values()} - {"converted"}
    dataset, trained = plan.dataset, any(isinstance(entry.variant, Trained) for entry in plan.entries)
    return About(
        name=plan.study.name,
        title=plan.study.title,
        question=plan.study.question,
        base=plan.base.name,
        kind="mixed" if len(sources) > 1 else "trained" if "trained" in sources else "shipped",
        tokens=plan.base.tokens or 0,
        seeds=list(plan.seeds),
        corpus=evaluation.text if dataset is None else Corpus(name=dataset.name, sha256=dataset.sha256),
        recipe=plain(plan.recipe) if trained else {},
        factors=sorted({factor for variant in variants.values() for factor in variant.factors}, key=rank),
        quick=plan.study.quick,
        made_with={"gptlab": gptlab.__version__, "torch": torch.__version__, "threads": torch.get_num_threads()},
        conversion=_conversions(plan),
    )


def _conversions(plan: Plan) -> Conversions | None:
    """What all conversions have in common."""
    converted = [entry.variant for entry in plan.entries if isinstance(entry.variant, Converted)]
    if not converted:
        return None
    text = "pydoc" if plan.dataset is None else f"the training data of {plan.dataset.name}"
    n_tokens = default_tokens(plan.base.config.n_embd)
    continued = continued_base(converted)
    general = (
        next((v.uptraining for v in converted if v.uptraining), None) if continued is None else continued.uptraining
    )
    return Conversions(
        calibration=f"about {n_tokens:,} tokens of {text}, positions on {MOST_TOKENS:,} of them",
        reference=None if continued is None else continued.name,
        pretraining_tokens=None if general is None else general.pretraining_tokens or plan.base.tokens,
        recipe=None if general is None else plain(general.recipe),
    )


def _variant(
    entry: Entry, plan: Plan, made: Mapping[tuple[str, int], Made], evaluation: Evaluation, scored: Scored
) -> Variant:
    config, answers, settings = entry.config, evaluation.answers[entry.name], plan.study.measure
    contexts, batches = sorted({*settings.contexts, config.context_length}), sorted(settings.batches)
    difference = None
    if entry.reference is not None:
        difference = _difference(entry.name, entry.reference, scored)
    own = [made[entry.name, seed] for seed in entry.seeds]
    source = entry.variant
    return Variant(
        label=source.label,
        changes=entry.changes,
        kinds=entry.kinds,
        factors=entry.factors,
        reference=entry.reference,
        difference=difference,
        config=config,
        source="converted" if entry.milestones else "shipped" if isinstance(source, Loaded) else "trained",
        tokens_trained=entry.tokens,
        parameters=costs.parameters(config),
        flops_per_token=costs.flops_per_token(config, contexts),
        cache=costs.cache_sizes(config, contexts, batches),
        receptive_field=cost.receptive_field(config),
        runs=[one.run for one in own if one.run is not None],
        quality=_quality(answers.scores.values(), evaluation),
        by_position=_mean_positions(answers.by_position),
        copying=[_mean_row(rows) for rows in zip(*answers.copying, strict=True)],
        induction=_mean_row(answers.inductions) if answers.inductions else None,
        heads=answers.heads,
        attention_map=answers.attention_map,
        samples=answers.samples,
        conversion=_conversion(entry, plan, own, evaluation, scored) if isinstance(source, Converted) else None,
    )


def _difference(name: str, other: str, scored: Scored) -> Interval | None:
    estimate = contrast({name: 1.0, other: -1.0}, scored)
    return None if estimate is None else estimate.interval


def _quality(scores: Iterable[Result], evaluation: Evaluation) -> Quality | None:
    results = list(scores)
    if not results:
        return None
    by_run = [result.metrics["nats_per_token"] for result in results]
    return Quality(
        protocol=evaluation.protocol,
        text=evaluation.text.name,
        nats_per_token=fmean(by_run),
        bits_per_byte=fmean([result.metrics["bits_per_byte"] for result in results]),
        documents=len(results[0].scores),
        tokens=sum(score.tokens for score in results[0].scores),
        by_run=by_run,
        unit=unit_of(results[0]),
        part=evaluation.part,
    )


def _conversion(
    entry: Entry, plan: Plan, made: Sequence[Made], evaluation: Evaluation, scored: Scored
) -> Conversion | None:
    variant, course = entry.variant, evaluation.courses[entry.name]
    if not isinstance(variant, Converted):
        return None
    return Conversion(
        changes=variant.changes.to_dict(),
        steps=next((list(one.steps) for one in made if one.checkpoints), []),
        settings=[] if variant.uptraining is None else list(variant.uptraining.settings),
        divergence=fmean(course.divergences) if course.divergences else None,
        divergence_tokens=course.divergence_tokens,
        checkpoints=[_checkpoint(entry, share, plan, evaluation, scored) for share in sorted(course.scores)],
    )


def _checkpoint(entry: Entry, share: float, plan: Plan, evaluation: Evaluation, scored: Scored) -> Checkpoint:
    """The loss of a conversion after a share of the pre-training, compared with what saw as many tokens."""
    name, course, base = entry.name, evaluation.courses[entry.name], plan.base.name
    by_run = [result.metrics["nats_per_token"] for result in course.scores[share].values()]
    # The continued base is its own reference after training, so there is nothing to compare it with.
    against = base if share == 0 else None if entry.reference == base else entry.reference
    rivals: dict[str, Interval] = {}
    for other in plan.entries:
        if other.milestones and other.name != name and other.config == entry.config:
            difference = _difference(at(name, share), at(other.name, share), scored)
            if difference is not None:
                rivals[other.name] = difference
    own = course.own_context.get(share)
    return Checkpoint(
        share=share,
        tokens=next(milestone.tokens for milestone in entry.milestones if milestone.share == share),
        nats_per_token=fmean(by_run),
        by_run=by_run,
        difference=None if against is None else _difference(at(name, share), at(against, share), scored),
        rivals=rivals,
        own_context=None if own is None else fmean([result.metrics["nats_per_token"] for result in own.values()]),
    )


def _mean_positions(rows: Sequence[ByPosition]) -> ByPosition | None:
    if not rows:
        return None
    columns = zip(*(row.nats for row in rows), strict=True)
    return rows[0].model_copy(update={"nats": [fmean(column) for column in columns]})


def _mean_row(rows: Sequence[_Row]) -> _Row:
    """The first row with its real numbers replaced by their means."""
    means = {name: fmean([getattr(row, name) for row in rows]) for name, value in rows[0] if isinstance(value, float)}
    return rows[0].model_copy(update=means)
