"""One process at a time in a run: who comes second is refused, and no lock outlives the process that holds it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from helpers.trainings import Commands, assert_same_run, small
from helpers.trainings import curve as curve_of

from gptlab.errors import GptlabError
from gptlab.text.shards import Dataset
from gptlab.training.lock import NAME, alone, locked
from gptlab.training.loop import train
from gptlab.training.parallel import Group

STEPS = "budget.steps=40"


def test_two_that_go_on_with_a_run_and_one_that_is_killed(
    commands: Commands, data: Dataset, recipe: Path, tmp_path: Path
) -> None:
    run, copy = tmp_path / "run", tmp_path / "copy"
    train(small(STEPS), data, tmp_path / "whole")
    first = commands.start("train", recipe, "--data", data.directory, "--out", run, "--set", STEPS)
    while not any((run / "checkpoints").glob("step-*")):
        time.sleep(0.001)
    os.kill(first.pid, signal.SIGSTOP)  # it lives, and does nothing
    try:
        before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
        shutil.copytree(run, copy)
        second = commands.start("train", "--resume", run)
        assert second.wait() == 2
        assert second.err.read_text() == (
            f"gptlab: the run {run} is being trained by process {first.pid}; wait for its end, or stop that process"
            f" (SIGTERM saves), then go on with gptlab train --resume {run}\n"
        )
        assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
        commands.run("train", "--resume", copy)  # a copy is a run of its own, locked file and all
    finally:
        os.kill(first.pid, signal.SIGKILL)
    assert first.wait() == -signal.SIGKILL
    assert (run / NAME).exists()
    commands.run("train", "--resume", run)
    for done in (run, copy):
        assert_same_run(done, tmp_path / "whole")
        assert not (done / NAME).exists()


def test_the_advice_to_stop_it_with_sigterm(commands: Commands, data: Dataset, recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    late = ["--set", "budget.steps=3000", "--set", "train.evaluate_every=3000"]
    first = commands.start("train", recipe, "--data", data.directory, "--out", run, *late)
    while not (run / "metrics.jsonl").exists() or len(curve_of(run)) < 2:
        time.sleep(0.001)
    first.send(signal.SIGTERM)
    assert first.wait() == 128 + signal.SIGTERM
    again = commands.start("train", "--resume", run)
    while not any(json.loads(row)["event"] == "start" for row in (run / "metrics.jsonl").read_text().splitlines()[3:]):
        time.sleep(0.001)
    again.send(signal.SIGTERM)
    assert again.wait() == 128 + signal.SIGTERM


def test_two_locks_in_one_process(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "a"
    with locked(run), pytest.raises(GptlabError, match=f"is being trained by process {os.getpid()};"), locked(run):
        pass
    assert not (tmp_path / "runs").exists()  # nothing was there before, nothing is left
    with locked(run):
        (run / "run.json").touch()
    assert [path.name for path in run.iterdir()] == ["run.json"]


@pytest.mark.parametrize("left", [b"", b"1 elsewhere\n", b"\xff\xfe"])
def test_a_file_that_nobody_holds_locks_nothing(tmp_path: Path, left: bytes) -> None:
    (tmp_path / NAME).write_bytes(left)
    with locked(tmp_path):
        assert (tmp_path / NAME).read_text().startswith(f"{os.getpid()} ")


def test_a_forked_process_does_not_keep_the_lock_of_one_that_was_killed(tmp_path: Path) -> None:
    owner = os.fork()
    if owner == 0:
        with locked(tmp_path):
            child = os.fork()
            if child:
                (tmp_path / "child").write_text(str(child))
            time.sleep(60)
        os._exit(0)
    while not (tmp_path / "child").exists() or not (tmp_path / "child").read_text():
        time.sleep(0.001)
    child = int((tmp_path / "child").read_text())
    try:
        with pytest.raises(GptlabError, match=f"process {owner};"), locked(tmp_path):
            pass
        os.kill(owner, signal.SIGKILL)
        os.waitpid(owner, 0)
        os.kill(child, 0)  # still there
        with locked(tmp_path):
            pass
    finally:
        os.kill(child, signal.SIGKILL)


def test_of_several_processes_the_first_one_locks(tmp_path: Path) -> None:
    second = Group(1, 1, torch.device("cpu"))  # of a size that sums without any other
    with locked(tmp_path), alone(tmp_path, second):
        pass


def test_a_place_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    told = r"cannot write to .*/file/run: Not a directory; choose another place"
    with pytest.raises(GptlabError, match=told), locked(tmp_path / "file" / "run"):
        pass
