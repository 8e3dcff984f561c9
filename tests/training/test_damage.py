"""Runs whose files were damaged, mixed up or changed: skipped or refused in words, never silently wrong."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.trainings import Commands, assert_same_run, checkpoints, make_dataset, sentences, small
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import gptlab
from gptlab.text.shards import Dataset
from gptlab.training.loop import train
from gptlab.training.state import read_checkpoint

SETTINGS = "train.keep_last=3"  # of four checkpoints: 5, 10, 15 and 20


@pytest.fixture(scope="module")
def whole(data: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing happened to."""
    run = tmp_path_factory.mktemp("whole") / "run"
    train(small(SETTINGS), data, run)
    assert checkpoints(run) == ["step-000010", "step-000015", "step-000020"]
    return run


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    """A copy, to be damaged."""
    return Path(shutil.copytree(whole, tmp_path / "run"))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-10] ^= 4
    path.write_bytes(content)


def halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def drop_a_tensor(path: Path) -> None:
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    tensors.pop("h.1.mlp.c_fc.weight/exp_avg")
    save_file(tensors, path, metadata)


def change(old: str, new: str) -> Callable[[Path], None]:
    def act(path: Path) -> None:
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))

    return act


def resume(run: Path, data: Dataset, *settings: str) -> list[str]:
    """Resume a run; return the notes that it gives."""
    rows: list[dict[str, Any]] = []
    train(small(SETTINGS, *settings), data, run, resume=True, report=rows.append)
    return [row["text"] for row in rows if row["event"] == "note"]


# --- damaged checkpoints --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "damage", "reason"),
    [
        ("model.safetensors", flip, "fails its checksum"),
        ("model.safetensors", halve, "is not an intact safetensors file"),
        ("training.safetensors", flip, "fails its checksum"),
        ("training.safetensors", Path.unlink, "is not an intact safetensors file"),
        ("training.safetensors", drop_a_tensor, "is incomplete"),
        ("training.json", halve, "training.json is missing, damaged or of another version"),
        ("training.json", Path.unlink, "training.json is missing"),
        ("training.json", change('"step": 20', '"step": 21'), "belong to different saves"),
        ("training.json", change('"version": 1', '"version": 2'), "of another version"),
        ("config.json", Path.unlink, "has no config.json"),
    ],
)
def test_a_damaged_checkpoint_is_skipped_for_the_one_before(
    run: Path, whole: Path, data: Dataset, name: str, damage: Callable[[Path], None], reason: str
) -> None:
    damage(run / "checkpoints" / "step-000020" / name)
    (note,) = resume(run, data)
    assert note.startswith("skipping the checkpoint of step 20: ")
    assert reason in note
    assert_same_run(run, whole)
    assert checkpoints(run) == checkpoints(whole)


def test_the_command_says_what_it_skips(run: Path, whole: Path, commands: Commands) -> None:
    for step, name in ((20, "model.safetensors"), (15, "training.safetensors")):
        flip(run / "checkpoints" / f"step-{step:06d}" / name)
    said = commands.run("train", "--resume", run).out.read_text()
    assert [said.count(f"skipping the checkpoint of step {step}: ") for step in (10, 15, 20)] == [0, 1, 1]
    assert "resumed after step 10" in said
    assert_same_run(run, whole)


def test_all_damaged_is_one_sentence(run: Path, commands: Commands) -> None:
    before = (run / "metrics.jsonl").read_bytes()
    for name in checkpoints(run):
        flip(run / "checkpoints" / name / "training.safetensors")
    command = commands.start("train", "--resume", run)
    assert command.wait() == 2
    assert command.err.read_text() == (
        f"gptlab: every checkpoint of the run {run} is damaged; start it again with another --out\n"
    )
    assert (run / "metrics.jsonl").read_bytes() == before
    assert len(checkpoints(run)) == 3  # nothing was thrown away


def test_a_damaged_checkpoint_never_pushes_out_an_intact_one(run: Path, whole: Path, data: Dataset) -> None:
    # Going on from step 10 with one checkpoint to keep, while the damaged ones of 15 and 20 are still there.
    for step in (15, 20):
        halve(run / "checkpoints" / f"step-{step:06d}" / "model.safetensors")
    kept: list[list[str]] = []

    def stop(row: dict[str, Any]) -> None:
        if row["event"] == "checkpoint":
            kept.append(checkpoints(run))
            for name in kept[-1]:
                read_checkpoint(run / "checkpoints" / name)

    train(small("train.keep_last=1", "train.save_every=2"), data, run, resume=True, report=stop)
    assert [names[-1] for names in kept] == [f"step-{step:06d}" for step in (12, 14, 16, 18, 20)]
    assert_same_run(run, whole)


def test_a_last_line_of_metrics_that_was_cut_off(run: Path, whole: Path, data: Dataset) -> None:
    shutil.rmtree(run / "checkpoints" / "step-000020")
    halve(run / "metrics.jsonl")
    text = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(text[: text.rindex("\n") + 30])
    resume(run, data)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["event"] == "end"
    assert [row["step"] for row in rows if row["event"] == "evaluate"][-1] == 20


