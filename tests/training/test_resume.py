"""Stopped in any way, at any moment, and resumed: the same numbers as a run that was never stopped."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.trainings import RECIPE, Command, Commands, assert_same_run, checkpoints, curve, small

import gptlab
from gptlab.text.shards import Dataset
from gptlab.training import loop
from gptlab.training.loop import train
from gptlab.training.state import read_latest

DROPOUT = RECIPE.replace("[tokenizer]", "dropout = 0.1\n\n[tokenizer]").replace(
    "evaluate_every = 5", "evaluate_every = 4\nevaluate_tokens = 500"
)


def n_rows(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def until(true: Callable[[], bool], what: str) -> None:
    for _ in range(120_000):
        if true():
            return
        time.sleep(0.001)
    pytest.fail(f"two minutes, and still not: {what}")


def is_saving(run: Path) -> bool:
    folder = run / "checkpoints"
    return folder.exists() and any(name.endswith((".partial", ".removed")) for name in os.listdir(folder))


class Victim:
    """A run that is killed as often as one likes."""

    def __init__(self, start: Callable[..., Any], run: Path, *options: object) -> None:
        self.start, self.run, self.options, self.kills = start, run, options, 0

    def go_on(self) -> Any:
        if (self.run / "run.json").exists():
            return self.start("train", "--resume", self.run)
        return self.start("train", *self.options, "--out", self.run)

    def kill(self, moment: str, draw: random.Random) -> None:
        """Start or resume it, and kill it: at once, after some rows, in the middle of saving, or with a checkpoint."""
        process = self.go_on()
        before = n_rows(self.run)
        if moment == "rows":
            rows = draw.randint(1, 4)
            # Resuming first takes out the rows after the checkpoint.
            until(lambda: n_rows(self.run) != before or is_dead(process), "a row")
            reached = n_rows(self.run)
            until(lambda: n_rows(self.run) >= reached + rows or is_dead(process), f"{rows} rows")
        elif moment == "saving":
            until(lambda: is_saving(self.run) or is_dead(process), "a checkpoint")
        elif moment == "saved":
            until(lambda: self.has_checkpoint() or is_dead(process), "a whole checkpoint")
        time.sleep(draw.uniform(0, 0.02))
        assert not is_dead(process), "the run was over before it was killed: make it longer"
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        self.kills += 1
        if checkpoints(self.run) if (self.run / "checkpoints").exists() else []:
            self.check()

    def has_checkpoint(self) -> bool:
        folder = self.run / "checkpoints"
        return folder.exists() and any(name.startswith("step-") for name in checkpoints(self.run))

    def check(self) -> None:
        """Whatever the moment: what has a checkpoint's name is a whole one, and the run is a model."""
        said: list[str] = []
        if self.has_checkpoint():
            assert read_latest(self.run, said.append) is not None
            assert gptlab.load(self.run).tokenizer is not None
        assert not said


def is_dead(process: Command | subprocess.Popen[bytes]) -> bool:
    try:
        return Path(f"/proc/{process.pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "dropout.toml"
    path.write_text(DROPOUT)
    return path


def test_killed_three_times(commands: Commands, data: Dataset, settings: Path, tmp_path: Path) -> None:
    steps = "budget.steps=48"
    train(small(steps, text=DROPOUT), data, tmp_path / "whole")
    victim = Victim(commands.start, tmp_path / "run", settings, "--data", data.directory, "--set", steps)
    draw = random.Random()  # other moments every time
    for moment in ("rows", "saving", "saved"):
        victim.kill(moment, draw)
    assert victim.go_on().wait() == 0
    assert_same_run(victim.run, tmp_path / "whole")
    starts = [row for row in rows(victim.run) if row["event"] == "start"]
    assert any(row["resumed_from"] for row in starts)


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_killed_twenty_times(data: Dataset, settings: Path, tmp_path: Path, optimizer: str) -> None:
    changes = ["budget.steps=240", f"optimizer.name={optimizer}"]
    train(small(*changes, text=DROPOUT), data, tmp_path / "whole")

    def start(*arguments: object) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "gptlab", *map(str, arguments)]
        return subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )

    options = [x for change in changes for x in ("--set", change)]
    victim = Victim(start, tmp_path / "run", settings, "--data", data.directory, *options)
    draw = random.Random()
    for i in range(20):
        victim.kill(("rows", "saving", "rows", "at once")[i % 4], draw)
    assert victim.go_on().wait() == 0
    assert_same_run(victim.run, tmp_path / "whole")


