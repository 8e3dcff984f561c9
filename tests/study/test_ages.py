"""One model after several numbers of tokens: the same, bit for bit, as runs that know nothing of each other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.studies import do_with_stops, finished_study, no_timings, requested, small

import gptlab
from gptlab.errors import GptlabError
from gptlab.evaluation.trigram import count
from gptlab.report.ages import by_age
from gptlab.report.blocks import Table
from gptlab.report.view import read_study
from gptlab.study import run
from gptlab.study.results import Results, read_results
from gptlab.study.run import run_study
from gptlab.study.runs import finished, run_key
from gptlab.study.statistics import Scored, contrast
from gptlab.study.variants import Trained, read_variants
from gptlab.text.documents import open_documents
from gptlab.text.shards import open_dataset
from gptlab.text.splits import part_of
from gptlab.training.branch import decay_start, of_age
from gptlab.training.loop import train
from gptlab.training.optimizer import learning_rate_share
from gptlab.training.settings import ScheduleSettings

pytestmark = pytest.mark.usefixtures("no_measuring")

AGES = [8 * 64, 24 * 64]  # 64 tokens a step
WSD = ["schedule.kind=wsd", "schedule.decay_share=0.25", "train.evaluate_every=50", "train.evaluate_tokens=200"]
GRID = {"rope": {"model": {"position": "rope"}}, "swa": {"model": {"window": 8}}}
CLAIMS = [
    {"claim": "rope lowers", "effect": "rope", "expect": "lower"},
    {"claim": "swa does nothing", "effect": "swa", "expect": "equal", "margin": 0.5, "tokens": AGES[0]},
    {"claim": "the base is beyond trigrams", "of": {"base": 1, "trigram": -1}, "expect": "lower", "margin": 0.3},
]


def values(**more: Any) -> dict[str, Any]:
    cell = {"rope": {"set": ["optimizer.learning_rate=2e-2"]}}
    return {"grid": GRID, "seeds": [0, 1], "ages": AGES, "cell": cell, "claim": CLAIMS, **more}


def asked(corpus: Path, **more: Any) -> Any:
    # What the recipe of the helpers says of a budget, ages say.
    request = requested(corpus, *WSD, **values(**more))
    study = request.study.model_copy(update={"set": [s for s in request.study.set if not s.startswith("budget")]})
    return type(request)(study)


@pytest.fixture(scope="module")
def whole(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("ages") / "study"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "measure", no_timings)
        torch.set_num_threads(1)
        run_study(asked(corpus), out)
    return out


@pytest.mark.parametrize("decay_share", [0.1, 0.25, 1.0])
def test_the_rate_is_that_of_any_budget_until_the_decay(decay_share: float) -> None:
    schedule = ScheduleSettings(kind="wsd", warmup_steps=5, decay_share=decay_share, final_share=0.1)
    for steps in (6, 20, 101):
        start = decay_start(schedule, steps)
        rates = [learning_rate_share(schedule, step, steps) for step in range(steps)]
        assert rates[:start] == [learning_rate_share(schedule, step, 10_000) for step in range(start)]
        assert max(rates[start:], default=0) < 1
        assert start == pytest.approx(5 + (1 - decay_share) * (steps - 5), abs=1.001)
    with pytest.raises(GptlabError, match=r"need schedule\.kind=wsd"):
        decay_start(ScheduleSettings(), 1000)
    with pytest.raises(GptlabError, match="over before its warm-up"):
        decay_start(schedule, 5)


def test_every_age_is_a_run_of_its_own_to_the_last_bit(whole: Path, tmp_path: Path) -> None:
    results, dataset = read_results(whole), open_dataset(whole / "data")
    assert [age.tokens for age in results.ages] == AGES
    variant = next(v for v in read_variants(asked(whole).study) if v.name == "rope")
    assert isinstance(variant, Trained)
    assert variant.recipe.optimizer.learning_rate == 2e-2
    runs = {path.name: path for path in (whole / "runs").iterdir() if not path.name.startswith("trunk")}
    assert len(runs) == 4 * 2 * 2
    for tokens in AGES:
        recipe = of_age(variant.recipe, tokens)
        alone = train(recipe, dataset, tmp_path / str(tokens)).language_model.model.state_dict()
        shared = runs[run_key(recipe, dataset, "cpu")]
        model = finished(shared)
        assert model is not None
        theirs = gptlab.load(model).model.state_dict()
        assert alone.keys() == theirs.keys()
        assert all(torch.equal(alone[name], theirs[name]) for name in alone)
        for file in ("metrics.jsonl",):
            rows = [(shared if own else tmp_path / str(tokens)) / file for own in (True, False)]
            losses = [[line.split('"loss": ')[1].split(",")[0] for line in p.open() if '"loss"' in line] for p in rows]
            assert losses[0] == losses[1]


def test_killed_at_any_moment_and_extended(whole: Path, corpus: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(run, "measure", no_timings)
    out = tmp_path / "study"
    do_with_stops(asked(corpus, ages=AGES[:1], claim=CLAIMS[:2]), out, 5, 60)
    kept = {path: path.stat().st_mtime_ns for path in (out / "runs").glob("*/checkpoints/*/model.safetensors")}
    trained: list[int] = []

    def tell(row: dict[str, Any]) -> None:
        if row["event"] == "training" and row["row"]["event"] == "start":
            trained.append(row["row"]["step"])

    run_study(asked(corpus), out, report=tell)
    assert trained == [7] * 8  # each from where the rate of the first age began to fall
    assert all(path.stat().st_mtime_ns == before for path, before in kept.items())
    assert (out / "results.json").read_bytes() == (whole / "results.json").read_bytes()


def test_what_is_kept_of_each_age(whole: Path) -> None:
    results: Results = read_results(whole)
    last = results.ages[-1]
    for name, variant in results.variants.items():
        assert variant.quality == last.quality[name]
        assert variant.difference == last.differences.get(name)
        assert variant.induction == last.induction[name]
    assert last.effects == results.effects
    assert last.baseline == results.baselines[-1]
    assert last.residual == results.residual
    assert results.residual is not None
    assert results.residual.df == 3
    first = results.ages[0]
    assert first.effects is not None
    losses = {name: quality.nats_per_token for name, quality in first.quality.items()}
    effect = (losses["rope"] + losses["rope-swa"] - losses["base"] - losses["swa"]) / 2
    assert first.effects.main["rope"].mean == pytest.approx(effect, abs=1e-12)
    assert losses["base"] > last.quality["base"].nats_per_token
    assert [claim.interval for claim in results.claims[:2]] == [
        last.effects.main["rope"].model_copy(update={"adjusted": None}) if last.effects else None,
        first.effects.main["swa"].model_copy(update={"adjusted": None}),
    ]
    assert results.claims[2].interval is not None
    assert results.claims[2].interval.n == 2


def test_seeds_that_stop_before_the_last_age(whole: Path, corpus: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(run, "measure", no_timings)
    plans: list[dict[str, Any]] = []

    def tell(row: dict[str, Any]) -> None:
        assert row["event"] != "note", row
        plans.extend([row] if row["event"] == "plan" else [])

    run_study(asked(corpus, oldest_seeds=1), tmp_path / "study", report=tell)
    assert plans[0]["runs"] == 4 * (2 + 1)
    assert len([p for p in (tmp_path / "study" / "runs").iterdir() if not p.name.startswith("trunk")]) == 4 * (2 + 1)
    results, both = read_results(tmp_path / "study"), read_results(whole)
    assert results.ages[0] == both.ages[0]
    for name, quality in results.ages[1].quality.items():
        assert quality.by_run == both.ages[1].quality[name].by_run[:1]
        assert [one.seed for one in results.variants[name].runs] == [0]
    assert results.effects is not None
    assert results.effects.main["rope"].n == results.variants["base"].quality.documents  # type: ignore[union-attr]
    table = by_age(read_study(tmp_path / "study"))[0]
    assert isinstance(table, Table)
    assert [column.title for column in table.columns[1:]] == ["512 tokens, 2 seeds", "1.54k tokens, 1 seed"]


def test_the_trigram_counts_what_the_base_has_read(whole: Path) -> None:
    results, dataset = read_results(whole), open_dataset(whole / "data")
    assert [one.tokens for one in results.baselines] == AGES
    texts = list(open_documents([str(whole / "held_out.txt")]))
    documents = [[256, *dataset.tokenizer.encode(text)] for text in texts]
    order = np.random.default_rng([0, 0]).permutation((len(dataset.training) - 1) // 32)
    for one in results.baselines:
        windows = [dataset.training.read(i * 32, i * 32 + 33) for i in order[: one.tokens // 32].tolist()]
        trigram = count(windows, dataset.tokenizer.vocab_size)
        logprobs = np.concatenate([trigram.logprobs(ids) for ids in documents])
        assert one.quality.nats_per_token == pytest.approx(-logprobs.mean(), rel=1e-9)
        assert one.difference is not None
        age = next(age for age in results.ages if age.tokens == one.tokens)
        assert one.difference.mean == pytest.approx(
            age.quality["base"].by_run[0] - one.quality.nats_per_token, abs=1e-6
        )


def test_held_out_documents_are_whole_and_for_the_test(
    whole: Path, corpus: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(run, "measure", no_timings)
    originals = {text.rstrip() for text in open_documents([str(corpus)])}
    read = {text.rstrip() for text in open_documents([str(whole / "held_out.txt")])}
    quality = read_results(whole).variants["base"].quality
    assert quality is not None
    assert quality.part == "test"
    assert read <= originals
    assert {part_of(text)[0] for text in read} == {"test"}
    rates = [1e-2, 3e-2]
    tuned = finished_study(
        corpus, tmp_path / "rates", rates=rates, evaluate={"part": "tune", "strings": 1, "bytes": 1000}
    )
    results = read_results(tuned)
    tune = {text.rstrip() for text in open_documents([str(tuned / "held_out.txt")])}
    assert not tune & read
    assert tune <= originals
    assert {part_of(text)[0] for text in tune} == {"tune"}
    assert list(results.variants) == ["base-0.01", "base-0.03", "rope-0.01", "rope-0.03"]
    assert results.study.base == "base-0.01"
    assert [[one.learning_rate for one in row] for row in results.rates.values()] == [rates, rates]
    for cell, row in results.rates.items():
        for one in row:
            variant = results.variants[one.variant]
            assert one.variant.startswith(cell)
            assert variant.quality is not None
            assert one.nats_per_token == variant.quality.nats_per_token
    assert len({one.nats_per_token for row in results.rates.values() for one in row}) == 4


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"ages": [640, 512]}, "must be numbers of tokens that ascend"),
    ({"ages": AGES[:1], "claim": [{**CLAIMS[0], "tokens": 999}]}, "about 999 tokens, which is none of the ages"),
    ({"ages": AGES[:1], "oldest_seeds": 1, "claim": []}, "oldest_seeds of study .* has no effect without two ages"),
    ({"rates": [0.0]}, "different numbers above 0"),
    ({"claim": [{"claim": "x", "expect": "equal", "effect": "rope"}]}, "needs a margin"),
    ({"claim": [{"claim": "x", "expect": "lower"}]}, "give one of of and effect"),
    ({"claim": [{"claim": "x", "expect": "lower", "of": {"base": 1, "rope": 1}}]}, "add up to 0"),
    ({"claim": [{"claim": "x", "expect": "less", "effect": "rope"}]}, "impossible value for claim.0.expect"),
    ({"cell": {"rope": {"set": []}}}, "impossible value for cell.rope.set"),
]


@pytest.mark.parametrize(("wrong", "said"), REFUSED)
def test_files_that_are_wrong(wrong: dict[str, Any], said: str, corpus: Path) -> None:
    with pytest.raises(GptlabError, match=said):
        small(corpus, **{**values(claim=[]), **wrong})


def test_what_a_study_with_ages_cannot_have(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(GptlabError, match=r"so budget\.steps=12 has no effect"):
        read_variants(small(corpus, **values()))
    with pytest.raises(GptlabError, match=r"\[cell\.rop\], but the grid has no 'rop' \(did you mean 'rope'\?\)"):
        read_variants(asked(corpus, cell={"rop": {"set": ["optimizer.learning_rate=1"]}}).study)
    with pytest.raises(GptlabError, match="of which two are as many steps"):
        run_study(asked(corpus, ages=[512, 520], claim=[]), tmp_path / "a")
    with pytest.raises(GptlabError, match=r"about 'rpoe' \(did you mean 'rope'\?\)"):
        run_study(asked(corpus, claim=[{**CLAIMS[0], "effect": "rpoe"}]), tmp_path / "b")
    assert contrast({"a": 1.0, "b": -1.0}, Scored({"a": {}})) is None
