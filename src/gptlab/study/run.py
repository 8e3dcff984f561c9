"""A study from its file to its two result files: train, evaluate, race, measure. Whatever was done before is reused."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gptlab
from gptlab.checkpoints.hub import locate
from gptlab.config import ModelConfig
from gptlab.errors import GptlabError
from gptlab.language_model import LanguageModel
from gptlab.model import cost
from gptlab.study import stages
from gptlab.study.assemble import Answers, assemble
from gptlab.study.claims import claims_of_timings
from gptlab.study.evaluate import Questions, check_settings, model_key, write_held_out
from gptlab.study.measure import measure
from gptlab.study.orders import Order, claim_directory
from gptlab.study.results import Corpus, Race, Racer, Results, Timings, write_results, write_timings
from gptlab.study.runs import finished, run_key, train_run, with_seed
from gptlab.study.timing import timed, training_step
from gptlab.study.variants import Cell, cells, changes, chosen_cells, race_cells
from gptlab.text.documents import open_documents
from gptlab.text.shards import Dataset, open_dataset, prepare
from gptlab.training.loop import rows_of
from gptlab.training.parallel import join
from gptlab.training.recipe import Recipe, read_recipe

Report = Callable[[dict[str, Any]], None]

CACHE, RUNS, DATA, RACE_DATA = "cache", "runs", "data", "race-data"
RACE = (
    "a live race of tiny models on the same batches from the same start, one seed: it shows how training goes, not how"
    " good a variant is"
)


def run_study(order: Order, out: Path, *, report: Report = lambda row: None) -> tuple[Results, Timings]:
    """Do a study, or go on with it where it was stopped, and write `results.json` and `timings.json`.

    Args:
        order: what to do.
        out: the study's directory.
        report: called with plain values as the work goes on: ``plan``, ``phase``, ``training`` (a row of a run) and
            ``note``.

    Raises:
        GptlabError: an impossible variant or setting, a directory that holds something else, no data, no space.
        Interrupted: a signal came during training; the same call goes on.
    """
    work = _Study(order, out, report)
    answers = work.train()
    work.evaluate(answers)
    results = work.results(answers, work.race())
    write_results(out, results)
    timings = work.timings(answers, results)
    write_timings(out, timings)
    return results, timings


class _Study:
    """One study on its way; made when all that can be checked before the work begins was found in order."""

    def __init__(self, order: Order, out: Path, report: Report) -> None:
        study = order.study
        self.study, self.out, self.report = study, out, report
        with join(order.device) as group:
            self.device = group.device
        every = cells(study, order.set)
        self.cells = chosen_cells(every, order.only, study.base)
        self.racers = race_cells(study.race) if study.race else []
        trained = [cell.recipe for cell in self.cells if cell.recipe is not None]
        self.recipe = trained[0] if trained else read_recipe(study.recipe, [*study.set, *order.set])
        self.seeds = _seeds(order, bool(trained))
        for cell in self.cells:
            if cell.load is not None:
                locate(cell.load)  # say now what is not there
        data = open_dataset(order.data) if trained and order.data is not None else None
        corpus = f"corpus {' '.join(self.recipe.data.corpus)}" if trained else None
        claim_directory(order, out, every, self.racers, corpus if data is None else data.sha256)
        self.dataset = data if data is not None or not trained else self._dataset(self.recipe, out / DATA)
        self.configs = {cell.name: self._config(cell) for cell in self.cells}
        self.length = min(config.context_length for config in self.configs.values())
        check_settings(study.evaluate, self.length, None if self.dataset is None else self.dataset.tokenizer)

    def _dataset(self, recipe: Recipe, where: Path) -> Dataset:
        if (where / "index.json").exists():
            return open_dataset(where)
        self._phase("prepare", ", ".join(recipe.data.corpus))
        documents = open_documents(recipe.data.corpus, per_line=recipe.data.items)
        return prepare(documents, recipe.tokenizer, where, held_out=recipe.data.held_out)

    def _config(self, cell: Cell) -> ModelConfig:
        if cell.load is not None:
            return gptlab.load(cell.load).config
        assert self.dataset is not None
        return _config(cell, self.dataset)

    # --- training -------------------------------------------------------------------------------------------------

    def train(self) -> list[Answers]:
        """Train what is to be trained; return what is known of each variant so far."""
        answers = [Answers(cell, self.configs[cell.name], _tokens_of(cell, self.dataset)) for cell in self.cells]
        trained = [one for one in answers if one.cell.recipe is not None]
        self.models: dict[tuple[str, int], str | Path] = {(c.name, 0): c.load for c in self.cells if c.load is not None}
        todo = [(one, seed) for seed in self.seeds for one in trained]
        self._plan([(one.cell, seed) for one, seed in todo])
        for i, (one, seed) in enumerate(todo):
            self._phase("train", f"{one.cell.name}, seed {seed}", i, len(todo))
            assert one.cell.recipe is not None
            assert self.dataset is not None
            run, model = self._train(one.cell.recipe, seed, self.dataset)
            one.runs.append(run)
            if model is None:
                self.report({"event": "note", "text": f"{one.cell.name}, seed {seed} failed: {run['error']}"})
            else:
                self.models[one.cell.name, seed] = model
        if not self.models:
            raise GptlabError(f"no variant could be trained: {trained[0].runs[0]['error']}")
        return answers

    def _train(self, recipe: Recipe, seed: int, dataset: Dataset) -> Any:
        def tell(row: dict[str, Any]) -> None:
            self.report({"event": "training", "row": row})

        return train_run(recipe, seed, dataset, self.out / RUNS, device=str(self.device), report=tell)

    def _plan(self, runs: Sequence[tuple[Cell, int]]) -> None:
        """Say how much there is to train, and about how long that will take."""
        assert self.dataset is not None or not runs
        missing = [(cell, seed) for cell, seed in runs if finished(self._run(cell, seed)) is None]
        tokens = sum(_tokens_of(cell, self.dataset) or 0 for cell, _ in missing)
        seconds = tokens * self._seconds_per_token(missing[0][0]) if missing else 0.0
        self.report(
            {
                "event": "plan",
                "study": self.study.name,
                "variants": len(self.cells),
                "runs": len(runs),
                "done": len(runs) - len(missing),
                "tokens": tokens,
                "seconds": seconds,
            }
        )

    def _run(self, cell: Cell, seed: int) -> Path:
        assert cell.recipe is not None
        assert self.dataset is not None
        return self.out / RUNS / run_key(with_seed(cell.recipe, seed), self.dataset, str(self.device))

    def _seconds_per_token(self, cell: Cell) -> float:
        """Time a few training steps."""
        assert cell.recipe is not None
        config, rows = self.configs[cell.name], cell.recipe.batch.micro or cell.recipe.batch.size
        step = training_step(gptlab.GPT(config).to(self.device), rows, cell.recipe)
        step()
        return min(timed(step, self.device) for _ in range(2)) / (rows * config.context_length)

    # --- evaluation -----------------------------------------------------------------------------------------------

    def evaluate(self, answers: Sequence[Answers]) -> None:
        """Ask every model the same, and note its answers."""
        text, name = write_held_out(self.study.evaluate, self.dataset, self.out)
        self.questions = ask = Questions(text, name, self.study.evaluate, self.length, self.out / CACHE)
        for i, ((name, seed), model) in enumerate(self.models.items()):
            self._phase("evaluate", f"{name}, seed {seed}" if self.seeds else name, i, len(self.models))
            one = next(one for one in answers if one.cell.name == name)
            lm = self._load(model)
            key = model_key(lm)
            one.results[seed] = ask.score(lm, key)
            positions = ask.by_position(lm, key)
            one.by_position += [] if positions is None else [positions]
            one.copies.append(ask.copying(lm, key))
            one.inductions.append(ask.induction(lm, key))
            if one.heads is None:
                one.heads, one.samples = ask.heads(lm, key), ask.samples(lm, key)
        self._look(answers)

    def _look(self, answers: Sequence[Answers]) -> None:
        """Take the map of the same head in all: the one that looks farthest in the base."""
        heads = answers[0].heads
        if heads is None:
            return
        far = [(-mean, layer, h) for layer, row in enumerate(heads["layers"]) for h, mean in enumerate(row["distance"])]
        _, layer, head = min(far)
        windows = [window for config in self.configs.values() for window in config.windows if window is not None]
        tokens = max(32, 5 * min(windows, default=48) // 4)  # enough to see where a window ends
        for one in answers:
            if one.results:
                lm = self._load(self.models[one.cell.name, min(one.results)])
                one.attention_map = self.questions.attention_map(lm, model_key(lm), layer, head, tokens)

    def _load(self, model: str | Path) -> LanguageModel:
        return gptlab.load(model, device=self.device)

    # --- the race, the clock, the end -----------------------------------------------------------------------------

    def race(self) -> Race | None:
        """Train the racers one after the other on the same batches."""
        settings, recipe = self.study.race, self.racers[0].recipe if self.racers else None
        if settings is None or recipe is None:
            return None
        dataset = self._dataset(recipe, self.out / RACE_DATA)
        base = _config(self.racers[0], dataset)
        racers = {}
        for i, cell in enumerate(self.racers):
            assert cell.recipe is not None
            self._phase("race", cell.name, i, len(self.racers))
            run, _ = self._train(cell.recipe, settings.seed, dataset)
            config = _config(cell, dataset)
            size = sum(cost.parameters(config).values())
            racers[cell.name] = Racer(
                label=cell.label, changes=changes(config, base), config=config.to_dict(), parameters=size, run=run
            )
        return Race(
            label=RACE,
            base=settings.base,
            corpus=Corpus(name=dataset.name, sha256=dataset.sha256),
            tokens=_tokens_of(self.racers[0], dataset) or 0,
            recipe=stages.plain(recipe),
            variants=racers,
        )

    def results(self, answers: Sequence[Answers], race: Race | None) -> Results:
        """Return what `results.json` is to hold."""
        ask = self.questions
        corpus = Corpus(name=ask.name, sha256=ask.sha256)
        if self.dataset is not None:
            corpus = Corpus(name=self.dataset.name, sha256=self.dataset.sha256)
        return assemble(
            self.study,
            answers,
            seeds=self.seeds,
            corpus=corpus,
            recipe=stages.plain(self.recipe) if self.dataset is not None else {},
            protocol=ask.protocol,
            text=ask.name,
            race=race,
        )

    def timings(self, answers: Sequence[Answers], results: Results) -> Timings:
        """Measure; return what `timings.json` is to hold."""
        settings, cache = self.study.measure, self.out / CACHE
        timings = measure(self.configs, settings, self.recipe, cache, device=self.device, report=self.report)
        if self.study.claims:
            timings["claims"] = claims_of_timings(self.study.claims, results, timings)
        return timings

    def _phase(self, phase: str, what: str, done: int = 0, of: int = 1) -> None:
        self.report({"event": "phase", "phase": phase, "what": what, "done": done, "of": of})


def _seeds(order: Order, trains: bool) -> list[int]:
    """Return the seeds to train with, after refusing what is missing or has no effect."""
    name = order.study.name
    if not trains:
        if order.seeds is not None or order.data is not None:
            raise GptlabError(f"the study {name} trains none of its variants, so --seeds and --data have no effect")
        return []
    if order.seeds is not None and order.seeds < 1:
        raise GptlabError(f"--seeds takes the number of seeds, at least 1, got {order.seeds}")
    if order.study.needs_data and order.data is None and not any(s.startswith("data.corpus") for s in order.set):
        raise GptlabError(
            f"the study {name} needs data: name prepared data by --data, or texts by --corpus; see gptlab prepare"
        )
    return list(order.study.seeds) if order.seeds is None else list(range(order.seeds))


def _config(cell: Cell, dataset: Dataset) -> ModelConfig:
    """The architecture of a variant that is trained, for the vocabulary that the data has."""
    assert cell.recipe is not None
    try:
        return cell.recipe.model_for(dataset.tokenizer.vocab_size)
    except GptlabError as error:
        raise GptlabError(f"variant {cell.name!r} is impossible: {error}") from None


def _tokens_of(cell: Cell, dataset: Dataset | None) -> int | None:
    """Tokens that a run of a variant sees, or that a loaded model saw, where a card beside it says so."""
    if cell.recipe is not None and dataset is not None:
        length = _config(cell, dataset).context_length
        rows, _ = rows_of(dataset, cell.recipe, length)
        return cell.recipe.steps(length, len(rows)) * cell.recipe.batch.size * length
    try:
        tokens = json.loads((locate(str(cell.load)) / "card.json").read_text(encoding="utf-8"))["tokens_trained"]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return tokens if isinstance(tokens, int) else None
