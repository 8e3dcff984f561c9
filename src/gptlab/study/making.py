"""The variants of a study that are made of its base, seed by seed: converted, trained on, and looked at on the way."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import gptlab
from gptlab.checkpoints.hub import locate
from gptlab.config import ModelConfig
from gptlab.conversion.calibration import default_tokens
from gptlab.conversion.rotary import MOST_TOKENS
from gptlab.errors import GptlabError
from gptlab.study.assemble_conversion import Looks
from gptlab.study.evaluate import Questions, model_key
from gptlab.study.results import Conversions, Run
from gptlab.study.runs import RUNS, attempt, run_key, run_of, with_seed
from gptlab.study.stages import plain
from gptlab.study.uptrain import (
    CONVERTED,
    Source,
    conversion_key,
    convert_base,
    looks,
    steps_of,
    uptrain,
    uptrain_key,
)
from gptlab.study.variants import Cell, yardstick
from gptlab.text.shards import Dataset
from gptlab.training.loop import rows_of

Report = Callable[[dict[str, Any]], None]


def tokens_of(cell: Cell, config: ModelConfig, dataset: Dataset | None) -> int | None:
    """Return the tokens that a run of a variant sees, or that a loaded model saw, where a card beside it says so."""
    if cell.recipe is not None and dataset is not None:
        length = config.context_length
        rows, _ = rows_of(dataset, cell.recipe, length)
        return cell.recipe.steps(length, len(rows)) * cell.recipe.batch.size * length
    try:
        tokens = json.loads((locate(str(cell.load)) / "card.json").read_text(encoding="utf-8"))["tokens_trained"]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return tokens if isinstance(tokens, int) else None


class Making:
    """What is made of the base of a study.

    Args:
        cells: all variants, the base first.
        configs: their architectures.
        dataset: to train on and to fit conversions on, or None.
        out: the study's directory.
        device: as in `gptlab.training.loop.train`.
        report: called with the rows of the training.

    Raises:
        GptlabError: nobody wrote down how long the base was trained, or two shares come to the same step.
    """

    def __init__(
        self,
        cells: Sequence[Cell],
        configs: Mapping[str, ModelConfig],
        dataset: Dataset | None,
        out: Path,
        device: str,
        report: Report,
    ) -> None:
        self.base, self.configs, self.dataset, self.out = cells[0], configs, dataset, out
        self.cells = [cell for cell in cells if cell.convert is not None]
        self.device, self.report = device, report
        self.of = tokens_of(self.base, configs[self.base.name], dataset)
        self.steps = {cell.name: self._steps(cell) for cell in self.cells}
        self.converted: dict[tuple[str, int], str | Path] = {}
        self.looks: dict[tuple[str, int], dict[int, Path]] = {}
        self._weights = ""

    def _steps(self, cell: Cell) -> tuple[int, ...]:
        """The steps after which a variant is looked at; none where it is not trained on."""
        if cell.uptrain is None:
            return ()
        of = cell.uptrain.of or self.of
        if of is None:
            raise GptlabError(
                f"uptraining takes shares of the tokens that {self.base.load or self.base.name} was trained on, which"
                " nobody wrote down; state them by budget.of in [uptrain] set"
            )
        return cell.uptrain.steps(self.configs[cell.name].context_length, of)

    def tokens(self, cell: Cell) -> dict[float, int]:
        """Return the tokens that a variant is trained on, by share."""
        if cell.uptrain is None:
            return {0.0: 0}
        step = cell.uptrain.recipe.batch.size * self.configs[cell.name].context_length
        shares = zip(cell.uptrain.shares, self.steps[cell.name], strict=True)
        return {0.0: 0, **{share: steps * step for share, steps in shares}}

    def todo(self, seeds: Sequence[int]) -> list[tuple[Cell, int]]:
        """Return all variants with all of their seeds; one that is neither trained nor made of a trained base has 0."""
        seeded = [cell for cell in self.cells if cell.uptrain is not None or self.base.recipe is not None]
        return [(cell, 0) for cell in self.cells if cell not in seeded] + [(c, seed) for seed in seeds for c in seeded]

    def base_seed(self, seed: int) -> int:
        """Return the seed of the base that a variant of this seed is made of."""
        return seed if self.base.recipe is not None else 0

    def _source(self, seed: int, model: str | Path = "") -> Source:
        if self.base.recipe is not None:
            assert self.dataset is not None
            return Source(model, run_key(with_seed(self.base.recipe, seed), self.dataset, self.device))
        self._weights = self._weights or model_key(gptlab.load(str(self.base.load)))
        return Source(str(self.base.load), self._weights)

    def run(self, cell: Cell, seed: int) -> Path:
        """Return the directory of the run that trains a variant on."""
        assert cell.uptrain is not None
        assert cell.convert is not None
        assert self.dataset is not None
        plan, steps = cell.uptrain.plan(seed, self.steps[cell.name]), self.steps[cell.name]
        return self.out / RUNS / uptrain_key(cell.convert, plan, steps, self._source(seed), self.dataset, self.device)

    def done(self, cell: Cell, seed: int) -> bool:
        """Has the variant been trained on to the end?"""
        return looks(self.run(cell, seed), self.steps[cell.name]) is not None

    def make(self, cell: Cell, seed: int, base: str | Path | None) -> tuple[Run | None, str | Path | None]:
        """Make a variant unless that was done before.

        Args:
            cell: the variant.
            seed: of the uptraining, and of the base where that is trained.
            base: the base's model, or None where it could not be trained.

        Returns:
            Its run, None where it has none, and its model, None where it failed.

        Raises:
            Interrupted: a signal came during training; the run is saved and goes on next time.
            OSError: the disk is full, or the like.
        """
        assert cell.convert is not None
        key, source = (cell.name, seed), self._source(seed, base or "")
        where = self.out / CONVERTED / conversion_key(cell.convert, source, self.dataset)
        if base is None:
            return run_of(where, seed, f"its base, seed {seed}, was not trained")

        def work() -> None:
            assert cell.convert is not None
            self.converted[key] = convert_base(cell.convert, source, self.dataset, self.out)

        error = attempt(where, work)
        if error is not None:
            return run_of(where, seed, f"the conversion failed: {error}")
        if cell.uptrain is None:
            return None, self.converted[key]
        assert self.dataset is not None
        run, found = uptrain(
            self.converted[key],
            source,
            cell.uptrain.plan(seed, self.steps[cell.name]),
            self.steps[cell.name],
            self.dataset,
            self.run(cell, seed),
            device=self.device,
            report=self.report,
        )
        self.looks[key] = found
        return run, found.get(self.steps[cell.name][-1])

    def ask(self, cell: Cell, questions: Questions, models: Mapping[tuple[str, int], str | Path]) -> Looks:
        """Return the losses of a variant right after its conversion and at every look."""
        assert cell.convert is not None
        tokens = self.tokens(cell)
        found = Looks(cell.convert.to_dict(), [] if cell.uptrain is None else list(cell.uptrain.own), tokens)
        long = self.configs[cell.name].context_length > self.configs[self.base.name].context_length

        def score(share: float, seed: int, model: str | Path) -> None:
            lm = gptlab.load(model, device=self.device)
            key = model_key(lm)
            found.results.setdefault(share, {})[seed] = questions.score(lm, key)
            if long:
                found.whole.setdefault(share, {})[seed] = questions.score(lm, key, lm.config.context_length)

        seeds = sorted(seed for name, seed in self.converted if name == cell.name)
        for seed in dict.fromkeys(self.base_seed(seed) for seed in seeds):
            first = self.converted[cell.name, next(s for s in seeds if self.base_seed(s) == seed)]
            found.steps = steps_of(first)
            score(0.0, seed, first)
            base, lm = (gptlab.load(one, device=self.device) for one in (models[self.base.name, seed], first))
            nats, found.moved_tokens = questions.moved(base, model_key(base), lm, model_key(lm))
            found.moved.append(nats)
        for seed in seeds:
            there = self.looks.get((cell.name, seed), {})
            for share, steps in zip(tokens, (0, *self.steps[cell.name]), strict=True):
                if steps in there:
                    score(share, seed, there[steps])
        return found

    def about(self) -> Conversions | None:
        """Return what all conversions have in common; None where there are none."""
        if not self.cells:
            return None
        text = "pydoc" if self.dataset is None else f"the training data of {self.dataset.name}"
        config = self.configs[self.base.name]
        standard, trained_on = yardstick(self.cells), next((cell.uptrain for cell in self.cells if cell.uptrain), None)
        if standard is not None:
            trained_on = standard.uptrain
        return Conversions(
            calibration=(
                f"about {default_tokens(config.n_embd):,} tokens of {text}, positions on {MOST_TOKENS:,} of them"
            ),
            reference=None if standard is None else standard.name,
            pretraining_tokens=None if trained_on is None else trained_on.of or self.of,
            recipe=None if trained_on is None else plain(trained_on.recipe),
        )
