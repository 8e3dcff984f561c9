"""The evaluation of a study: every model that was made is asked the same, conversions at every milestone too."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from gptlab.checkpoints.files import write_files
from gptlab.errors import GptlabError
from gptlab.evaluation.scoring import Result
from gptlab.language_model import LanguageModel
from gptlab.progress import Report
from gptlab.study.directory import CACHE, model_key
from gptlab.study.evaluator import Evaluator
from gptlab.study.make import Made, Model, load_model
from gptlab.study.resolve import Entry, Plan
from gptlab.study.results import AttentionMap, ByPosition, Copy, Corpus, Heads, Induction, Sample
from gptlab.study.settings import EvaluationSettings
from gptlab.text.documents import open_documents
from gptlab.text.shards import Dataset, Split
from gptlab.text.tokenizers import END_OF_TEXT, Tokenizer

Scores = dict[int, Result]
"""Score on the held-out text by seed."""

HELD_OUT = "held_out.txt"


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
        protocol: how it was scored, in words.
        answers: by variant.
        courses: by variant that was converted.
    """

    text: Corpus
    protocol: str
    answers: dict[str, Answers]
    courses: dict[str, Course]


def evaluate(plan: Plan, made: Mapping[tuple[str, int], Made], report: Report) -> Evaluation:
    """Evaluate every model of a study.

    Args:
        plan: of the study.
        made: its models by variant and seed.
        report: called as the work goes on.
    """
    text, name = write_held_out(plan.study.evaluate, plan.dataset, plan.out)
    evaluator = Evaluator(text, name, plan.study.evaluate, plan.length, plan.out / CACHE)
    answers = {entry.name: Answers() for entry in plan.entries}
    models = {key: one.model for key, one in made.items() if one.model is not None}
    for i, ((name, seed), model) in enumerate(models.items()):
        what = f"{name}, seed {seed}" if plan.seeds else name
        report({"event": "phase", "phase": "evaluate", "what": what, "done": i, "of": len(models)})
        _ask(answers[name], seed, load_model(model, plan.device), evaluator)
    courses = {}
    for entry in plan.entries:
        if entry.milestones:
            what = f"{entry.name}, on the way"
            report({"event": "phase", "phase": "evaluate", "what": what, "done": 0, "of": 1})
            courses[entry.name] = _course(plan, entry, made, evaluator)
    _draw_attention(plan, answers, models, evaluator)
    return Evaluation(Corpus(name=evaluator.name, sha256=evaluator.sha256), evaluator.protocol, answers, courses)


def _ask(answers: Answers, seed: int, lm: LanguageModel, evaluator: Evaluator) -> None:
    key = model_key(lm)
    answers.scores[seed] = evaluator.score(lm, key)
    if (positions := evaluator.by_position(lm, key)) is not None:
        answers.by_position.append(positions)
    answers.copying.append(evaluator.copying(lm, key))
    answers.inductions.append(evaluator.induction(lm, key))
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


def write_held_out(settings: EvaluationSettings, dataset: Dataset | None, directory: Path) -> tuple[Path, str]:
    """Write the text that the models of a study are asked about; return the file and what to call it.

    Args:
        settings: of the study.
        dataset: what its variants are trained on, or None where none is.
        directory: of the study.

    Raises:
        GptlabError: no such text, or no text named where nothing is trained.
    """
    documents: Iterable[str]
    if settings.text is not None:
        corpus = open_documents([settings.text])
        documents, name = corpus, corpus.name
    elif dataset is not None:
        documents, name = _decoded(dataset.validation, dataset.tokenizer), f"held-out part of {dataset.name}"
    else:
        raise GptlabError("a study of trained models needs a text to ask them about; set evaluate.text")
    parts, left = [], settings.bytes
    for document in documents:
        part = document.encode()[:left].decode(errors="ignore")
        if part.strip():
            parts.append(part if part.endswith("\n") else part + "\n")
        left -= len(part.encode())
        if left <= 0:
            break
    content = f"{END_OF_TEXT}\n".join(parts).encode()
    path = directory / HELD_OUT
    if not path.exists() or path.read_bytes() != content:
        write_files(directory, {HELD_OUT: content})
    return path, name


def _decoded(split: Split, tokenizer: Tokenizer) -> Iterable[str]:
    """The documents of a split; all of it where their ends are not recorded."""
    for ids in split.documents():
        yield tokenizer.decode([i for i in ids.tolist() if i != tokenizer.end_of_text])
