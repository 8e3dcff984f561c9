"""Whole studies, small ones: the same bytes whatever happens on the way, and nothing lost to one failure."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import tiny_lm
from helpers.studies import GRID, MEASURE, RECIPE, do_with_stops, finished_study, no_timings, requested, settings, small

import gptlab
from gptlab.config import ModelConfig
from gptlab.conversion.windows import narrow
from gptlab.errors import GptlabError
from gptlab.evaluation.heads import diagnose
from gptlab.evaluation.positions import loss_by_position
from gptlab.evaluation.probes import copy_at_distance, induction
from gptlab.evaluation.scoring import token_logprobs
from gptlab.language_model import LanguageModel
from gptlab.model import cost
from gptlab.study import directory, evaluator, runs
from gptlab.study import run as running
from gptlab.study.directory import Request, model_key, read_request
from gptlab.study.evaluator import Evaluator
from gptlab.study.results import Corpus, read_results, read_timings
from gptlab.study.run import run_study
from gptlab.study.settings import make_study
from gptlab.text.documents import open_documents
from gptlab.text.shards import open_dataset
from gptlab.text.tokenizers import byte_tokenizer

pytestmark = pytest.mark.usefixtures("no_measuring")

VARIANTS: list[dict[str, Any]] = [
    {"name": "base"},
    {"name": "rope", "label": "RoPE", "model": {"position": "rope"}},
    {"name": "twin", "model": {"n_kv_head": 4}},  # what the base has
]


@pytest.fixture(scope="module")
def whole(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study that nothing happened to: three variants, two seeds."""
    return finished_study(corpus, tmp_path_factory.mktemp("whole") / "study", variant=VARIANTS, seeds=[0, 1])


def test_results_hold_what_was_asked_for(whole: Path, corpus: Path) -> None:
    results = read_results(whole)
    about = results.study
    assert (about.base, about.kind, about.seeds, about.tokens) == ("base", "trained", [0, 1], 12 * 2 * 32)
    dataset = open_dataset(whole / "data")
    assert about.corpus == Corpus(name="sentences", sha256=dataset.sha256)
    assert about.recipe["budget"]["steps"] == 12
    assert list(results.variants) == ["base", "twin", "rope"] or list(results.variants) == [
        "base",
        "rope",
        "twin",
    ]
    for name, variant in results.variants.items():
        config = variant.config
        assert config == ModelConfig.preset(
            "tiny", context_length=32, vocab_size=257, **({"position": "rope"} if name == "rope" else {})
        )
        assert variant.parameters["total"] == sum(cost.parameters(config).values())
        assert [(run.seed, run.status, run.error) for run in variant.runs] == [
            (0, "done", None),
            (1, "done", None),
        ]
        for run in variant.runs:
            assert [tokens for tokens, _ in run.curve] == [64, 640, 768]
            assert [tokens for tokens, _ in run.validation_curve] == [384, 768]
            assert run.validation_curve[-1][1] == run.validation_loss < run.validation_curve[0][1]
            assert (whole / "runs" / run.key / "run.json").is_file()
        assert [row.context for row in variant.cache] == [16, 16, 32, 32, 64, 64]
        assert variant.heads is not None
        assert len(variant.heads.layers) == 2
        assert len(variant.samples) == 3
    assert results.variants["rope"].changes == {"position": "rope"}
    assert results.variants["rope"].factors == ["rope"]
    assert results.effects is None
    assert results.claims == []
    assert list(results.four_sizes["gpt2"]) == list(results.variants)


