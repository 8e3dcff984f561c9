"""A study from its file to its two result files: train, evaluate, race, measure. Whatever was done before is reused."""

from __future__ import annotations

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
from gptlab.study.conversions import converted_config
from gptlab.study.evaluate import Questions, check_settings, model_key, write_held_out
from gptlab.study.making import Making, tokens_of
from gptlab.study.measure import measure
from gptlab.study.orders import Order, claim_directory
from gptlab.study.plans import plan_row
from gptlab.study.results import Corpus, Race, Racer, Results, Run, Timings, write_results, write_timings
from gptlab.study.runs import RUNS, train_run
from gptlab.study.variants import Cell, cells, changes, chosen_cells, race_cells
from gptlab.text.documents import open_documents
from gptlab.text.shards import Dataset, open_dataset, prepare
from gptlab.text.tokenizers import Tokenizer
from gptlab.training.parallel import join
from gptlab.training.recipe import Recipe, read_recipe

Report = Callable[[dict[str, Any]], None]

CACHE, DATA, RACE_DATA = "cache", "data", "race-data"
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
        self.base = self.cells[0]
        trained = [cell.recipe for cell in self.cells if cell.recipe is not None]
        if any(cell.convert is not None for cell in self.cells):
            # Also of those that were not chosen: data are what all conversions are fitted on and measured on.
            trained += [cell.uptrain.recipe for cell in every if cell.uptrain is not None]
        self.recipe = trained[0] if trained else read_recipe(study.recipe, [*study.set, *order.set])
        self.seeds = _seeds(order, bool(trained))
        for cell in self.cells:
            if cell.load is not None:
                locate(cell.load)  # say now what is not there
        self._check_conversions()
        data = open_dataset(order.data) if trained and order.data is not None else None
        corpus = f"corpus {' '.join(self.recipe.data.corpus)}" if trained else None
        claim_directory(order, out, every, self.racers, corpus if data is None else data.sha256)
        made = [cell for cell in self.cells if cell.convert is not None]
        own = gptlab.load(self.base.load).needs_tokenizer() if made and self.base.load is not None else None
        self.dataset = data if data is not None or not trained else self._dataset(self.recipe, out / DATA, own)
        if self.dataset is not None and own is not None and own.sha256 != self.dataset.tokenizer.sha256:
            raise GptlabError(
                f"the data {self.dataset.name} was prepared with another tokenizer than the base {self.base.load} has;"
                f" prepare it again with --tokenizer {self.base.load}"
            )
        self.configs: dict[str, ModelConfig] = {}
        for cell in self.cells:  # the base first, of which others are made
            self.configs[cell.name] = self._config(cell)
        self.making = Making(self.cells, self.configs, self.dataset, out, str(self.device), self._tell)
        self.length = min(config.context_length for config in self.configs.values())
        check_settings(study.evaluate, self.length, None if self.dataset is None else self.dataset.tokenizer)

    def _check_conversions(self) -> None:
        """Refuse an impossible conversion before the directory is claimed; the vocabulary does not matter."""
        base, recipe = self.base, self.base.recipe
        for cell in self.cells:
            if cell.convert is not None:
                config = self._config(base) if recipe is None else recipe.model_for(recipe.tokenizer.vocab_size)
                converted_config(cell.name, config, cell.convert, cell.uptrain)

    def _dataset(self, recipe: Recipe, where: Path, tokenizer: Tokenizer | None = None) -> Dataset:
        if (where / "index.json").exists():
            return open_dataset(where)
        self._phase("prepare", ", ".join(recipe.data.corpus))
        documents = open_documents(recipe.data.corpus, per_line=recipe.data.items)
        return prepare(documents, tokenizer or recipe.tokenizer, where, held_out=recipe.data.held_out)

    def _config(self, cell: Cell) -> ModelConfig:
        if cell.load is not None:
            return gptlab.load(cell.load).config
        if cell.convert is not None:
            return converted_config(cell.name, self.configs[self.base.name], cell.convert, cell.uptrain)
        assert self.dataset is not None
        return _config(cell, self.dataset)

    # --- training -------------------------------------------------------------------------------------------------

    def train(self) -> list[Answers]:
        """Train what is to be trained, and make what is made of the base; return what is known of each variant."""
        answers = [Answers(cell, self.configs[cell.name], self._tokens_of(cell)) for cell in self.cells]
        trained = [one for one in answers if one.cell.recipe is not None]
        self.models: dict[tuple[str, int], str | Path] = {(c.name, 0): c.load for c in self.cells if c.load is not None}
        todo = [(one, seed) for seed in self.seeds for one in trained]
        made = self.making.todo(self.seeds)
        runs = [*((one.cell, seed) for one, seed in todo), *(pair for pair in made if pair[0].uptrain)]
        self.report(plan_row(self.study.name, len(self.cells), runs, self.making))
        for i, (one, seed) in enumerate(todo):
            self._phase("train", f"{one.cell.name}, seed {seed}", i, len(todo))
            assert one.cell.recipe is not None
            assert self.dataset is not None
            self._take(one, seed, *self._train(one.cell.recipe, seed, self.dataset))
        for i, (cell, seed) in enumerate(made):
            seeded = f", seed {seed}" if cell.uptrain or self.base.recipe else ""
            self._phase("train" if cell.uptrain else "convert", f"{cell.name}{seeded}", i, len(made))
            one = next(one for one in answers if one.cell is cell)
            base = self.models.get((self.base.name, self.making.base_seed(seed)))
            self._take(one, seed, *self.making.make(cell, seed, base))
        if not self.models:
            raise GptlabError(f"no variant could be trained: {trained[0].runs[0]['error']}")
        return answers

    def _take(self, one: Answers, seed: int, run: Run | None, model: str | Path | None) -> None:
        """Note what became of one run."""
        if run is not None:
            one.runs.append(run)
        if model is not None:
            self.models[one.cell.name, seed] = model
        elif run is not None:
            self.report({"event": "note", "text": f"{one.cell.name}, seed {run['seed']} failed: {run['error']}"})

    def _train(self, recipe: Recipe, seed: int, dataset: Dataset) -> tuple[Run, Path | None]:
        return train_run(recipe, seed, dataset, self.out / RUNS, device=str(self.device), report=self._tell)

    def _tell(self, row: dict[str, Any]) -> None:
        self.report({"event": "training", "row": row})

    def _tokens_of(self, cell: Cell) -> int | None:
        """Tokens that a variant has seen, those of its base included."""
        if cell.convert is None:
            return tokens_of(cell, self.configs[cell.name], self.dataset)
        return None if self.making.of is None else self.making.of + max(self.making.tokens(cell).values())

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
        for one in answers:
            if one.cell.convert is not None:
                self._phase("evaluate", f"{one.cell.name}, on the way")
                one.looks = self.making.ask(one.cell, ask, self.models)
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
                label=cell.label, changes=changes(config, base), config=config, parameters=size, run=run
            )
        return Race(
            label=RACE,
            base=settings.base,
            corpus=Corpus(name=dataset.name, sha256=dataset.sha256),
            tokens=tokens_of(self.racers[0], base, dataset) or 0,
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
            recipe=stages.plain(self.recipe) if any(cell.recipe for cell in self.cells) else {},
            protocol=ask.protocol,
            text=ask.name,
            race=race,
            converted=self.making.about(),
        )

    def timings(self, answers: Sequence[Answers], results: Results) -> Timings:
        """Measure; return what `timings.json` is to hold."""
        settings, cache = self.study.measure, self.out / CACHE
        first = {config: name for name, config in reversed(self.configs.items())}
        once = {name: config for name, config in self.configs.items() if first[config] == name}
        timings = measure(once, settings, self.recipe, cache, device=self.device, report=self.report)
        # Those of one architecture share their times.
        shared = {name: timings.variants[first[config]] for name, config in self.configs.items()}
        timings = timings.model_copy(update={"variants": shared})
        return timings.model_copy(update={"claims": claims_of_timings(self.study.claims, results, timings)})

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