# Evaluations and checkpoints only at the end: what is saved before is saved because of the signal.
LATE = ["budget.steps=80", "train.evaluate_every=80"]


@pytest.fixture(scope="module")
def late(data: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("late") / "run"
    train(small(*LATE, text=DROPOUT), data, run)
    return run


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_at_once(
    commands: Commands, data: Dataset, settings: Path, late: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    run = tmp_path / "run"
    flags = [x for setting in LATE for x in ("--set", setting)]
    command = commands.start("train", settings, "--data", data.directory, "--out", run, *flags)
    until(lambda: n_rows(run) >= 4, "twenty steps")
    command.send(number)
    assert command.wait() == code
    said = command.err.read_text()
    assert said == f"stopped by {number.name} and saved; go on with: gptlab train --resume {run}\n"
    end = rows(run)[-1]
    assert (end["event"], end["reason"]) == ("end", f"stopped by {number.name}")
    assert 20 <= end["step"] < 80
    assert checkpoints(run) == [f"step-{end['step']:06d}"]
    done = commands.run("train", "--resume", run)
    assert f"resumed after step {end['step']}" in done.out.read_text()
    assert_same_run(run, late)


def test_a_second_interrupt_is_one() -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with loop._signals() as caught:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)  # whoever ends a process this way may well ask twice
        assert caught == [signal.SIGTERM, signal.SIGTERM]
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


class Crash(Exception):
    pass


def crash_at(step: int) -> Callable[[dict[str, Any]], None]:
    """A display that breaks down: the run ends in the middle of everything."""

    def report(row: dict[str, Any]) -> None:
        if row["event"] == "checkpoint" and row["step"] == step:
            raise Crash

    return report


@pytest.mark.parametrize("changes", [["optimizer.name=muon"], ["train.dtype=bfloat16"], ["train.recompute=true"]])
def test_every_kind_of_run_goes_on_exactly(data: Dataset, tmp_path: Path, changes: list[str]) -> None:
    recipe = small(*changes, text=DROPOUT)
    train(recipe, data, tmp_path / "whole")
    with pytest.raises(Crash):
        train(recipe, data, tmp_path / "run", report=crash_at(8))
    train(recipe, data, tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "run", tmp_path / "whole")


# Code left in the process by another run, compiled for any size, sums in another order: 0.014 nats in bfloat16 here.
# A run therefore compiles its own.
@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "nats"), [("float32", 1e-5), ("bfloat16", 2e-3)])
def test_a_compiled_run_goes_on_within_rounding(data: Dataset, tmp_path: Path, dtype: str, nats: float) -> None:
    recipe = small("train.compile=true", f"train.dtype={dtype}", text=DROPOUT)
    train(recipe, data, tmp_path / "whole")
    with pytest.raises(Crash):
        train(recipe, data, tmp_path / "run", report=crash_at(8))
    torch._dynamo.reset()  # nothing is compiled yet where a new process goes on
    train(recipe, data, tmp_path / "run", resume=True)
    actual, expected = curve(tmp_path / "run"), curve(tmp_path / "whole")
    assert [(row["event"], row["step"]) for row in actual] == [(row["event"], row["step"]) for row in expected]
    for key in ("loss", "validation_loss"):
        ours, theirs = ([row[key] for row in rows if key in row] for rows in (actual, expected))
        assert ours == pytest.approx(theirs, rel=0, abs=nats)


def test_a_run_on_items_goes_on_exactly(tmp_path: Path) -> None:
    from test_novelty import ITEMS, words_dataset

    data, recipe = words_dataset(tmp_path / "data"), small(text=ITEMS)
    whole = train(recipe, data, tmp_path / "whole")
    with pytest.raises(Crash):
        train(recipe, data, tmp_path / "run", report=crash_at(10))
    again = train(recipe, data, tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    assert again.metrics == whole.metrics  # the same names are invented


def test_resuming_a_run_that_is_finished(data: Dataset, tmp_path: Path, commands: Commands, recipe: Path) -> None:
    # It may have been killed after its last checkpoint and before its last words.
    done = commands.run("train", recipe, "--data", data.directory, "--out", tmp_path / "run")
    before = curve(tmp_path / "run")
    again = commands.run("train", "--resume", tmp_path / "run")
    figures = [re.findall(r"validation: .*", command.out.read_text()) for command in (done, again)]
    assert len(figures[0]) == 1
    assert figures[0] == figures[1]
    assert curve(tmp_path / "run") == before
    ends = [row for row in rows(tmp_path / "run") if row["event"] == "end"]
    assert len(ends) == 1
    assert ends[0]["reason"] == "finished"
