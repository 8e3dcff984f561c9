"""Saving: whatever happens on the way, the old model or the new one is there, never something between."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import tiny_lm

import gptlab
from gptlab.checkpoints import files, native


def assert_holds(directory: Path, expected: gptlab.LanguageModel) -> None:
    loaded = gptlab.load(directory)
    assert loaded.config == expected.config
    assert torch.equal(loaded.model.wte.weight, expected.model.wte.weight)
    assert not list(directory.glob(".*")), "temporary files were left behind"


def test_a_full_disk_leaves_the_old_model(small_disk: Path) -> None:
    old = tiny_lm(0)
    gptlab.save(old, small_disk / "model")
    with pytest.raises(gptlab.GptlabError, match="the disk is full; what was there before is unchanged"):
        gptlab.save(tiny_lm(1, n_embd=256, n_layer=4), small_disk / "model")  # 13 MB
    assert_holds(small_disk / "model", old)


def test_a_disk_with_room_for_the_first_files_only(small_disk: Path) -> None:
    # The tokenizer and config.json still fit, the weights do not: none of the three may move.
    old = tiny_lm(0)
    gptlab.save(old, small_disk / "model")
    free = os.statvfs(small_disk)
    (small_disk / "filler").write_bytes(b"x" * (free.f_bavail * free.f_bsize - 60_000))
    with pytest.raises(gptlab.GptlabError, match="the disk is full"):
        gptlab.save(tiny_lm(1, norm_eps=1e-3), small_disk / "model")
    assert_holds(small_disk / "model", old)


@pytest.mark.parametrize("failing", ["weights", "config.json"])
def test_a_writer_that_runs_out_of_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    old = tiny_lm(0)
    gptlab.save(old, tmp_path)

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if failing == "weights":
        monkeypatch.setattr(native, "save_file", full)
    else:
        write = Path.write_bytes
        monkeypatch.setattr(
            Path, "write_bytes", lambda path, data: full() if path.name.startswith(".config") else write(path, data)
        )
    with pytest.raises(gptlab.GptlabError, match="the disk is full"):
        gptlab.save(tiny_lm(1), tmp_path)
    monkeypatch.undo()
    assert_holds(tmp_path, old)


def test_data_is_synced_before_anything_moves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A rename that reaches the disk before the data does would leave empty files after a power cut.
    events: list[str] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(files.os, "fsync", lambda fd: (events.append("sync"), fsync(fd)))
    monkeypatch.setattr(files.os, "replace", lambda a, b: (events.append("move"), replace(a, b)))
    gptlab.save(tiny_lm(0), tmp_path)
    assert events == ["sync"] * 3 + ["move"] * 3 + ["sync"]  # the last is the directory itself


def test_a_path_below_a_file_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(gptlab.GptlabError, match="cannot write to"):
        gptlab.save(tiny_lm(0), tmp_path / "file" / "model")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_directory_without_permission(tmp_path: Path) -> None:
    gptlab.save(tiny_lm(0), tmp_path / "model")
    (tmp_path / "model").chmod(0o500)
    try:
        with pytest.raises(gptlab.GptlabError, match="Permission denied"):
            gptlab.save(tiny_lm(1), tmp_path / "model")
        assert_holds(tmp_path / "model", tiny_lm(0))
    finally:
        (tmp_path / "model").chmod(0o700)


def test_permissions_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        gptlab.save(tiny_lm(0), tmp_path / "model")
    finally:
        os.umask(before)
    assert {oct(p.stat().st_mode & 0o777) for p in (tmp_path / "model").iterdir()} == {"0o640"}


# Runs in a process of its own, which forks: importing torch once for each of a hundred victims would take minutes.
KILLER = """
import json, os, random, signal, sys, time
import torch
torch.set_num_threads(1)
import gptlab
from gptlab.text.tokenizers import byte_tokenizer, char_tokenizer

directory = sys.argv[1]

def make(seed, tokenizer, **overrides):
    config = gptlab.ModelConfig.preset("tiny", vocab_size=257, n_embd=64, **overrides)
    return gptlab.LanguageModel(gptlab.GPT(config, seed=seed), tokenizer)

# Two models that differ in every file.
models = {"A": make(0, byte_tokenizer()), "B": make(1, char_tokenizer(["abc"]), norm_eps=1e-3)}

def is_model(found, model):
    pairs = zip(found.model.parameters(), model.model.parameters(), strict=True)
    return (found.config == model.config and all(torch.equal(a, b) for a, b in pairs)
            and found.tokenizer.files() == model.tokenizer.files())

def what_is_there():
    try:
        found = gptlab.load(directory)
    except gptlab.GptlabError as error:
        assert "belong to different saves" in str(error), error
        return "refused"
    return next((name for name, model in models.items() if is_model(found, model)), "a mixture")

def victim(act):
    pid = os.fork()
    if pid == 0:
        try:
            act()
        finally:
            os._exit(0)
    return pid

outcomes = []
# At random moments, while two models overwrite each other without a pause.
gptlab.save(models["A"], directory)
draw = random.Random(0)
for _ in range(60):
    def loop():
        while True:
            for model in models.values():
                gptlab.save(model, directory)
    pid = victim(loop)
    time.sleep(draw.uniform(0.002, 0.06))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    outcomes.append(what_is_there())

# And between any two of the moves, where a random kill hardly ever hits.
replace = os.replace
between = []
for moves in range(4):
    gptlab.save(models["A"], directory)
    def killed_at():
        done = 0
        def counted(*args):
            nonlocal done
            if done == moves:
                os.kill(os.getpid(), signal.SIGKILL)
            replace(*args)
            done += 1
        os.replace = counted
        gptlab.save(models["B"], directory)
    os.waitpid(victim(killed_at), 0)
    between.append(what_is_there())

gptlab.save(models["A"], directory)  # whatever was left, the next save puts it right
print(json.dumps({"random": outcomes, "between": between, "after": what_is_there()}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="forks a process that has torch loaded")
def test_a_killed_process_never_leaves_a_mixture(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-c", KILLER, str(tmp_path / "model")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    outcomes = json.loads(done.stdout)
    assert set(outcomes["random"]) <= {"A", "B", "refused"}
    assert set(outcomes["random"]) & {"A", "B"}, "no kill left a model: nothing was tested"
    # Before the first move the old model, after the last the new one, between them a sentence.
    assert outcomes["between"] == ["A", "refused", "refused", "B"]
    assert outcomes["after"] == "A"