def test_the_answers_are_those_of_the_models(whole: Path) -> None:
    """The same questions put by hand to the checkpoints of the runs."""
    results = read_results(whole)
    variant = results.variants["rope"]
    texts = tuple(open_documents([str(whole / "held_out.txt")]))
    losses, positions, copies, passes = [], [], [], []
    for run in variant.runs:
        lm = gptlab.load(f"{whole / 'runs' / run.key}@last")
        tokenizer = lm.needs_tokenizer()
        ids = [[256, *tokenizer.encode(text)] for text in texts]
        scores = token_logprobs(lm.model, ids, context=32)
        losses.append(-torch.cat(scores).double().mean().item())
        stream = [token for row in ids for token in row][: 2 * 2 * 32 + 1]
        positions.append([row.nats for row in loss_by_position(lm.model, [stream], length=64)])
        copies.append(copy_at_distance(lm.model, [16], n=2, length=16, vocabulary=range(256))[0])
        passes.append(induction(lm.model, period=8, n=2, vocabulary=range(256)))
    mean = lambda values: pytest.approx(sum(values) / len(values), rel=1e-6)  # noqa: E731
    assert variant.quality is not None
    assert variant.quality.by_run == pytest.approx(losses, rel=1e-6)
    assert variant.quality.nats_per_token == mean(losses)
    assert variant.quality.tokens == sum(len(row) - 1 for row in ids)
    assert variant.by_position is not None
    assert variant.by_position.buckets == [(1, 16), (17, 32), (33, 64)]
    assert variant.by_position.trained_length == 32
    for actual, both in zip(variant.by_position.nats, zip(*positions, strict=True), strict=True):
        assert actual == mean(both)
    (copying,) = variant.copying
    assert copying.distance == 16
    assert copying.logprob == mean([one.logprob for one in copies])
    assert copying.baseline_logprob == mean([one.logprob_without for one in copies])
    assert variant.induction is not None
    assert variant.induction.second == mean([one.second for one in passes])
    first = gptlab.load(f"{whole / 'runs' / variant.runs[0].key}@last")
    heads = diagnose(first.model, torch.tensor([stream[:32]]))
    assert variant.heads is not None
    assert variant.heads.layers[1].entropy == pytest.approx(heads[1].entropy.tolist(), abs=1e-5)
    assert variant.attention_map is not None
    layer, head = variant.attention_map.layer, variant.attention_map.head
    base = results.variants["base"].heads
    assert base is not None
    assert base.layers[layer].distance[head] == max(d for row in base.layers for d in row.distance)
    maps = first.model.attention_maps(torch.tensor([stream[:32]]), layer)[0, head]
    for i, row in enumerate(variant.attention_map.weights):
        assert row == pytest.approx(maps[i, : i + 1].tolist(), abs=6e-4)
    prompts = [sample.prompt for sample in variant.samples]
    texts = first.generate(prompts, max_new_tokens=5, temperature=0.8, top_k=50, seed=0)
    assert [sample.text for sample in variant.samples] == texts


def test_by_position_all_models_read_the_same_tokens(tmp_path: Path) -> None:
    """Two pieces of three times the least trained length; a model with a longer table goes on in the same pieces."""
    (tmp_path / "text.txt").write_bytes(bytes(32 + i % 90 for i in range(400)))
    study = small(tmp_path, evaluate={"positions": 3, "pieces": 2})
    ask = Evaluator(tmp_path / "text.txt", "text", study.evaluate, 16, tmp_path / "cache")
    stream = [256, *(tmp_path / "text.txt").read_bytes()]
    pieces = [stream[i : i + 49] for i in (0, 48)]
    protocols = set()
    for position, length, reach in (("learned", 16, 16), ("learned", 32, 32), ("learned", 64, 48), ("rope", 16, 48)):
        lm = tiny_lm(context_length=length, position=position)
        by_position = ask.by_position(lm, model_key(lm))
        assert by_position is not None
        assert (by_position.buckets[0][0], by_position.buckets[-1][1]) == (1, reach)
        assert by_position.trained_length == length
        protocols.add(by_position.protocol)
        with torch.no_grad():
            logprobs = lm.model(torch.tensor(pieces)[:, :reach]).log_softmax(-1)
        nats = -logprobs.gather(-1, torch.tensor(pieces)[:, 1 : reach + 1, None])[..., 0]
        for (first, last), loss in zip(by_position.buckets, by_position.nats, strict=True):
            assert loss == pytest.approx(nats[:, first - 1 : last].mean().item(), abs=1e-5)
    assert len(protocols) == 1


def test_a_twin_of_the_base_differs_by_nothing(whole: Path) -> None:
    results = read_results(whole)
    base, twin = (results.variants[name] for name in ("base", "twin"))
    assert [run.key for run in base.runs] == [run.key for run in twin.runs]
    interval = results.variants["twin"].difference
    assert (interval.mean, interval.low, interval.high, interval.n) == (0.0, 0.0, 0.0, 2)
    rope = results.variants["rope"].difference
    assert rope.mean != 0.0
    assert rope.method.startswith("paired over seeds")
    assert rope.low is not None
    assert rope.high is not None
    assert rope.low < rope.mean < rope.high


