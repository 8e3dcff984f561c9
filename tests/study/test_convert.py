"""Variants made by conversion: what they are compared with, what is kept, and what is refused before any training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import tiny_lm
from helpers.studies import do_with_stops, finished_study, no_timings, requested, small

import gptlab
from gptlab.conversion.heads import regroup
from gptlab.errors import GptlabError
from gptlab.evaluation.scoring import token_logprobs
from gptlab.language_model import LanguageModel
from gptlab.report.page import write_report
from gptlab.study import make, runs
from gptlab.study import run as running
from gptlab.study.directory import Request
from gptlab.study.resolve import card_tokens
from gptlab.study.results import read_results
from gptlab.study.run import run_study
from gptlab.study.variants import Converted, Trained, choose, continued_base, read_variants, reference
from gptlab.text.documents import open_documents

pytestmark = pytest.mark.usefixtures("no_measuring")

UPTRAIN: dict[str, Any] = {
    "set": [
        "batch.size=2",
        "schedule.warmup_steps=1",
        "train.dtype=float32",
        "train.compile=false",
        "train.evaluate_every=3",
        "train.evaluate_tokens=400",
    ],
    "shares": [0, 0.25, 0.5],  # of 12 steps
}
BASE: dict[str, Any] = {"name": "base"}
MADE: list[dict[str, Any]] = [
    {"name": "longer", "label": "trained on", "convert": {}},
    {"name": "twin", "convert": {}},
    {"name": "mean", "convert": {"n_kv_head": 2, "method": "mean"}},
    {"name": "first", "convert": {"n_kv_head": 2, "method": "first"}},
    {"name": "still", "convert": {"n_kv_head": 2, "method": "random"}, "uptrain": False},
    {"name": "taught", "convert": {"window": 8}, "uptrain": ["distill.teacher=base", "budget.share=0.25"]},
]
VARIANTS = [BASE, *MADE]


@pytest.fixture(scope="module")
def whole(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study that nothing happened to."""
    return finished_study(corpus, tmp_path_factory.mktemp("whole") / "study", variant=VARIANTS, uptrain=UPTRAIN)


def asked(corpus: Path, *changes: str, **values: Any) -> Request:
    return requested(corpus, *changes, **{"variant": VARIANTS, "uptrain": UPTRAIN, **values})


def loss_of(lm: LanguageModel, text: Path, context: int = 32) -> float:
    ids = [[256, *lm.needs_tokenizer().encode(document)] for document in open_documents([str(text)])]
    return -torch.cat(token_logprobs(lm.model, ids, context=context)).double().mean().item()


def looks(directory: Path, name: str) -> list[Any]:
    conversion = read_results(directory).variants[name].conversion
    assert conversion is not None
    return list(conversion.checkpoints)


