"""Which checkpoint of a training run a name stands for."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

import gptlab
from gptlab.checkpoints import runs
from gptlab.checkpoints.hub import locate
from gptlab.checkpoints.runs import best, is_run, model_of, read_run, run_checkpoints


def make(run: Path, losses: dict[int, Any]) -> Path:
    """The directories of a run, with validation losses by step, and no models in them."""
    for step, loss in losses.items():
        folder = run / "checkpoints" / f"step-{step:06d}"
        folder.mkdir(parents=True)
        (folder / "training.json").write_text(json.dumps({"step": step, "validation_loss": loss}))
    return run


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


@pytest.mark.parametrize(
    ("losses", "top"),
    [
        ({10: 2.0, 20: 1.0, 30: 1.5}, 20),
        ({10: 2.0, 20: 1.0, 30: 1.0}, 20),  # the earliest of equals
        ({10: None, 20: 3.0, 30: None}, 20),
        ({10: None, 20: None}, 20),  # nobody looked: the last
        ({10: 2.0, 20: math.nan}, 10),
        ({10: math.nan, 20: math.nan}, 20),
        ({10: 2.0, 20: "low"}, 10),
        ({999_999: 2.0, 1_000_000: 3.0}, 999_999),
    ],
)
def test_a_run_is_its_best_checkpoint(tmp_path: Path, losses: dict[int, Any], top: int) -> None:
    run = make(tmp_path / "run", losses)
    assert step_of(model_of(run)) == step_of(model_of(run, "best")) == top
    assert step_of(model_of(run, "last")) == max(losses)
    assert step_of(locate(str(run))) == top
    assert step_of(locate(f"{run}@last")) == max(losses)


def test_checkpoints_come_in_the_order_of_their_steps(tmp_path: Path) -> None:
    run = make(tmp_path / "run", {1_000_000: 1.0, 999_999: 2.0, 5: 3.0})
    assert [c.step for c in run_checkpoints(run)] == [5, 999_999, 1_000_000]  # by number, not by name
    assert [c.validation_loss for c in run_checkpoints(run)] == [3.0, 2.0, 1.0]


def test_what_is_half_written_or_half_removed_is_no_checkpoint(tmp_path: Path) -> None:
    run = make(tmp_path / "run", {5: 3.0})
    for name in (".step-000010.partial", ".step-000000.removed", "step-10.old", "step-", "notes"):
        (run / "checkpoints" / name).mkdir()
    assert [c.step for c in run_checkpoints(run)] == [5]


@pytest.mark.parametrize("content", [None, "", "{", "[1]", "\ud800"])
def test_a_checkpoint_that_has_lost_its_facts_counts_without_a_loss(tmp_path: Path, content: str | None) -> None:
    run = make(tmp_path / "run", {5: 3.0, 10: 1.0})
    path = run / "checkpoints" / "step-000010" / "training.json"
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content.encode("utf-8", "surrogatepass"))
    assert runs.read_facts(path.parent) == {}
    assert [c.validation_loss for c in run_checkpoints(run)] == [3.0, None]
    assert step_of(model_of(run)) == 5
    assert step_of(model_of(run, "last")) == 10


def test_paths_may_be_strings(tmp_path: Path) -> None:
    run = make(tmp_path / "run", {5: 3.0, 10: 1.0})
    (run / "run.json").write_text(json.dumps(ABOUT))
    assert is_run(str(run))
    assert run_checkpoints(str(run)) == run_checkpoints(run)
    assert model_of(str(run)) == model_of(run)
    assert read_run(str(run)) == read_run(run)
    with pytest.raises(gptlab.GptlabError, match=r"a single step is .*/checkpoints/step-N"):
        model_of(str(run), "first")


def test_best_of_nothing() -> None:
    assert best([]) is None


@pytest.mark.parametrize("name", ["first", "", "step-000005", "5"])
def test_only_best_and_last_come_after_the_at(tmp_path: Path, name: str) -> None:
    run = make(tmp_path / "run", {5: 3.0})
    with pytest.raises(gptlab.GptlabError, match=r"after @ comes best or last; a single step is .*/step-N"):
        locate(f"{run}@{name}")


def test_a_run_without_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{}")
    assert is_run(tmp_path)
    for name in (tmp_path, str(tmp_path), f"{tmp_path}@last"):
        with pytest.raises(gptlab.GptlabError, match="has no checkpoint yet; wait for its first evaluation, or"):
            gptlab.load(name)


def test_a_directory_is_no_run(tmp_path: Path) -> None:
    assert not is_run(tmp_path)
    assert not is_run(tmp_path / "nowhere")
    with pytest.raises(gptlab.GptlabError, match="is not a model directory"):
        gptlab.load(tmp_path)


def test_models_are_loaded_from_runs(tmp_path: Path) -> None:
    run = tmp_path / "a@b"  # an @ of its own
    for step, loss in ((5, 1.0), (10, 2.0)):
        config = gptlab.ModelConfig.preset("tiny", n_layer=step // 5)
        make(run, {step: loss})
        gptlab.save(gptlab.LanguageModel(gptlab.GPT(config)), run / "checkpoints" / f"step-{step:06d}")
    layers = {
        name: gptlab.load(where).config.n_layer
        for name, where in {
            "path": run,
            "name": str(run),
            "best": f"{run}@best",
            "last": f"{run}@last",
            "step": f"{run}/checkpoints/step-000010",
        }.items()
    }
    assert layers == {"path": 1, "name": 1, "best": 1, "last": 2, "step": 2}
    shutil.rmtree(run / "checkpoints" / "step-000005")
    assert gptlab.load(run).config.n_layer == 2


# --- run.json -------------------------------------------------------------------------------------------------

ABOUT = {"recipe": {"model": {}}, "data": {"path": "data", "sha256": "0a", "name": "x"}, "made_with": {}}


def test_what_a_run_says_of_itself(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps(ABOUT))
    assert read_run(tmp_path) == {"recipe": {"model": {}}, "data": {"path": "data", "sha256": "0a"}}


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "{}", '{"recipe": {}}', '{"recipe": {}, "data": {"path": "x"}}', '{"recipe": 5}']
)
def test_a_damaged_description(tmp_path: Path, content: str) -> None:
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(gptlab.GptlabError, match=r"run\.json cannot be read .*; restore it"):
        read_run(tmp_path)


def test_no_description(tmp_path: Path) -> None:
    with pytest.raises(gptlab.GptlabError, match=r"holds no run \(no run\.json\); name the directory that --out"):
        read_run(tmp_path)