def test_variants_share_the_start_and_the_request_of_the_data(whole: Path) -> None:
    """The first loss comes from the same batch and nearly the same function: positions hardly matter yet."""
    results = read_results(whole)
    seeds = [{name: v.runs[i].curve[0][1] for name, v in results.variants.items()} for i in (0, 1)]
    for first in seeds:
        assert first["rope"] == pytest.approx(first["base"], abs=0.05)
    assert abs(seeds[0]["base"] - seeds[1]["base"]) > 1e-4


def test_stopped_at_any_moment_and_in_another_order(
    whole: Path, corpus: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(running, "measure", no_timings)
    asked, out = requested(corpus, variant=VARIANTS, seeds=[0, 1]), tmp_path / "study"
    do_with_stops(asked, out, 2, 25)
    assert (out / "results.json").read_bytes() == (whole / "results.json").read_bytes()
    # The order of the file is that of the results, and decides nothing else.
    reversed_results, _ = run_study(requested(corpus, variant=VARIANTS[::-1], seeds=[0, 1]), out)
    assert list(reversed_results.variants) == ["base", "twin", "rope"]
    assert reversed_results == read_results(whole)


def test_what_is_done_is_not_done_again(whole: Path, corpus: Path, monkeypatch: Any) -> None:
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*") if path.is_file()}
    monkeypatch.setattr(running, "measure", no_timings)
    for name in ("run_task", "loss_by_position", "copy_at_distance", "induction", "diagnose"):
        monkeypatch.setattr(evaluator, name, None)
    monkeypatch.setattr(runs, "train", None)
    said: list[dict[str, Any]] = []
    results, _ = run_study(requested(corpus, variant=VARIANTS, seeds=[0, 1]), whole, report=said.append)
    changed = {path.name for path in whole.rglob("*") if path.is_file() and before.get(path) != path.stat().st_mtime_ns}
    assert changed == {"study.json", "results.json", "timings.json"}
    assert said[0] == {
        "event": "plan",
        "study": "small",
        "variants": 3,
        "runs": 6,
        "done": 6,
        "tokens": 0,
        "seconds": 0.0,
    }
    # A part of it, and then the whole again.
    some = requested(corpus, variant=VARIANTS, seeds=[0, 1])
    part, _ = run_study(Request(some.study, only=("twin",), seeds=1), whole)
    assert list(part.variants) == ["base", "twin"]
    assert part.study.seeds == [0]
    assert part.variants["twin"].difference.method == "paired bootstrap over parts of documents"
    again, _ = run_study(some, whole)
    assert again == results


def test_seeds_and_variants_may_be_added(corpus: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(running, "measure", no_timings)
    out = tmp_path / "study"
    first, _ = run_study(requested(corpus, variant=VARIANTS[:1]), out)
    more, _ = run_study(requested(corpus, variant=VARIANTS[:2], seeds=[0, 1]), out)
    assert more.variants["base"].runs[0] == first.variants["base"].runs[0]
    assert len(list((out / "runs").iterdir())) == 4


def test_the_whole_factorial_with_timings_and_claims(corpus: Path, tmp_path: Path) -> None:
    claims = ["rope-falls-faster", "rope-cost", "gqa-between"]
    asked = requested(corpus, grid=GRID, claims=claims)
    said: list[dict[str, Any]] = []
    results, timings = run_study(asked, tmp_path / "study", report=said.append)
    assert read_results(tmp_path / "study") == results
    assert read_timings(tmp_path / "study") == timings
    assert results.study.factors == ["rope", "gqa", "swa"]
    assert results.effects is not None
    assert list(results.effects.main) == ["rope", "gqa", "swa"]
    loss = {name: variant.quality.nats_per_token for name, variant in results.variants.items()}  # type: ignore[index]
    pairs = [("rope", "base"), ("rope-gqa", "gqa"), ("rope-swa", "swa"), ("rope-gqa-swa", "gqa-swa")]
    effect = results.effects.main["rope"]
    assert effect.mean == pytest.approx(sum(loss[a] - loss[b] for a, b in pairs) / 4, abs=1e-12)
    assert effect.method == "paired bootstrap over parts of documents"
    assert results.claims is not None
    assert [claim.holds for claim in results.claims] == [None, None]  # one seed, and no multi-query variant
    assert [claim.paper for claim in timings.claims] == ["Rotary embeddings (EleutherAI 2021)"]
    assert list(timings.variants) == list(results.variants)
    assert {row["phase"] for row in said if row["event"] == "phase"} == {*("prepare", "train", "evaluate", "measure")}
    windowed = results.variants["rope-swa"]
    assert windowed.attention_map is not None
    for i, row in enumerate(windowed.attention_map.weights):
        assert all(weight == 0 for weight in row[: max(i - 7, 0)])
    assert results.variants["swa"].receptive_field == 2 * 7 + 1
    assert "seconds" not in results.model_dump_json()


def test_one_failure_does_not_lose_the_others(corpus: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(running, "measure", no_timings)
    real = runs.train

    def fragile(recipe: Any, *arguments: Any, **options: Any) -> Any:
        if recipe.model.get("position") == "rope" and recipe.train.seed == 1:
            raise RuntimeError("the loss is nan")
        return real(recipe, *arguments, **options)

    monkeypatch.setattr(runs, "train", fragile)
    said: list[dict[str, Any]] = []
    asked, out = requested(corpus, variant=VARIANTS[:2], seeds=[0, 1, 2]), tmp_path / "study"
    results, _ = run_study(asked, out, report=said.append)
    rope = results.variants["rope"]
    assert [(run.status, run.error) for run in rope.runs] == [
        ("done", None),
        ("failed", "the loss is nan"),
        ("done", None),
    ]
    assert rope.quality is not None
    assert len(rope.quality.by_run) == 2
    assert results.variants["rope"].difference.n == 2
    assert {"event": "note", "text": "rope, seed 1 failed: the loss is nan"} in said
    failed = out / "runs" / rope.runs[1].key
    assert "RuntimeError: the loss is nan" in (failed / "failure.txt").read_text()
    # What ailed it is put right: only that run is trained.
    monkeypatch.setattr(runs, "train", real)
    trained: list[dict[str, Any]] = []
    results, _ = run_study(asked, out, report=lambda row: trained.append(row) if row["event"] == "training" else None)
    assert results.variants["rope"].difference.n == 3
    assert sum(row["row"]["event"] == "start" for row in trained) == 1


def test_nothing_could_be_trained(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(GptlabError, match=r"no variant could be trained: the training data has .* too few"):
        run_study(requested(corpus, "batch.size=900", "batch.micro=1"), tmp_path / "study")


def test_questions_that_cannot_be_asked_are_refused_before_the_training(corpus: Path, tmp_path: Path) -> None:
    refusals = {
        "distances": ([8], r"evaluate.distances has 8, but strings of 16 tokens in a context of 32 can stand 16 to 16"),
        "prompts": (["a" * 40], r"of 40 tokens; the context holds 32"),
    }
    for name, (value, said) in refusals.items():
        trained: list[Any] = []
        with pytest.raises(GptlabError, match=said):
            run_study(requested(corpus, evaluate={name: value}), tmp_path / name, report=trained.append)
        assert not [row for row in trained if row["event"] == "training"]
    with pytest.raises(GptlabError, match=r"evaluate.prompts has 'Zebra', which cannot be encoded"):
        run_study(requested(corpus, "tokenizer.kind=chars", evaluate={"prompts": ["Zebra"]}), tmp_path / "chars")


def test_a_tokenizer_of_few_characters(corpus: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(running, "measure", no_timings)
    results, _ = run_study(requested(corpus, "tokenizer.kind=chars", variant=VARIANTS[:2]), tmp_path / "study")
    rope = results.variants["rope"]
    assert rope.config.vocab_size < 33  # too few for two strings of 16 different ones
    assert [row.distance for row in rope.copying] == [16]
    assert all(corpus.read_text().count(sample.prompt) for sample in rope.samples)


def test_a_full_disk_ends_the_study(corpus: Path, tmp_path: Path, monkeypatch: Any) -> None:
    def full(*arguments: Any, **options: Any) -> Any:
        raise OSError(28, "No space left on device", "metrics.jsonl")

    monkeypatch.setattr(runs, "train", full)
    with pytest.raises(OSError, match="No space left"):
        run_study(requested(corpus), tmp_path / "study")


# --- models that were trained elsewhere --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models with bytes for tokens, one of them with a card."""
    directory = tmp_path_factory.mktemp("shipped")
    for name in ("learned", "rope"):
        gptlab.save(tiny_lm(context_length=32, position=name), directory / name)
    (directory / "learned/card.json").write_text('{"tokens_trained": 123}')
    return directory


def loaded(shipped: Path, **values: Any) -> dict[str, Any]:
    pair = [{"name": "base", "load": str(shipped / "learned")}, {"name": "rope", "load": str(shipped / "rope")}]
    return {"variant": pair, **values}


def test_models_that_are_loaded(corpus: Path, shipped: Path, tmp_path: Path) -> None:
    text = {
        "text": str(corpus),
        "bytes": 3000,
        "documents": 1,
        "strings": 2,
        "sample_tokens": 3,
        "pieces": 2,
        "prompts": ["the "],
    }
    results, _ = run_study(requested(corpus, **loaded(shipped, evaluate=text)), tmp_path / "study")
    about = results.study
    assert (about.kind, about.seeds, about.tokens) == ("shipped", [], 123)
    assert about.corpus.name == "sentences"
    assert about.recipe == {}  # none made them
    assert [v.tokens_trained for v in results.variants.values()] == [123, None]
    assert [v.source for v in results.variants.values()] == ["shipped"] * 2
    assert results.variants["rope"].runs == []
    assert results.variants["rope"].changes == {"position": "rope"}
    assert results.variants["rope"].samples[0].prompt == "the "
    interval = results.variants["rope"].difference
    assert interval.method == "paired bootstrap over parts of documents"
    read = (tmp_path / "study/held_out.txt").read_text().split("<|endoftext|>\n")
    assert len("".join(read[:-1])) < 3000 + 20 * 25  # whole ones, until there are so many bytes
    assert len("".join(read)) >= 3000
    assert {text.strip() for text in read} <= {text.strip() for text in corpus.read_text().split("<|endoftext|>\n")}
    by_position = [v.by_position.buckets[-1][1] for v in results.variants.values() if v.by_position]
    assert by_position == [32, 128]  # learned positions end with the context


def test_windows_of_a_loaded_model_take_no_disk(corpus: Path, shipped: Path, tmp_path: Path) -> None:
    text = {
        "text": str(corpus),
        "bytes": 3000,
        "documents": 1,
        "strings": 1,
        "sample_tokens": 3,
        "pieces": 2,
        "prompts": ["the "],
    }
    narrowed = {"name": "narrowed", "convert": {"window": [8, "none"], "sinks": 1}}
    shared = {"name": "shared", "convert": {"n_kv_head": 2, "window": 8}}
    base = {"name": "base", "load": str(shipped / "rope")}
    asked = {**text, "length": 24, "positions": 2, "divergence": 1, "dtype": "bfloat16"}
    study = {"variant": [base, narrowed, shared], "evaluate": asked}
    results, _ = run_study(requested(corpus, **study), tmp_path / "study")
    assert len(list((tmp_path / "study/converted").iterdir())) == 1
    variant = results.variants["narrowed"]
    assert (variant.config.windows, variant.config.sinks) == ((8, None), 1)
    assert variant.conversion is not None
    assert variant.conversion.steps == ["window 8,none, sinks 1"]
    assert variant.conversion.divergence_tokens == 23
    assert variant.quality is not None
    assert variant.quality.protocol.endswith("windows of 24 tokens without overlap, bfloat16")
    assert variant.by_position is not None
    assert variant.by_position.buckets[-1][1] == 48
    lm = gptlab.load(shipped / "rope")
    model = narrow(lm.model, (8, None), 1)
    ids = [[256, *lm.needs_tokenizer().encode(row)] for row in open_documents([str(tmp_path / "study/held_out.txt")])]
    loss = -torch.cat(token_logprobs(model, ids, context=24, dtype="bfloat16")).double().mean().item()
    assert variant.quality.nats_per_token == pytest.approx(loss, rel=1e-6)
    without = {**asked, "divergence": 0}
    results, _ = run_study(requested(corpus, **{**study, "evaluate": without}), tmp_path / "study")
    assert results.variants["narrowed"].conversion.divergence is None
    with pytest.raises(GptlabError, match=r"evaluate.length is 40, but variant 'base' was trained on windows of 32"):
        run_study(requested(corpus, **{**study, "evaluate": {**asked, "length": 40}}), tmp_path / "long")


def test_what_needs_a_text_or_has_no_effect(corpus: Path, shipped: Path, tmp_path: Path) -> None:
    with pytest.raises(GptlabError, match=r"needs a text to ask them about; set evaluate\.text"):
        run_study(requested(corpus, **loaded(shipped)), tmp_path / "a")
    study = small(corpus, **loaded(shipped))
    for options in ({"seeds": 3}, {"data": tmp_path}):
        with pytest.raises(GptlabError, match="--seeds and --data have no effect"):
            run_study(Request(study, **options), tmp_path / "b")
    with pytest.raises(GptlabError, match="--seeds takes the number of seeds"):
        run_study(Request(small(corpus), seeds=0), tmp_path / "b")
    study = small(corpus, variant=[{"name": "base", "load": str(tmp_path / "nowhere")}])
    with pytest.raises(GptlabError, match="nowhere"):
        run_study(Request(study), tmp_path / "b")
    with pytest.raises(GptlabError, match="no device 'nonsense'"):
        run_study(Request(small(corpus), device="nonsense"), tmp_path / "b")
    needy = small(corpus, needs_data=True)
    with pytest.raises(GptlabError, match="needs data: name prepared data by --data, or texts by --corpus"):
        run_study(Request(needy), tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_prepared_data(whole: Path, corpus: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(running, "measure", no_timings)
    asked = Request(small(corpus, variant=VARIANTS[:1], needs_data=True), data=whole / "data")
    results, _ = run_study(asked, tmp_path / "study")
    assert not (tmp_path / "study/data").exists()
    base = read_results(whole).variants["base"]
    assert results.variants["base"].runs == base.runs[:1]
    assert results.variants["base"].samples == base.samples
    assert read_request(tmp_path / "study") == asked


# --- the directory ------------------------------------------------------------------------------------------------


def test_a_directory_of_something_else(whole: Path, corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(GptlabError, match="holds something that is not a study"):
        run_study(requested(corpus), tmp_path)
    kept = (whole / "study.json").read_bytes()
    others = [
        (requested(corpus, variant=VARIANTS, name="other"), r"holds another study \(name 'small', not 'other'\)"),
        (requested(corpus, variant=VARIANTS, base="rope"), r"holds another study \(base 'base', not 'rope'\)"),
        (
            requested(corpus, "data.corpus=['pydoc']", variant=VARIANTS),
            r"another study \(data 'corpus /.*sentences.txt', not",
        ),
        (requested(corpus, "budget.steps=13", variant=VARIANTS), r"another study: variant base is defined otherwise"),
        (
            requested(corpus, variant=[*VARIANTS[:2], {"name": "twin", "model": {"n_kv_head": 1}}]),
            r"another study: variant twin is defined otherwise",
        ),
    ]
    for asked, said in others:
        with pytest.raises(GptlabError, match=said):
            run_study(asked, whole)
    assert (whole / "study.json").read_bytes() == kept


def test_a_study_file_in_the_directory_that_is_damaged(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(GptlabError, match="holds no study to go on with"):
        read_request(tmp_path)
    for content in (
        "{",
        "[]",
        '{"format": "other", "version": 1}',
        '{"format": "gptlab study settings", "version": 1}',
    ):
        (tmp_path / "study.json").write_text(content)
        with pytest.raises(GptlabError, match=r"study\.json (cannot be read|was written by another version)"):
            run_study(requested(corpus), tmp_path)


def test_result_files_that_are_missing_or_damaged(tmp_path: Path) -> None:
    for read, name in ((read_results, "results.json"), (read_timings, "timings.json")):
        with pytest.raises(GptlabError, match=f"has no {name}; finish its study first"):
            read(tmp_path)
        (tmp_path / name).write_text("{")
        with pytest.raises(GptlabError, match=f"{name} cannot be read"):
            read(tmp_path)
        (tmp_path / name).write_text('{"format": "gptlab study", "version": 99}')
        with pytest.raises(GptlabError, match=f"{name} is not a gptlab study"):
            read(tmp_path)


# --- what is kept -------------------------------------------------------------------------------------------------


def test_keys_and_damaged_results(tmp_path: Path, monkeypatch: Any) -> None:
    one = directory.key("train", a=1, b={"x": [1, 2], "y": None})
    assert one == directory.key("train", b={"y": None, "x": [1, 2]}, a=1)
    assert one != directory.key("evaluate", a=1, b={"x": [1, 2], "y": None})
    assert one != directory.key("train", a=2, b={"x": [1, 2], "y": None})
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    assert one != directory.key("train", a=1, b={"x": [1, 2], "y": None})
    torch.set_num_threads(threads)
    monkeypatch.setitem(directory.CODE, "train", directory.CODE["train"] + 1)
    assert one != directory.key("train", a=1, b={"x": [1, 2], "y": None})
    made = []

    def compute() -> dict[str, Any]:
        made.append(1)
        return {"pair": (1, 0.1)}

    assert directory.cached(tmp_path, "k", compute) == {"pair": [1, 0.1]}
    assert directory.cached(tmp_path, "k", compute) == {"pair": [1, 0.1]}
    assert len(made) == 1
    (tmp_path / "k.json").write_text('{"pair": [1')
    assert directory.cached(tmp_path, "k", compute) == {"pair": [1, 0.1]}
    assert len(made) == 2


def test_a_model_is_known_by_all_that_its_answers_depend_on() -> None:
    config = ModelConfig.preset("tiny", vocab_size=257)
    model = gptlab.GPT(config)
    windowed = gptlab.GPT(ModelConfig.preset("tiny", vocab_size=257, window=8))  # the same weights
    keys = {
        model_key(LanguageModel(model, byte_tokenizer())),
        model_key(LanguageModel(windowed, byte_tokenizer())),
        model_key(LanguageModel(gptlab.GPT(config, seed=1), byte_tokenizer())),
    }
    assert len(keys) == 3
    assert model_key(LanguageModel(gptlab.GPT(config), byte_tokenizer())) in keys


def test_a_text_that_is_too_short_for_positions(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("ten bytes.")
    study = small(tmp_path)
    ask = Evaluator(tmp_path / "text.txt", "text", study.evaluate, 64, tmp_path)
    lm = tiny_lm()
    assert ask.by_position(lm, model_key(lm)) is None
    assert ask.attention_map(lm, model_key(lm), 7, 0, 10) is None


# --- killed -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_killed_at_random_moments(corpus: Path, tmp_path: Path) -> None:
    """The real command in its own process, killed four times, gives the bytes of one that was left alone."""
    variants = [*VARIANTS, {"name": "longer", "convert": {}}, {"name": "gqa", "convert": {"n_kv_head": 2}}]
    asked = {**settings(corpus, variant=variants, seeds=[0, 1]), "measure": {**MEASURE, "contexts": [16]}}
    asked["uptrain"] = {"set": [s for s in RECIPE if s.startswith(("batch", "train"))], "shares": [0, 0.25, 0.5]}
    make_study(asked)
    path = tmp_path / "small.toml"
    path.write_text(_toml(asked))

    def command(out: Path) -> subprocess.Popen[bytes]:
        line = [sys.executable, "-m", "gptlab", "study", str(path), "--out", str(out)]
        return subprocess.Popen(
            line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )

    assert command(tmp_path / "whole").wait() == 0
    started = time.monotonic()
    draw, kills, span = random.Random(), 0, 8.0
    while True:
        process = command(tmp_path / "killed")
        try:
            code = process.wait(draw.uniform(1.0, span) if kills < 4 else None)
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL
            kills += 1
            continue
        assert code == 0
        break
    assert kills, f"it was over before it was killed ({time.monotonic() - started:.0f} s)"
    assert (tmp_path / "killed/results.json").read_bytes() == (tmp_path / "whole/results.json").read_bytes()
    report = re.sub(rb"[^\n]*", b"", (tmp_path / "killed/report.html").read_bytes())
    assert report
    shutil.rmtree(tmp_path / "killed")


def _toml(values: dict[str, Any]) -> str:
    """Write plain values as TOML: sections after what stands alone."""
    lines = [
        f"{name} = {json.dumps(value)}"
        for name, value in values.items()
        if name not in ("variant", "evaluate", "measure", "uptrain")
    ]
    for name in ("evaluate", "measure", "uptrain"):
        lines += [f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in values[name].items())]
    for variant in values["variant"]:
        model = variant.get("model", {})
        lines += ["[[variant]]", f"name = {json.dumps(variant['name'])}"]
        lines += [f"model.{key} = {json.dumps(value)}" for key, value in model.items()]
        if "convert" in variant:
            changes = ", ".join(f"{key} = {json.dumps(value)}" for key, value in variant["convert"].items())
            lines.append(f"convert = {{ {changes} }}")
    return "\n".join(lines) + "\n"
