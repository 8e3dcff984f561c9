"""The evaluation of a study: every model that was made is asked the same, conversions at every milestone too."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from gptlab.evaluation.scoring import Result
from gptlab.language_model import LanguageModel
from gptlab.progress import Report
from gptlab.study.directory import CACHE, model_key
from gptlab.study.evaluator import Evaluator
from gptlab.study.held_out import write_held_out
from gptlab.study.make import Made, Model, load_model
from gptlab.study.resolve import Entry, Plan
from gptlab.study.results import AttentionMap, ByPosition, Copy, Corpus, Heads, Induction, Sample
from gptlab.text.splits import Part
from gptlab.training.loop import rows_of

Scores = dict[int, Result]
"""Score on the held-out text by seed."""


@dataclass
class Answers:
    """What the models of one variant answered; lists have one entry for each run that went to its end.

    Attributes:
        scores: on the held-out text; a model that was loaded has seed 0.
        by_position: loss by position.
        copying: at a distance.
        inductions: induction.
        heads: of the first run.
        samples: of the first run.
        attention_map: of the first run.
    """

    scores: Scores = field(default_factory=dict)
    by_position: list[ByPosition] = field(default_factory=list)
    copying: list[list[Copy]] = field(default_factory=list)
    inductions: list[Induction] = field(default_factory=list)
    heads: Heads | None = None
    samples: list[Sample] = field(default_factory=list)
    attention_map: AttentionMap | None = None


@dataclass
class Course:
    """What a conversion and its uptraining answered on the way.

    Attributes:
        scores: on the held-out text, by share of the pre-training; right after a conversion by the seed of the base.
        own_context: the same in windows of the model's own context, where that is longer than the base's.
        divergences: from the base right after each conversion.
        divergence_tokens: that these were measured on.
    """

    scores: dict[float, Scores] = field(default_factory=dict)
    own_context: dict[float, Scores] = field(default_factory=dict)
    divergences: list[float] = field(default_factory=list)
    divergence_tokens: int = 0


@dataclass(frozen=True)
class Evaluation:
    """All answers of a study.

    Attributes:
        text: the held-out text.
        part: which of its documents were read, None where all of them might be.
        protocol: how it was scored, in words.
        answers: by variant.
        courses: by variant that was converted.
        ages: by tokens and variant, where the study has ages; the last are the same as ``answers``.
        baselines: the count trigram of as many tokens, by their number.
    """

    text: Corpus
    part: Part | None
    protocol: str
    answers: dict[str, Answers]
    courses: dict[str, Course]
    ages: dict[int, dict[str, Answers]]
    baselines: dict[int, Result]


def evaluate(plan: Plan, made: Mapping[tuple[str, int], Made], report: Report) -> Evaluation:
    """Evaluate every model of a study.

    Args:
        plan: of the study.
        made: its models by variant and seed.
        report: called as the work goes on.
    """
    text = write_held_out(plan.study.evaluate, plan.dataset, plan.out)
    evaluator = Evaluator(text.path, text.name, plan.study.evaluate, plan.length, plan.out / CACHE)
    answers = {entry.name: Answers() for entry in plan.entries}
    models = {key: one.model for key, one in made.items() if one.model is not None}
    for i, ((name, seed), model) in enumerate(models.items()):
        what = f"{name}, seed {seed}" if plan.seeds else name
        report({"event": "phase", "phase": "evaluate", "what": what, "done": i, "of": len(models)})
        _ask(answers[name], seed, load_model(model, plan.device), evaluator)
    ages = _ages(plan, made, answers, evaluator, report)
    courses = {}
    for entry in plan.entries:
        if entry.milestones:
            what = f"{entry.name}, on the way"
            report({"event": "phase", "phase": "evaluate", "what": what, "done": 0, "of": 1})
            courses[entry.name] = _course(plan, entry, made, evaluator)
    _draw_attention(plan, answers, models, evaluator)
    corpus = Corpus(name=evaluator.name, sha256=evaluator.sha256)
    baselines = _baselines(plan, answers, evaluator, report)
    return Evaluation(corpus, text.part, evaluator.protocol, answers, courses, ages, baselines)


def _baselines(plan: Plan, answers: Mapping[str, Answers], evaluator: Evaluator, report: Report) -> dict[int, Result]:
    """Score a count trigram of what a run of the base has read, at its end."""
    like = next((score for one in answers.values() for score in one.scores.values()), None)
    numbers = {plan.base.tokens, *plan.study.ages[:-1]} - {None}
    if plan.dataset is None or like is None:
        return {}
    seed, length, results = (plan.seeds or (0,))[0], plan.recipe.length(plan.base.config), {}
    for tokens in sorted(filter(None, numbers)):
        report({"event": "phase", "phase": "evaluate", "what": f"trigram of {tokens:,} tokens", "done": 0, "of": 1})
        rows, _ = rows_of(plan.dataset, plan.recipe, length)
        results[tokens] = evaluator.score_counts(plan.dataset, rows, tokens, seed, like)
    return results


def _ages(
    plan: Plan,
    made: Mapping[tuple[str, int], Made],
    answers: dict[str, Answers],
    evaluator: Evaluator,
    report: Report,
) -> dict[int, dict[str, Answers]]:
    """Ask the models of all ages but the last, whose answers there are, for losses, copies and induction."""
    ages: dict[int, dict[str, Answers]] = {}
    for tokens in plan.study.ages[:-1]:
        ages[tokens] = {name: Answers() for name in answers}
        report({"event": "phase", "phase": "evaluate", "what": f"at {tokens:,} tokens", "done": 0, "of": 1})
        for (name, seed), one in made.items():
            if tokens in one.ages:
                lm = load_model(one.ages[tokens], plan.device)
                _ask_for_losses(ages[tokens][name], seed, lm, model_key(lm), evaluator)
    return ages | dict.fromkeys(plan.study.ages[-1:], answers)


def _ask_for_losses(answers: Answers, seed: int, lm: LanguageModel, key: str, evaluator: Evaluator) -> None:
    answers.scores[seed] = evaluator.score(lm, key)
    answers.copying.append(evaluator.copying(lm, key))
    answers.inductions.append(evaluator.induction(lm, key))


def _ask(answers: Answers, seed: int, lm: LanguageModel, evaluator: Evaluator) -> None:
    key = model_key(lm)
    _ask_for_losses(answers, seed, lm, key, evaluator)
    if (positions := evaluator.by_position(lm, key)) is not None:
        answers.by_position.append(positions)
    if answers.heads is None:
        answers.heads, answers.samples = evaluator.heads(lm, key), evaluator.samples(lm, key)


def _course(plan: Plan, entry: Entry, made: Mapping[tuple[str, int], Made], evaluator: Evaluator) -> Course:
    """Evaluate a variant right after its conversion and at every milestone of its uptraining."""
    course = Course()
    for seed in entry.seeds:
        for share, model in made[entry.name, seed].checkpoints.items():
            # Seeds of an uptraining may have one conversion in common, that of a loaded base.
            of_run = seed if share else plan.base_seed(seed)
            if of_run in course.scores.setdefault(share, {}):
                continue
            lm = load_model(model, plan.device)
            key = model_key(lm)
            course.scores[share][of_run] = evaluator.score(lm, key)
            if entry.config.context_length > plan.base.config.context_length:
                own = evaluator.score(lm, key, lm.config.context_length)
                course.own_context.setdefault(share, {})[of_run] = own
            source = made[plan.base.name, of_run].model if not share and plan.study.evaluate.divergence else None
            if source is not None:
                base = load_model(source, plan.device)
                nats, course.divergence_tokens = evaluator.divergence(base, model_key(base), lm, key)
                course.divergences.append(nats)
    return course


def _draw_attention(
    plan: Plan, answers: Mapping[str, Answers], models: Mapping[tuple[str, int], Model], evaluator: Evaluator
) -> None:
    """Take the map of the same head in all variants: the one with the largest mean distance in the base."""
    heads = answers[plan.base.name].heads
    if heads is None:
        return
    far = [(-mean, layer, h) for layer, row in enumerate(heads.layers) for h, mean in enumerate(row.distance)]
    _, layer, head = min(far)
    windows = [window for entry in plan.entries for window in entry.config.windows if window is not None]
    tokens = max(32, 5 * min(windows, default=48) // 4)  # enough to see where a window ends
    for name, own in answers.items():
        if own.scores:
            lm = load_model(models[name, min(own.scores)], plan.device)
            own.attention_map = evaluator.attention_map(lm, model_key(lm), layer, head, tokens)