def test_looks_are_the_models_at_those_steps(whole: Path) -> None:
    results = read_results(whole)
    base = gptlab.load(f"{whole / 'runs' / results.variants['base'].runs[0].key}@last")
    mean = results.variants["mean"]
    assert (mean.source, mean.tokens_trained, mean.changes) == ("converted", 768 + 384, {"n_kv_head": 2})
    points = looks(whole, "mean")
    assert [(look.share, look.tokens) for look in points] == [(0, 0), (0.25, 192), (0.5, 384)]
    by_hand = LanguageModel(regroup(base.model, 2, method="mean"), base.tokenizer)
    assert points[0].nats_per_token == pytest.approx(loss_of(by_hand, whole / "held_out.txt"), rel=1e-6)
    run = whole / "runs" / mean.runs[0].key
    for look, model in zip(points[1:], (run / "kept/step-000003", f"{run}@last"), strict=True):
        assert look.nats_per_token == pytest.approx(loss_of(gptlab.load(model), whole / "held_out.txt"), rel=1e-6)
    assert not list((run / "kept").rglob("training.*"))
    assert mean.quality is not None
    assert mean.quality.nats_per_token == points[-1].nats_per_token
    assert [tokens for tokens, _ in mean.runs[0].validation_curve] == [192, 384]
    with torch.no_grad():
        stream = [
            256,
            *(token for row in open_documents([str(whole / "held_out.txt")]) for token in [*row.encode(), 256]),
        ]
        rows = torch.tensor(stream[: min(16, len(stream) // 32) * 32]).view(-1, 32)[:, :-1]
        p, q = (lm.model(rows).double().log_softmax(-1) for lm in (base, by_hand))
    assert mean.conversion.divergence == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-3)


def test_differences_are_to_the_base_trained_on_as_long(whole: Path) -> None:
    results = read_results(whole)
    about = results.study.conversion
    assert (about.reference, about.pretraining_tokens) == ("longer", 768)
    assert results.study.kind == "trained"
    base, longer = results.variants["base"].quality, looks(whole, "longer")
    assert base is not None
    assert longer[0].nats_per_token == base.nats_per_token
    assert [look.difference and look.difference.mean for look in longer] == [0.0, None, None]
    for look, continued in zip(looks(whole, "mean"), longer, strict=True):
        gap = look.nats_per_token - continued.nats_per_token
        assert look.difference.mean == pytest.approx(gap, abs=1e-9)
        assert look.difference.method == "paired bootstrap over parts of documents"
    # The base trained on, and once more: the same run, so no difference at all.
    for look in looks(whole, "twin"):
        assert {look.difference.mean, look.difference.low, look.difference.high} == {0.0}
    twins = [results.variants[name].runs[0].key for name in ("longer", "twin")]
    assert twins[0] == twins[1]
    gap = results.variants["mean"].difference
    assert gap.model_copy(update={"adjusted": None}) == looks(whole, "mean")[-1].difference
    assert results.variants["longer"].difference.mean == pytest.approx(
        longer[-1].nats_per_token - base.nats_per_token, abs=1e-9
    )
    # Two ways to one architecture are compared with each other.
    first, mean = looks(whole, "first")[-1], looks(whole, "mean")[-1]
    assert first.rivals["mean"].mean == pytest.approx(first.nats_per_token - mean.nats_per_token, abs=1e-9)
    assert not looks(whole, "twin")[-1].rivals.keys() - {"longer"}


def test_a_variant_that_is_not_trained_on_is_looked_at_right_after_its_conversion(whole: Path) -> None:
    still, first = (read_results(whole).variants[name] for name in ("still", "first"))
    assert (still.source, still.runs, still.tokens_trained) == ("converted", [], 768)
    assert still.config == first.config
    (look,) = still.conversion.checkpoints
    assert look.share == 0
    assert look.rivals.keys() == {"first", "mean"}
    assert still.quality.nats_per_token == look.nats_per_token != first.conversion.checkpoints[0].nats_per_token
    at_the_end = first.conversion.checkpoints[-1]
    assert at_the_end.rivals.keys() == {"mean"}


def test_a_shorter_run_with_the_base_for_its_teacher(whole: Path) -> None:
    taught = read_results(whole).variants["taught"]
    assert [look.share for look in taught.conversion.checkpoints] == [0, 0.25]
    assert taught.conversion.settings == ["distill.teacher=base", "budget.share=0.25"]
    run = whole / "runs" / taught.runs[0].key
    recipe = json.loads((run / "run.json").read_text())["recipe"]
    base = read_results(whole).variants["base"].runs[0].key
    assert recipe["distill"]["teacher"] == str(whole / f"runs/{base}/checkpoints/step-000012")
    assert (recipe["base"], recipe["budget"]["steps"]) == ("base", 3)


def test_stopped_at_any_moment(whole: Path, corpus: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(running, "measure", no_timings)
    out = tmp_path / "study"
    do_with_stops(asked(corpus), out, 5, 40)
    assert (out / "results.json").read_bytes() == (whole / "results.json").read_bytes()


def test_what_is_done_is_not_done_again(whole: Path, corpus: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(running, "measure", no_timings)
    for module, name in ((runs, "train"), (make, "convert")):
        monkeypatch.setattr(module, name, None)
    before = (whole / "results.json").read_bytes()
    said: list[dict[str, Any]] = []
    run_study(asked(corpus), whole, report=said.append)
    assert (whole / "results.json").read_bytes() == before
    assert (said[0]["runs"], said[0]["done"], said[0]["tokens"]) == (6, 6, 0)


def test_one_failure_does_not_lose_the_others(whole: Path, corpus: Path, monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.setattr(running, "measure", no_timings)
    real = make.convert

    def fragile(model: Any, changes: Any, rows: Any) -> Any:
        if changes.method == "mean":
            raise RuntimeError("the matrix is singular")
        return real(model, changes, rows)

    monkeypatch.setattr(make, "convert", fragile)
    variants = [BASE, MADE[2], MADE[3]]
    results, _ = run_study(asked(corpus, variant=variants, uptrain=None), tmp_path / "study")
    mean, first = results.variants["mean"], results.variants["first"]
    assert (mean.runs[0].status, mean.quality) == ("failed", None)
    assert mean.runs[0].error == "the conversion failed: the matrix is singular"
    assert mean.conversion.checkpoints == []
    assert "RuntimeError" in (tmp_path / "study/converted" / mean.runs[0].key / "failure.txt").read_text()
    # Without uptraining the model is what it was right after the conversion.
    assert first.runs == []
    assert [look.share for look in first.conversion.checkpoints] == [0]
    assert first.quality is not None
    assert first.quality.nats_per_token == looks(whole, "first")[0].nats_per_token
    assert results.study.conversion.reference is None
    monkeypatch.setattr(make, "convert", real)
    results, _ = run_study(asked(corpus, variant=variants, uptrain=None), tmp_path / "study")
    assert results.variants["mean"].quality is not None


def test_a_blend_ends_with_rotary_positions_and_a_longer_context_is_read(
    corpus: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(running, "measure", no_timings)
    blend = {"position": "blend", "rotary": "abrupt"}
    variants = [
        BASE,
        MADE[0],
        {"name": "blend", "convert": blend, "uptrain": ["blend.ramp=geometric"]},
        {"name": "long", "convert": {"context_length": 64}},
    ]
    results, _ = run_study(asked(corpus, variant=variants), tmp_path / "study")
    assert [variant.runs[-1].error for variant in results.variants.values()] == [None] * 4
    blended, longer = results.variants["blend"], results.variants["long"]
    first, middle, last = blended.conversion.checkpoints
    assert first.difference is not None
    assert first.difference.mean == pytest.approx(0, abs=1e-6)  # a blend begins as the same function
    assert blended.config.position == "rope"
    run = tmp_path / "study/runs" / blended.runs[0].key
    assert gptlab.load(run / "kept/step-000003").config.position == "blend"
    assert gptlab.load(f"{run}@last").config.position == "rope"
    assert len({first.nats_per_token, middle.nats_per_token, last.nats_per_token}) == 3
    # Up to the old length the longer one is the same; beyond, it is read in windows of its own.
    first = longer.conversion.checkpoints[0]
    assert first.difference is not None
    assert first.difference.mean == pytest.approx(0, abs=1e-6)
    last = longer.conversion.checkpoints[-1]
    lm = gptlab.load(f"{tmp_path / 'study/runs' / longer.runs[0].key}@last")
    for figure, context in (("nats_per_token", 32), ("own_context", 64)):
        assert getattr(last, figure) == pytest.approx(loss_of(lm, tmp_path / "study/held_out.txt", context), rel=1e-6)
    assert abs(last.own_context - last.nats_per_token) > 1e-5
    assert [look.tokens for look in longer.conversion.checkpoints] == [0, 256, 384]  # steps of twice the tokens
    assert "whole" not in blended.conversion.checkpoints[0]


def test_seeds_of_a_base_that_is_loaded(corpus: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(running, "measure", no_timings)
    gptlab.save(tiny_lm(context_length=32), tmp_path / "model")
    variants = [{"name": "base", "load": str(tmp_path / "model")}, MADE[0], MADE[2], MADE[4]]
    settings = {**UPTRAIN, "shares": [0, 0.1]}
    request_of = lambda **more: asked(  # noqa: E731
        corpus, variant=variants, uptrain={**settings, "set": [*UPTRAIN["set"], f"data.corpus=['{corpus}']"], **more}
    )
    with pytest.raises(
        GptlabError, match=r"takes shares of the tokens that .*model was trained on, which are not recorded"
    ):
        run_study(request_of(), tmp_path / "without")
    (tmp_path / "model/card.json").write_text('{"tokens_trained": 1280}')
    only = request_of()
    results, _ = run_study(Request(only.study, ("data.held_out=0.2",), None, ("mean",), 2), tmp_path / "study")
    assert list(results.variants) == ["base", "longer", "mean"]  # the yardstick is never left out
    assert (results.study.kind, results.study.seeds, results.study.recipe) == ("shipped", [0, 1], {})
    mean = results.variants["mean"]
    assert mean.tokens_trained == 1280 + 128
    first, last = mean.conversion.checkpoints
    assert first.difference is not None
    assert last.difference is not None
    assert (first.difference.method, len(first.by_run)) == ("paired bootstrap over parts of documents", 1)
    assert (last.difference.method[:17], last.difference.n) == ("paired over seeds", 2)
    starts = [run.curve[0][1] for run in mean.runs]
    assert starts[0] != starts[1]  # the same model, other data
    # One that is not trained on is fitted on the same data, and asked about the same text.
    alone, _ = run_study(Request(only.study, ("data.held_out=0.2",), None, ("still",), 2), tmp_path / "study")
    assert list(alone.variants) == ["base", "still"]
    assert alone.study.corpus == results.study.corpus
    assert alone.variants["base"].quality == results.variants["base"].quality
    assert "the training data of" in alone.study.conversion.calibration


REFUSALS = [
    ({"name": "x", "convert": {"n_kv_heads": 2}}, r"variant 'x' is impossible: .*\(did you mean 'n_kv_head'\?\)"),
    (
        {"name": "x", "convert": {"n_kv_head": 3}},
        r"variant 'x' is impossible: .*cannot be given 3|variant 'x' is imposs",
    ),
    ({"name": "x", "convert": {"window": 0}}, r"variant 'x' is impossible"),
    ({"name": "x", "convert": {"position": "learned", "n_kv_head": 3}}, r"variant 'x' is impossible"),
    ({"name": "x", "convert": {"position": "blend"}}, r"variant 'x' is impossible: position 'blend' becomes 'rope' by"),
    ({"name": "x", "convert": {}, "load": "pocket"}, r"variant 'x' is made from the base, so load has no effect"),
    (
        {"name": "x", "convert": {}, "model": {"window": 3}},
        r"variant 'x' is made from the base, so model has no effect",
    ),
    ({"name": "x", "convert": {}, "uptrain": ["optimizer.nam=adamw"]}, r"variant 'x' is impossible: .*'name'"),
    (
        {"name": "x", "convert": {}, "uptrain": ["budget.steps=3"]},
        r"counts uptraining in shares, so budget.steps has no",
    ),
    ({"name": "x", "convert": {}, "uptrain": ["budget.share=2"]}, r"share of the uptraining must lie between 0 and 1"),
    ({"name": "x", "convert": {}, "uptrain": ["train.seed=3"]}, r"train\.seed has no effect in a study"),
    ({"name": "x", "convert": {}, "uptrain": False}, r"variant 'x' converts nothing and is not uptrained"),
    ({"name": "x", "convert": {"window": 8}, "uptrain": True}, r"uptrain takes a list of settings, or false"),
    ({"name": "x", "convert": {}, "uptrane": []}, r"unknown setting .*\(did you mean 'uptrain'\?\)"),
]


@pytest.mark.parametrize(("variant", "said"), REFUSALS)
def test_what_is_impossible_is_named_before_anything_is_done(
    corpus: Path, tmp_path: Path, variant: dict[str, Any], said: str
) -> None:
    with pytest.raises(GptlabError, match=said):
        run_study(asked(corpus, variant=[BASE, variant]), tmp_path / "study")
    assert not (tmp_path / "study").exists()


def test_what_has_no_effect(corpus: Path, tmp_path: Path) -> None:
    for variants, uptraining, said in (
        ([BASE, {"name": "x", "convert": {}}], None, "converts nothing and is not uptrained"),
        (
            [BASE, {"name": "x", "uptrain": ["batch.size=2"]}],
            None,
            r"asks for uptraining, but the study has no \[uptrain\]",
        ),
        ([BASE, {**MADE[2], "uptrain": []}], None, r"asks for uptraining, but the study has no \[uptrain\]"),
        ([{"name": "base", "convert": {}}], UPTRAIN, "is the base, so it cannot be converted from it"),
        (VARIANTS, {**UPTRAIN, "shares": [2]}, "uptrain.shares must lie between 0 and 1"),
        (VARIANTS, {**UPTRAIN, "share": [0]}, r"unknown setting 'uptrain.share'.*'shares'"),
    ):
        with pytest.raises(GptlabError, match=said):
            read_variants(small(corpus, variant=variants, uptrain=uptraining))
    with pytest.raises(GptlabError, match=r"has no \[uptrain\], so --set uptrain.batch.size=3 has no effect"):
        read_variants(small(corpus), ["uptrain.batch.size=3"])
    with pytest.raises(GptlabError, match=r"the shares 0.25 and 0.26 of 768 tokens are as many steps of 64 tokens"):
        run_study(asked(corpus, uptrain={**UPTRAIN, "shares": [0.25, 0.26, 0.5]}), tmp_path / "study")


def test_settings_reach_the_right_recipe(corpus: Path) -> None:
    study = small(corpus, variant=VARIANTS, uptrain=UPTRAIN)
    base, *_, taught = read_variants(study, ["optimizer.beta1=0.8", "uptrain.optimizer.beta1=0.7"])
    assert isinstance(base, Trained)
    assert isinstance(taught, Converted)
    assert taught.uptraining is not None
    assert (base.recipe.optimizer.beta1, taught.uptraining.recipe.optimizer.beta1) == (0.8, 0.7)
    loaded = small(corpus, variant=[{"name": "base", "load": "pocket"}, *MADE], uptrain=UPTRAIN)
    *_, taught = read_variants(loaded, ["optimizer.beta1=0.8"])
    assert isinstance(taught, Converted)
    assert taught.uptraining is not None
    assert taught.uptraining.recipe.optimizer.beta1 == 0.8


def test_what_a_variant_is_compared_with(corpus: Path) -> None:
    variants = read_variants(small(corpus, variant=VARIANTS, uptrain=UPTRAIN))
    continued = continued_base(variants)
    assert continued is not None
    assert continued.name == "longer"
    compared = {variant.name: reference(variant, variants) for variant in variants}
    uptrained = dict.fromkeys(("twin", "mean", "first", "taught"), "longer")
    assert compared == {"base": None, "longer": "base", "still": "base", **uptrained}
    assert [variant.name for variant in choose(variants, ["taught"])] == ["base", "longer", "taught"]
    assert [variant.name for variant in choose(variants, ["still"])] == ["base", "still"]


def test_the_report_of_a_study_with_conversions(whole: Path, no_drawing: None) -> None:
    (whole / "timings.json").unlink(missing_ok=True)
    write_report(whole)
    text = (whole / "report.md").read_text(encoding="utf-8")
    _, _, section = text.partition("\n## Conversion\n")
    section = section.partition("\n## ")[0]
    table = section.partition("**Loss added**")[2]
    names = [line.split("|")[1].strip(" *") for line in table.splitlines() if line.startswith("| **")]
    assert names[:6] == ["trained on", "twin", "mean", "first", "still (not uptrained)", "taught"]  # as in the file
    longer = looks(whole, "longer")
    assert all(f"{look.nats_per_token:.4f}" in table for look in longer)
    assert "conversion-windows" in section
    assert "The rate decays to the end of the run" in section
    assert "less those of trained on, base after the same continued training" in section
    assert "Several ways to the same architecture" in section
    assert "None" not in section
    assert "are compared with trained on, which saw the same number of tokens" in text


def test_the_order_of_the_file_is_that_of_the_results(corpus: Path, whole: Path) -> None:
    others = [{"name": "z", "convert": {"window": 8}}, BASE, {"name": "a", "model": {"window": 8}}]
    assert [variant.name for variant in read_variants(small(corpus, variant=others))] == ["base", "z", "a"]
    assert list(read_results(whole).variants) == [variant["name"] for variant in VARIANTS]


def test_the_tokens_of_a_loaded_model_are_on_its_card(tmp_path: Path) -> None:
    assert card_tokens("pocket") == 8_192_000
    assert card_tokens("gpt2") is None
