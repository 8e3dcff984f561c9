"""Two processes on the CPU do what one does: DDP and FSDP2, and runs that change the number on the way."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from helpers.trainings import RECIPE, Commands, checkpoints, curve, small
from safetensors.torch import load_file

import gptlab
from gptlab.text.shards import Dataset
from gptlab.training.loop import train

# The loss of every step, by an evaluation after it; a batch that two processes share unevenly.
TWENTY = (
    RECIPE.replace("size = 4", "size = 5")
    .replace("1e-2", "1e-3")
    .replace("evaluate_every = 5", "evaluate_every = 1\nevaluate_tokens = 300\nsave_every = 10\nkeep_last = 3")
)
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="no gloo there")


@pytest.fixture(scope="module")
def twenty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "twenty.toml"
    path.write_text(TWENTY)
    return path


@pytest.fixture(scope="module")
def alone(data: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run in one process."""
    run = tmp_path_factory.mktemp("alone") / "run"
    train(small(text=TWENTY), data, run)
    return run


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def two(commands: Commands, *arguments: object) -> list[str]:
    """Run a command as two processes, as torchrun would start them; return what each printed."""
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    started = [commands.start(*arguments, RANK=str(i), LOCAL_RANK=str(i), **shared) for i in (0, 1)]
    codes = [process.wait() for process in started]
    assert codes == [0, 0], [process.err.read_text() for process in started]
    return [process.out.read_text() for process in started]


def assert_same_curve(run: Path, expected: Path, by: float = 1e-5) -> None:
    actual, wanted = curve(run), curve(expected)
    assert [(row["event"], row["step"]) for row in actual] == [(row["event"], row["step"]) for row in wanted]
    assert len([row for row in actual if row["event"] == "evaluate"]) == 20
    for a, b in zip(actual, wanted, strict=True):
        assert a.pop("event") == b.pop("event")
        assert a == pytest.approx(b, abs=by, rel=by)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_have_the_loss_curve_of_one(
    commands: Commands, data: Dataset, twenty: Path, alone: Path, tmp_path: Path, parallel: str
) -> None:
    run = tmp_path / "run"
    options = ["--set", f"parallel={parallel}", "--set", "batch.micro=2"]  # with parts whose gradients wait
    first, second = two(commands, "train", twenty, "--data", data.directory, "--out", run, *options)
    assert_same_curve(run, alone)
    assert f"saved: {run}" in first
    assert second == ""  # only one of them talks
    # State is saved whole: the same names and shapes as one process writes.
    for name in ("model.safetensors", "training.safetensors"):
        ours, theirs = (load_file(r / "checkpoints" / "step-000020" / name) for r in (run, alone))
        assert {key: (x.shape, x.dtype) for key, x in ours.items()} == {
            key: (x.shape, x.dtype) for key, x in theirs.items()
        }
    # One process goes on where two stopped, to the same curve.
    shutil.rmtree(run / "checkpoints" / "step-000020")
    commands.run("train", "--resume", run)
    assert_same_curve(run, alone)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_go_on_where_one_stopped(commands: Commands, alone: Path, tmp_path: Path, parallel: str) -> None:
    run = Path(shutil.copytree(alone, tmp_path / "run"))
    shutil.rmtree(run / "checkpoints" / "step-000020")
    first, _ = two(commands, "train", "--resume", run, "--set", f"parallel={parallel}")
    assert "resumed after step 10" in first
    assert_same_curve(run, alone)


def test_a_batch_smaller_than_the_group(commands: Commands, data: Dataset, twenty: Path, tmp_path: Path) -> None:
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    options = ["train", twenty, "--data", data.directory, "--out", tmp_path / "run", "--set", "batch.size=1"]
    started = [commands.start(*options, RANK=str(i), LOCAL_RANK=str(i), **shared) for i in (0, 1)]
    assert [process.wait() for process in started] == [2, 2]
    assert "batch.size=1 leaves some of 2 processes idle; raise it" in started[0].err.read_text()
    assert not (tmp_path / "run").exists()


# --- with torchrun itself -------------------------------------------------------------------------------------


def torchrun(*arguments: object, **options: Any) -> subprocess.Popen[str]:
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port())]
    command = [sys.executable, *launcher, "-m", "gptlab", *map(str, arguments)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, start_new_session=True, **options
    )


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_muon_on_two_processes(data: Dataset, twenty: Path, tmp_path: Path, parallel: str) -> None:
    # Its products are in bfloat16, whose rounding depends on how a matrix is divided.
    train(small("optimizer.name=muon", text=TWENTY), data, tmp_path / "alone")
    options = ["--set", f"parallel={parallel}", "--set", "optimizer.name=muon"]
    process = torchrun("train", twenty, "--data", data.directory, "--out", tmp_path / "run", *options)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert f"saved: {tmp_path / 'run'}" in out
    assert_same_curve(tmp_path / "run", tmp_path / "alone", 5e-3)


@pytest.mark.slow
def test_torchrun_prepares_the_corpus_once(twenty: Path, tmp_path: Path) -> None:
    from helpers.trainings import sentences

    (tmp_path / "text.txt").write_text(sentences(300))
    run = tmp_path / "run"
    process = torchrun("train", twenty, "--corpus", tmp_path / "text.txt", "--out", run)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert out.count("bytes per token") == 1
    assert gptlab.load(run).generate("the ", max_new_tokens=4, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_torchrun_saves(data: Dataset, twenty: Path, tmp_path: Path, number: signal.Signals) -> None:
    run = tmp_path / "run"
    options = ["--set", "budget.steps=3000", "--set", "train.evaluate_every=3000", "--set", "train.save_every=3000"]
    process = torchrun("train", twenty, "--data", data.directory, "--out", run, *options)
    metrics = run / "metrics.jsonl"
    while not metrics.exists() or metrics.read_text().count("\n") < 4:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(number)
    _, err = process.communicate(timeout=300)
    end = [json.loads(line) for line in metrics.read_text().splitlines()][-1]
    assert (end["event"], end["reason"]) == ("end", f"stopped by {number.name}")
    assert checkpoints(run) == [f"step-{end['step']:06d}"]
    assert f"stopped by {number.name} and saved; go on with: gptlab train --resume {run}" in err
    assert process.returncode != 0
