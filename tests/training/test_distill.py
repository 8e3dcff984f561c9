"""Distillation: its loss and gradients against PyTorch's on all logits at once, and whole runs with a teacher."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import near
from helpers.trainings import RECIPE, Commands, assert_same_run, curve, make_dataset, sentences, small
from test_distributed import assert_same_curve, two
from test_resume import Crash, crash_at
from torch import Tensor
from torch.nn import functional as F

import gptlab
from gptlab.text.shards import Dataset
from gptlab.training import loss
from gptlab.training.data import Batch, Batches, Windows
from gptlab.training.distill import Teacher, distilled_loss, divergence, load_teacher
from gptlab.training.loop import train
from gptlab.training.loss import IGNORED, cross_entropy
from gptlab.training.parallel import Group
from gptlab.training.settings import DistillSettings
from gptlab.training.step import compile_distillation, gradients

C, V = 24, 300
ALONE = Group(0, 1, torch.device("cpu"))


# --- the loss -------------------------------------------------------------------------------------------------


def make_teacher(share: float, temperature: float, width: int = 16) -> Teacher:
    config = gptlab.ModelConfig(vocab_size=V, context_length=8, n_layer=1, n_head=2, n_embd=width)
    model = gptlab.GPT(config, seed=3)
    with torch.no_grad():
        model.lm_head.weight.mul_(25)  # logits of a few units, as a trained model has
    return Teacher(model, share, temperature, {})


def make(n_tokens: int, ignored: slice | list[int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, output weights and targets of a student, and hidden states of a teacher that is narrower."""
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(n_tokens, C, generator=draw).requires_grad_()
    weight = (torch.randn(V, C, generator=draw) / 2).requires_grad_()
    targets = torch.randint(V, (n_tokens,), generator=draw)
    targets[ignored] = IGNORED
    return hidden, weight, targets, torch.randn(n_tokens, 16, generator=draw)


