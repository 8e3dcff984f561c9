"""Whole runs, small ones: they learn, they can be repeated, and they say what they did."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from helpers.trainings import RECIPE, assert_same_run, checkpoints, curve, make_dataset, sentences, small
from safetensors.torch import load_file

import gptlab
from gptlab.text.shards import Dataset, open_dataset
from gptlab.training import hardware, loop, metrics
from gptlab.training.budget import tokens_trained
from gptlab.training.curves import read_curve
from gptlab.training.data import Windows
from gptlab.training.loop import Result, train
from gptlab.training.step import stream_loss


def same_weights(a: Result, b: Result) -> bool:
    pairs = zip(a.language_model.model.parameters(), b.language_model.model.parameters(), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


@pytest.mark.parametrize(
    "changes", [[], ["train.dtype=bfloat16"], ["optimizer.name=muon", "model.position=rope", "model.n_kv_head=2"]]
)
def test_a_run_learns(data: Dataset, tmp_path: Path, changes: list[str]) -> None:
    rows: list[dict[str, Any]] = []
    recipe = small("budget.steps=120", "train.evaluate_every=120", *changes)
    result = train(recipe, data, tmp_path / "run", report=rows.append)
    losses = [row["loss"] for row in rows if row["event"] == "step"]
    assert losses[0] > 5
    assert losses[-1] < 1  # the grammar itself leaves 0.16 nats per byte, the frequencies of letters 2.3
    assert result.metrics["validation_loss"] < 1
    assert not result.language_model.model.training
    assert all(p.dtype == torch.float32 for p in result.language_model.model.parameters())
    assert result.language_model.generate("the d", max_new_tokens=2, temperature=0)[0] == "og"


def test_what_a_run_reports_is_what_it_writes(data: Dataset, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = []
    result = train(small(), data, tmp_path / "run", report=rows.append)
    written = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert written == [row for row in rows if row["event"] not in ("checkpoint", "note")]
    start = written[0]
    assert start["event"] == "start"
    assert (start["step"], start["steps"], start["tokens_per_step"], start["processes"]) == (0, 20, 4 * 32, 1)
    assert start["parameters"] == sum(p.numel() for p in result.language_model.model.parameters())
    assert (start["device"], start["dtype"], start["compiled"], start["resumed_from"]) == (
        "cpu",
        "float32",
        False,
        None,
    )
    assert [row["step"] for row in rows if row["event"] == "step"] == [1, 10, 20]
    assert [row["step"] for row in rows if row["event"] == "evaluate"] == [5, 10, 15, 20]
    assert [row["step"] for row in rows if row["event"] == "checkpoint"] == [5, 10, 15, 20]
    assert all(row["tokens"] == row["step"] * 4 * 32 for row in written[1:])
    for row in written[1:]:
        if row["event"] == "step":
            assert row["learning_rate"] <= 0.01
            assert min(row["gradient_norm"], row["tokens_per_second"], row["memory_bytes"]) > 0
    seconds = [row["seconds"] for row in written[1:]]
    assert seconds == sorted(seconds)
    assert written[-1]["event"] == "end"
    assert written[-1]["reason"] == "finished"
    assert result.metrics.items() <= written[-1].items()


def test_the_figures_fit_together(data: Dataset, tmp_path: Path) -> None:
    result = train(small(), data, tmp_path / "run")
    split = data.validation
    again = stream_loss(result.language_model.model, Windows(split, 32))
    assert result.metrics["validation_loss"] == pytest.approx(again, rel=1e-6)
    assert result.metrics["validation_tokens"] == split.n_tokens - 1
    assert split.n_bytes is not None
    bits = again * (split.n_tokens - 1) / math.log(2) / split.n_bytes
    assert result.metrics["validation_bits_per_byte"] == pytest.approx(bits, rel=1e-6)
    assert result.metrics["protocol"] == "non-overlapping windows of 32 tokens, float32"
    about = json.loads((tmp_path / "run" / "run.json").read_text())
    assert about["data"] == {"path": str(data.directory), "name": "grammar", "sha256": data.sha256}
    assert about["recipe"] == small().model_dump(mode="json")
    assert about["made_with"]["torch"] == torch.__version__


def test_a_look_at_a_part_of_the_validation_stream_says_so(data: Dataset, tmp_path: Path) -> None:
    result = train(small("train.evaluate_tokens=500"), data, tmp_path / "run")
    again = stream_loss(result.language_model.model, Windows(data.validation, 32), n_tokens=500)
    assert result.metrics["validation_loss"] == pytest.approx(again, rel=1e-6)
    assert result.metrics["validation_tokens"] == 500
    assert "validation_bits_per_byte" not in result.metrics  # the bytes of a part are not known


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_same_seed_gives_the_same_run(data: Dataset, tmp_path: Path, dtype: str) -> None:
    settings = ["model.dropout=0.1", f"train.dtype={dtype}", "budget.steps=10"]
    first, second = (train(small(*settings), data, tmp_path / name) for name in "ab")
    assert_same_run(tmp_path / "a", tmp_path / "b")
    assert first.metrics == second.metrics
    assert not same_weights(first, train(small(*settings, "train.seed=1"), data, tmp_path / "c"))


def test_looking_and_saving_more_often_changes_nothing(data: Dataset, tmp_path: Path) -> None:
    rare = train(small("model.dropout=0.1", "train.evaluate_every=20"), data, tmp_path / "rare")
    often = train(small("model.dropout=0.1", "train.evaluate_every=3", "train.save_every=4"), data, tmp_path / "often")
    assert same_weights(rare, often)


@pytest.mark.filterwarnings("ignore:window=32 hides nothing")
def test_windows_shorter_than_the_context(data: Dataset, tmp_path: Path) -> None:
    """A model of a long context trains as one of a short context does, and keeps its own."""
    rotary = ("model.position=rope", "budget.tokens=1280")
    short = train(small(*rotary, "model.context_length=16"), data, tmp_path / "short")
    rows: list[dict[str, Any]] = []
    long = train(small(*rotary, "batch.length=16"), data, tmp_path / "long", report=rows.append)
    assert long.language_model.config.context_length == 32
    assert (rows[0]["steps"], rows[0]["tokens_per_step"]) == (20, 4 * 16)
    assert curve(tmp_path / "long") == curve(tmp_path / "short")
    assert same_weights(long, short)
    assert tokens_trained(str(tmp_path / "long")) == 1280
    with pytest.raises(
        gptlab.GptlabError, match=r"batch\.length=33 exceeds the model's context of 32 tokens; lower it"
    ):
        train(small("batch.length=33"), data, tmp_path / "longer")
    assert not (tmp_path / "longer").exists()


def test_variants_see_the_same_data_and_share_their_start(data: Dataset, tmp_path: Path) -> None:
    # A look at the first loss: embeddings, matrices and batches alike, it differs by the positions alone.
    losses = []
    for name, changes in (("plain", []), ("window", ["model.window=32"]), ("near", ["model.window=4"])):
        train(small("budget.steps=1", *changes), data, tmp_path / name)
        losses.append(curve(tmp_path / name)[0]["loss"])
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)  # this window hides nothing
    assert losses[2] != losses[0]
    assert losses[2] == pytest.approx(losses[0], abs=0.05)


# --- going on from a trained model ----------------------------------------------------------------------------


def test_going_on_from_a_model_begins_where_it_ended(data: Dataset, tmp_path: Path) -> None:
    base = train(small(), data, tmp_path / "base").language_model
    tuned = small("budget.steps=2", "optimizer.learning_rate=1e-9", text=RECIPE[RECIPE.index("[batch]") :])
    tuned = tuned.model_copy(update={"base": str(tmp_path / "base")})
    before = stream_loss(base.model, Windows(data.validation, 32))
    result = train(tuned, data, tmp_path / "tuned", base=gptlab.load(tmp_path / "base"))
    assert result.language_model.config == base.config
    assert result.metrics["validation_loss"] == pytest.approx(before, abs=1e-5)
    # It is resumed without its base.
    again = train(tuned, data, tmp_path / "tuned", resume=True)
    assert same_weights(result, again)


def test_a_base_with_another_tokenizer_is_refused(data: Dataset, tmp_path: Path) -> None:
    train(small("budget.steps=1"), data, tmp_path / "base")
    other = make_dataset(tmp_path / "chars", [sentences(20, seed=i) for i in range(30)], "chars")
    plan = small().model_copy(update={"base": "runs/base"})
    with pytest.raises(
        gptlab.GptlabError, match="a tokenizer other than that of runs/base; prepare it again with --token"
    ):
        train(plan, other, tmp_path / "run", base=gptlab.load(tmp_path / "base"))
    assert not (tmp_path / "run").exists()


def test_a_base_that_knows_too_few_ids_is_refused(data: Dataset, tmp_path: Path) -> None:
    base = gptlab.LanguageModel(gptlab.GPT(gptlab.ModelConfig.preset("tiny", vocab_size=256)), None)
    plan = small().model_copy(update={"base": "my-model"})
    with pytest.raises(gptlab.GptlabError, match="my-model knows 256 ids, the tokenizer of the data grammar has 257;"):
        train(plan, data, tmp_path / "run", base=base)
    assert not (tmp_path / "run").exists()


def test_data_that_were_changed_are_refused_before_the_first_step(data: Dataset, tmp_path: Path) -> None:
    shutil.copytree(data.directory, tmp_path / "data")
    for name in ("training-00000.bin", "training-ends-00000.bin", "validation-00000.bin"):
        path = tmp_path / "data" / name
        content = path.read_bytes()
        path.write_bytes(bytes([content[0] ^ 1]) + content[1:])
        with pytest.raises(gptlab.GptlabError, match=f"{name} fails its checksum; restore it, or prepare the data"):
            train(small(), open_dataset(tmp_path / "data"), tmp_path / "run")
        path.write_bytes(content)
    assert not (tmp_path / "run").exists()


def test_paths_may_be_strings(data: Dataset, tmp_path: Path) -> None:
    recipe, run = small("budget.steps=2"), str(tmp_path / "run")
    train(recipe, open_dataset(str(data.directory)), run)
    assert train(recipe, data, run, resume=True).metrics["validation_loss"] == read_curve(run).validation["loss"][-1]


# --- a loss that is not a number ---------------------------------------------------------------------------------


@pytest.mark.parametrize("broken", ["loss", "gradient"])
def test_a_loss_that_is_no_number_stops_the_run(
    data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    steps: list[list[int]] = []
    weights: list[torch.Tensor] = []
    gradients = loop.gradients

    def spoiled(module: Any, batch: Any, *rest: Any) -> torch.Tensor:
        losses = gradients(module, batch, *rest)
        steps.append(batch.origins.tolist())
        if len(steps) == 13:
            weights.append(module.wte.weight.detach().clone())
            if broken == "loss":
                return losses * math.nan
            module.wte.weight.grad[3] = math.inf
        return losses

    monkeypatch.setattr(loop, "gradients", spoiled)
    run = tmp_path / "run"
    with pytest.raises(gptlab.GptlabError) as caught:
        train(small(), data, run)
    said = str(caught.value)
    assert said.startswith("the loss is nan in step 13, " if broken == "loss" else "the loss is ")
    assert "gradient inf in step 13" in said or broken == "loss"
    origins = ", ".join(map(str, steps[-1]))
    assert f"on the windows that begin at tokens {origins} of grammar" in said
    assert f"the last good checkpoint is {run / 'checkpoints' / 'step-000010'}" in said
    assert "\n" not in said
    # Weights and optimizer were not touched by it: without the accident the run goes on as if nothing had been.
    monkeypatch.undo()
    train(small(), data, run, resume=True)
    train(small(), data, tmp_path / "whole")
    assert_same_run(run, tmp_path / "whole")


def test_a_first_step_that_is_no_number(data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "gradients", lambda *rest: torch.full((2,), math.inf))
    with pytest.raises(gptlab.GptlabError, match=r"the loss is inf in step 1, .* there is no checkpoint yet; lower"):
        train(small(), data, tmp_path / "run")


def test_a_validation_loss_that_is_no_number(data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = iter([2.0, math.nan])
    monkeypatch.setattr(loop, "stream_loss", lambda *rest, **options: next(looks))
    run = tmp_path / "run"
    with pytest.raises(gptlab.GptlabError) as caught:
        train(small(), data, run)
    assert str(caught.value) == (
        "the validation loss is nan after step 10, so nothing is saved; the last good checkpoint is"
        f" {run / 'checkpoints' / 'step-000005'}; lower optimizer.learning_rate, or look at the validation text"
    )
    assert checkpoints(run) == ["step-000005"]


# --- a disk that is full where nothing but the system notices ---------------------------------------------------


def test_rows_that_do_not_reach_the_disk(data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(metrics.os, "fsync", full)
    with metrics.Metrics(tmp_path, lambda row: None, True) as rows:
        rows.row(event="step", step=1)
        with pytest.raises(gptlab.GptlabError) as caught:
            rows.sync()
    assert str(caught.value) == (
        f"cannot write to {tmp_path / 'metrics.jsonl'}: No space left on device; make room, then go on with"
        f" gptlab train --resume {tmp_path}"
    )


# --- checkpoints that stay ------------------------------------------------------------------------------------


def test_the_last_and_the_best_stay(data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = iter([3.0, 1.0, 2.0, 1.0, 1.5, 1.2, 1.3])
    monkeypatch.setattr(loop, "stream_loss", lambda *rest, **options: next(losses))
    kept = []

    def look(row: dict[str, Any]) -> None:
        if row["event"] == "checkpoint":
            kept.append([int(name.removeprefix("step-")) for name in checkpoints(run)])

    run = tmp_path / "run"
    train(small("budget.steps=7", "train.evaluate_every=1", "train.keep_last=2"), data, run, report=look)
    # The earliest of equals is the best.
    assert kept == [[1], [1, 2], [2, 3], [2, 3, 4], [2, 4, 5], [2, 5, 6], [2, 6, 7]]
    best, last = (load_file(run / "checkpoints" / f"step-{n:06d}" / "model.safetensors") for n in (2, 7))
    assert torch.equal(gptlab.load(run).model.wte.weight, best["wte.weight"])
    assert torch.equal(gptlab.load(str(run)).model.wte.weight, best["wte.weight"])
    assert torch.equal(gptlab.load(f"{run}@last").model.wte.weight, last["wte.weight"])
    assert torch.equal(gptlab.load(f"{run}@best").model.wte.weight, best["wte.weight"])
    assert not torch.equal(best["wte.weight"], last["wte.weight"])
    with pytest.raises(gptlab.GptlabError, match=f"{run}@first: after @ comes best or last; a single step is"):
        gptlab.load(f"{run}@first")


def test_a_checkpoint_without_a_look_is_never_the_best(data: Dataset, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(small("budget.steps=10", "train.evaluate_every=4", "train.save_every=3", "train.keep_last=9"), data, run)
    measured = {
        name: json.loads((run / "checkpoints" / name / "training.json").read_text())["validation_loss"]
        for name in checkpoints(run)
    }
    assert [name for name, loss in measured.items() if loss is not None] == ["step-000010"]
    assert list(measured) == [f"step-{n:06d}" for n in (3, 6, 9, 10)]


# --- the machine ----------------------------------------------------------------------------------------------


def test_the_peak_is_a_product_that_was_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 0.5, 1.0, 1.25, 2.0, 3.0, 4.0, 5.0])  # four products; the fastest takes a quarter of a second
    monkeypatch.setattr(time, "perf_counter", lambda: next(now))
    peak, source = hardware.peak_flops(torch.device("cpu"), torch.float32)
    assert peak == 2 * 1024**3 / 0.25
    assert source == "measured: float32 product of 1024 x 1024 matrices on 1 threads"


def test_memory_is_what_the_process_has_held() -> None:
    held, now = hardware.memory_bytes(torch.device("cpu")), psutil.Process().memory_info().rss
    assert 0.9 * now < held < 100 * now  # bytes, not kilobytes