# --- state of another run -------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["model.n_kv_head=2", "model.window=8", "train.seed=1"])
def test_checkpoints_of_another_run_are_refused(run: Path, data: Dataset, tmp_path: Path, variant: str) -> None:
    train(small(SETTINGS, variant), data, tmp_path / "other")
    shutil.rmtree(run / "checkpoints")
    shutil.copytree(tmp_path / "other" / "checkpoints", run / "checkpoints")
    setting, _, value = variant.partition("=")
    was = {"train.seed": "0"}.get(setting, "None")
    with pytest.raises(gptlab.GptlabError, match=re.escape(f"a different recipe: {setting} was {value} and is {was};")):
        resume(run, data)


@pytest.mark.parametrize(
    ("variant", "files"),
    [
        ("model.n_kv_head=2", ["training.safetensors"]),
        ("model.window=8", ["training.safetensors"]),
        ("model.window=8", ["training.safetensors", "training.json"]),
    ],
)
def test_optimizer_state_of_another_run_is_never_taken(
    run: Path, whole: Path, data: Dataset, tmp_path: Path, variant: str, files: list[str]
) -> None:
    # With a window all shapes are the same: nothing but the hashes tells the two apart.
    train(small(SETTINGS, variant), data, tmp_path / "other")
    for name in files:
        shutil.copy(tmp_path / "other" / "checkpoints" / "step-000020" / name, run / "checkpoints" / "step-000020")
    (note,) = resume(run, data)
    assert note.startswith("skipping the checkpoint of step 20: ")
    assert "belong to different saves" in note
    assert_same_run(run, whole)


def test_weights_of_another_step_are_never_taken(run: Path, whole: Path, data: Dataset) -> None:
    folder = run / "checkpoints"
    shutil.copy(folder / "step-000015" / "model.safetensors", folder / "step-000020")
    (note,) = resume(run, data)
    assert "belong to different saves" in note
    assert_same_run(run, whole)


# --- what may change, and what not ----------------------------------------------------------------------------


def test_a_changed_recipe_is_named(run: Path, data: Dataset, commands: Commands) -> None:
    settings = ["optimizer.learning_rate=0.5", "budget.tokens=5000"]
    flags = [x for setting in settings for x in ("--set", setting)]
    command = commands.start("train", "--resume", run, *flags)
    assert command.wait() == 2
    said = command.err.read_text()
    assert said.startswith(f"gptlab: the run {run} cannot continue with a different recipe: ")
    for part in ("budget.steps was 20 and is None", "budget.tokens was None and is 5000"):
        assert part in said
    assert "optimizer.learning_rate was 0.01 and is 0.5" in said
    assert f"--from {run}" in said
    assert said.count("\n") == 1


def test_settings_that_change_rounding_only_may_change(run: Path, whole: Path, data: Dataset) -> None:
    shutil.rmtree(run / "checkpoints" / "step-000020")
    free = ["batch.micro=3", "train.recompute=true", "train.keep_last=1", "train.save_every=2", "parallel=fsdp"]
    assert resume(run, data, *free) == []
    for name in ("model.safetensors", "training.safetensors"):
        actual, expected = (load_file(r / "checkpoints" / "step-000020" / name) for r in (run, whole))
        assert actual.keys() == expected.keys()
        # Adam may turn a gradient that is all rounding into a step of its learning rate, at the end a thousandth.
        assert all((actual[key] - expected[key]).abs().max() < 1e-4 for key in actual)
    assert resume(run, data) == []  # and back again


@pytest.mark.parametrize("checkpointed", [True, False])
def test_changed_data_are_refused(run: Path, data: Dataset, tmp_path: Path, checkpointed: bool) -> None:
    if not checkpointed:
        shutil.rmtree(run / "checkpoints")
    other = make_dataset(tmp_path / "data", [sentences(50, seed=i) for i in range(60)])
    with pytest.raises(gptlab.GptlabError, match=r"/data holds other data than the run .* began with.*; restore them"):
        resume(run, other)
    assert (run / "checkpoints").exists() == checkpointed


def test_before_the_first_checkpoint_a_run_starts_again(run: Path, whole: Path, data: Dataset) -> None:
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(gptlab.GptlabError, match=r"a different recipe: train\.seed was 0 and is 1"):
        resume(run, data, "train.seed=1")
    assert resume(run, data) == ["the run has no checkpoint yet, so it starts from the beginning"]
    assert_same_run(run, whole)


def test_another_number_of_threads_is_said(run: Path, data: Dataset) -> None:
    import torch

    torch.set_num_threads(2)
    (note,) = resume(run, data)
    assert note == "not bit for bit what an uninterrupted run would give: threads 1 before, 2 now"


def test_a_run_that_was_moved_with_its_data(recipe: Path, tmp_path: Path, commands: Commands) -> None:
    (tmp_path / "text.txt").write_text(sentences(300))
    commands.run("train", recipe, "--corpus", tmp_path / "text.txt", "--out", tmp_path / "a")
    (tmp_path / "a").rename(tmp_path / "b")
    shutil.rmtree(tmp_path / "b" / "checkpoints" / "step-000020")
    commands.run("train", "--resume", tmp_path / "b")
    assert checkpoints(tmp_path / "b")[-1] == "step-000020"