def exact(
    hidden: Tensor, weight: Tensor, targets: Tensor, taught: Tensor, teacher: Teacher
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """PyTorch's losses and gradients on whole logits, in float64."""
    x, w = (t.detach().double().requires_grad_() for t in (hidden, weight))
    counts = targets != IGNORED
    own = (x @ w.T)[counts]
    theirs = (taught.double() @ teacher.model.lm_head.weight.detach().double().T)[counts]
    t = teacher.temperature
    apart = F.kl_div((own / t).log_softmax(-1), (theirs / t).softmax(-1), reduction="sum") * t**2
    nats = F.cross_entropy(own, targets[counts], reduction="sum")
    total = (1 - teacher.share) * nats + teacher.share * apart
    return total.detach(), nats.detach(), *torch.autograd.grad(total, (x, w))


CHUNK = 64


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 64 tokens in float32, a softmax of 16 and products of 128 ids at once."""
    monkeypatch.setitem(loss.LOGITS_BYTES, "cpu", 2 * CHUNK * V * 4)
    monkeypatch.setitem(loss.SOFTMAX_BYTES, "cpu", 16 * V * 4)
    monkeypatch.setattr(loss, "_IDS", 128)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize(("share", "temperature"), [(1.0, 1.0), (0.3, 1.0), (1.0, 2.5), (0.6, 0.5)])
@pytest.mark.parametrize(("n_tokens", "ignored"), [(1, []), (3 * CHUNK - 7, [0, 5, CHUNK]), (40, slice(None))])
def test_loss_and_gradients_are_pytorchs(
    share: float, temperature: float, n_tokens: int, ignored: slice | list[int]
) -> None:
    hidden, weight, targets, taught = make(n_tokens, ignored)
    teacher = make_teacher(share, temperature)
    total, nats = divergence(hidden, weight, targets, taught, teacher)
    assert total.dtype == nats.dtype == torch.float32
    assert not nats.requires_grad
    expected = exact(hidden, weight, targets, taught, teacher)
    (total * 0.25).backward()
    near(total, expected[0], 1e-5)
    near(nats, expected[1], 1e-5)
    near(hidden.grad, expected[2] / 4, 1e-5)
    near(weight.grad, expected[3] / 4, 1e-5)
    assert hidden.grad is not None
    assert not hidden.grad[targets == IGNORED].any()


@pytest.mark.usefixtures("small_chunks")
def test_bfloat16_stays_within_its_rounding() -> None:
    hidden, weight, targets, taught = make(2 * CHUNK + 50, [3, CHUNK])
    teacher = make_teacher(0.7, 1.5)
    with torch.autocast("cpu", torch.bfloat16):
        total, nats = divergence(hidden, weight, targets, taught, teacher)
    expected = exact(hidden, weight, targets, taught, teacher)
    total.backward()
    for actual, wanted, by in zip(
        (total, nats, hidden.grad, weight.grad), expected, (5e-3, 1e-3, 2e-2, 2e-2), strict=True
    ):
        assert actual is not None
        assert actual.dtype == torch.float32
        near(actual, wanted, by)
    assert (total.detach() - expected[0]).abs() > 0  # autocast was honoured


def test_who_knows_what_the_teacher_knows_has_nothing_to_learn() -> None:
    _, _, targets, taught = make(50, [])
    for temperature in (1.0, 3.0):
        teacher = make_teacher(1.0, temperature)
        same, weight = taught.clone().requires_grad_(), teacher.model.lm_head.weight
        total, nats = divergence(same, weight, targets, taught, teacher)
        (gradient,) = torch.autograd.grad(total, same)
        assert total.item() == pytest.approx(0, abs=1e-4)
        assert gradient.abs().max() < 1e-5
        assert nats.item() == pytest.approx(cross_entropy(taught, weight, targets).item(), rel=1e-6)


def test_logits_of_all_tokens_are_never_there_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(loss.LOGITS_BYTES, "cpu", 2 * 16 * V * 4)
    products: list[torch.Size] = []
    product = Tensor.__matmul__

    def watched(a: Tensor, b: Tensor) -> Tensor:
        products.append((out := product(a, b)).shape)
        return out

    monkeypatch.setattr(Tensor, "__matmul__", watched)
    hidden, weight, targets, taught = make(100, [])
    divergence(hidden, weight, targets, taught, make_teacher(1.0, 1.0))[0].backward()
    assert max(rows for rows, columns in products if columns == V) == 16


def test_the_teacher_is_heard_without_dropout_and_keeps_no_gradients(data: Dataset) -> None:
    teacher_model = gptlab.GPT(gptlab.ModelConfig.preset("tiny", vocab_size=257, dropout=0.5), seed=1).eval()
    student = gptlab.GPT(gptlab.ModelConfig.preset("tiny", vocab_size=257, n_kv_head=2), seed=2).train()
    teacher = Teacher(teacher_model, 1.0, 1.0, {})
    ids = torch.randint(257, (3, 33), generator=torch.Generator().manual_seed(0))
    batch = Batch(ids[:, :-1], ids[:, 1:], None, torch.arange(3))
    with torch.no_grad():
        own, theirs = (model(batch.ids).double().log_softmax(-1).flatten(0, 1) for model in (student, teacher_model))
    total, nats = distilled_loss(student, batch, torch.float32, teacher)
    assert total.item() == pytest.approx(F.kl_div(own, theirs.exp(), reduction="sum").item(), rel=1e-5)
    assert nats.item() == pytest.approx(F.nll_loss(own, batch.targets.flatten(), reduction="sum").item(), rel=1e-6)
    total.backward()
    assert all(p.grad is None for p in teacher_model.parameters())
    assert all(p.grad is not None for p in student.parameters())


def test_micro_batches_are_weighted_by_their_tokens() -> None:
    student = gptlab.GPT(gptlab.ModelConfig.preset("tiny", vocab_size=257), seed=2)
    teacher = Teacher(gptlab.GPT(gptlab.ModelConfig.preset("tiny", vocab_size=257), seed=1).eval(), 0.5, 2.0, {})
    ids = torch.randint(257, (4, 33), generator=torch.Generator().manual_seed(0))
    targets = ids[:, 1:].clone()
    for row, n in enumerate((32, 2, 17, 1)):
        targets[row, n:] = IGNORED
    batch = Batch(ids[:, :-1], targets, None, torch.arange(4))
    results = []
    for micro in (None, 1, 3):
        student.zero_grad()
        losses = gradients(student, batch, micro, torch.float32, ALONE, teacher=teacher)
        results.append((losses, [p.grad.clone() for p in student.parameters() if p.grad is not None]))
    for losses, by_parameter in results[1:]:
        torch.testing.assert_close(losses, results[0][0], rtol=1e-6, atol=1e-6)
        for gradient, expected in zip(by_parameter, results[0][1], strict=True):
            torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiling_changes_rounding_only(data: Dataset, dtype: torch.dtype) -> None:
    def fresh() -> tuple[gptlab.GPT, Teacher]:
        student = gptlab.GPT(gptlab.ModelConfig.preset("tiny", vocab_size=257, n_kv_head=2), seed=2)
        model = gptlab.GPT(gptlab.ModelConfig.preset("tiny", vocab_size=257), seed=1).eval()
        return student, Teacher(model, 0.5, 2.0, {})

    batch = Batches(Windows(data.training, 32), 6, seed=0)[0]
    student, teacher = fresh()
    expected = gradients(student, batch, None, dtype, ALONE, teacher=teacher)
    again, other = fresh()
    compiled = compile_distillation(again, other, batch, dtype, must=True, say=pytest.fail)
    assert compiled is not None
    actual = gradients(again, batch, None, dtype, ALONE, teacher=compiled)
    by = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(actual, expected, rtol=by, atol=by)
    for p, q in zip(again.parameters(), student.parameters(), strict=True):
        assert q.grad is not None
        near(p.grad, q.grad.double(), by)


# --- whole runs -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def teacher_run(data: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher that knows the grammar."""
    run = tmp_path_factory.mktemp("teacher") / "run"
    train(small("budget.steps=40", "train.evaluate_every=40"), data, run)
    return run


def rows(run: Path, event: str) -> list[dict[str, Any]]:
    every = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in every if row["event"] == event]


TAUGHT = RECIPE.replace("[tokenizer]", "dropout = 0.1\n\n[tokenizer]").replace(
    "evaluate_every = 5", "evaluate_every = 4"
)


def test_a_taught_run_goes_on_exactly_and_shows_both_losses(data: Dataset, teacher_run: Path, tmp_path: Path) -> None:
    recipe = small(f"distill.teacher={teacher_run}", "distill.weight=0.8", "distill.temperature=2", text=TAUGHT)
    train(recipe, data, tmp_path / "whole")
    with pytest.raises(Crash):
        train(recipe, data, tmp_path / "run", report=crash_at(8))
    result = train(recipe, data, tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    steps = rows(tmp_path / "run", "step")
    assert all(0 < row["loss"] != row["cross_entropy"] for row in steps)
    assert steps[-1]["cross_entropy"] < steps[0]["cross_entropy"] - 1
    # The validation loss is the plain cross-entropy, whatever is minimised.
    batches = list(Windows(data.validation, 32).in_order(8))
    model = result.language_model.model
    nats = sum(
        F.cross_entropy(model(b.ids).flatten(0, 1), b.targets.flatten(), reduction="sum").item() for b in batches
    )
    expected = nats / sum(b.n_targets for b in batches)
    assert rows(tmp_path / "run", "evaluate")[-1]["validation_loss"] == pytest.approx(expected, rel=1e-5)
    about = json.loads((tmp_path / "run" / "run.json").read_text())
    assert about["teacher"]["name"] == str(teacher_run)
    assert len(about["teacher"]["sha256"]) == 64
    assert rows(tmp_path / "run", "start")[0]["teacher"] == str(teacher_run)


def test_a_resumed_run_wants_the_teacher_it_had(data: Dataset, teacher_run: Path, tmp_path: Path) -> None:
    moved, other = tmp_path / "moved", tmp_path / "other"
    shutil.copytree(teacher_run, moved)
    gptlab.save(gptlab.LanguageModel(gptlab.GPT(gptlab.load(moved).config, seed=5), data.tokenizer), other)
    recipe = small(f"distill.teacher={moved}", text=TAUGHT)
    run = tmp_path / "run"
    with pytest.raises(Crash):
        train(recipe, data, run, report=crash_at(8))
    changed = small(f"distill.teacher={other}", text=TAUGHT)
    with pytest.raises(gptlab.GptlabError, match=f"the teacher {other} is not the one that the run {run} began with"):
        train(changed, data, run, resume=True)
    with pytest.raises(gptlab.GptlabError, match=r"a different recipe: distill.weight was 0.5 and is 0.25"):
        train(small(f"distill.teacher={moved}", "distill.weight=0.25", text=TAUGHT), data, run, resume=True)
    moved.rename(tmp_path / "elsewhere")
    with pytest.raises(gptlab.GptlabError, match=f"no file or directory {moved}"):
        train(recipe, data, run, resume=True)
    # Where it lies does not matter.
    train(small(f"distill.teacher={tmp_path / 'elsewhere'}", text=TAUGHT), data, run, resume=True)
    assert curve(run)[-1]["step"] == 20


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_have_the_loss_curve_of_one(
    commands: Commands, data: Dataset, teacher_run: Path, tmp_path: Path, parallel: str
) -> None:
    text = (
        RECIPE.replace("size = 4", "size = 5")
        .replace("1e-2", "1e-3")
        .replace("evaluate_every = 5", "evaluate_every = 1\nevaluate_tokens = 300\nsave_every = 20")
    )
    settings = [f"distill.teacher={teacher_run}", "distill.weight=0.7", "distill.temperature=2"]
    train(small(*settings, text=text), data, tmp_path / "alone")
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    options = [x for s in (*settings, f"parallel={parallel}", "batch.micro=2") for x in ("--set", s)]
    two(commands, "train", path, "--data", data.directory, "--out", tmp_path / "run", *options)
    assert_same_curve(tmp_path / "run", tmp_path / "alone")


# --- teachers that cannot teach -------------------------------------------------------------------------------


def test_teachers_that_are_refused(data: Dataset, tmp_path: Path) -> None:
    config = gptlab.ModelConfig.preset("tiny", vocab_size=257)
    settings = DistillSettings(teacher=str(tmp_path / "teacher"))

    def saved(tokenizer: Any = data.tokenizer, **changes: Any) -> None:
        model = gptlab.GPT(dataclasses.replace(config, **changes))
        gptlab.save(gptlab.LanguageModel(model, tokenizer), settings.teacher)

    with pytest.raises(gptlab.GptlabError, match=r"no file or directory .*teacher; check the path"):
        load_teacher(settings, config, data.tokenizer)
    saved(vocab_size=300)
    with pytest.raises(gptlab.GptlabError, match="knows 300 ids, the student 257; choose a teacher"):
        load_teacher(settings, config, data.tokenizer)
    saved(context_length=32)
    with pytest.raises(gptlab.GptlabError, match="a context of 32 tokens, the student one of 64; choose"):
        load_teacher(settings, config, data.tokenizer)
    other = make_dataset(tmp_path / "chars", [sentences(20, seed=i) for i in range(60)], "chars").tokenizer
    saved(other, vocab_size=257)
    with pytest.raises(gptlab.GptlabError, match="has a different tokenizer from the data"):
        load_teacher(settings, config, data.tokenizer)
    saved(None, n_kv_head=2)  # a model without a tokenizer is taken at its word
    assert load_teacher(settings, config, data.tokenizer).about["parameters"] > 0
