"""`gptlab study` and `gptlab report`: what is shown, what is refused, and how one goes on."""

from __future__ import annotations

import io
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from gptlab.cli.study import StudyProgress, plan
from gptlab.cli.study_tables import difference, notes, summary
from gptlab.report import page as report
from gptlab.study import run as running
from gptlab.study.results import Interval, read_results, read_timings
from gptlab.study.runs import Interrupted

STUDY = """
title = "A small study"
question = "What happens?"
set = [
  "model.preset=tiny", "model.context_length=32", "tokenizer.kind=bytes", "data.held_out=0.2", "batch.size=2",
  "optimizer.name=adamw", "optimizer.learning_rate=1e-2", "schedule.warmup_steps=2", "budget.steps={steps}",
  "train.evaluate_every=6", "train.evaluate_tokens=400", "train.dtype=float32", "train.compile=false",
  "data.corpus=['{corpus}']",
]
[[variant]]
name = "base"
[[variant]]
name = "rope"
label = "RoPE"
model = {{ position = "rope" }}
[evaluate]
bytes = 2000
pieces = 2
strings = 2
sample_tokens = 5
[measure]
seconds = 0
contexts = [16, 64]
batches = [1, 2]
training_rows = 1
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A study that takes a second."""
    lines = [
        f"the {pet} {verb} bread.\n" * 9 for pet in ("cat", "dog", "rat", "cow") for verb in ("sees", "eats", "has")
    ]
    (tmp_path / "text.txt").write_text("<|endoftext|>\n".join(lines))
    path = tmp_path / "mine.toml"
    path.write_text(STUDY.format(corpus=tmp_path / "text.txt", steps=12))
    return path


def write_report(directory: Path) -> Path:
    """Drawing takes seconds."""
    variants = read_results(directory).variants
    (directory / "report.html").write_text(" ".join(variant.label for variant in variants.values()))
    return directory / "report.html"


Gptlab = Callable[..., tuple[int, str, str]]


@pytest.fixture
def gptlab(run: Gptlab, monkeypatch: pytest.MonkeyPatch, one_thread: None, no_measuring: None) -> Gptlab:
    """Run the command in this process; what is slow is left out."""
    monkeypatch.setattr(report, "write_report", write_report)
    return run


def test_a_study_ends_with_a_table_and_the_path_of_its_report(gptlab: Gptlab, file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, said, told = gptlab("study", file, "--out", out)
    assert code == 0, told
    results, timings = read_results(out), read_timings(out)
    for name, variant in results.variants.items():
        assert variant.quality is not None
        (line,) = [line for line in said.splitlines() if f"│ {variant.label} " in line]
        assert f"{variant.parameters['total']:,}" in line
        assert f"{variant.quality.nats_per_token:.4f}" in line
        point = next(row for row in timings.variants[name].decode if (row.context, row.batch) == (64, 2))
        assert f" {point.milliseconds:.2f} " in line
    interval = results.variants["rope"].difference
    assert difference(interval) in said
    assert "Trained on 768 tokens, one seed." in said
    assert "Intervals: paired bootstrap over parts of documents" in said
    assert said.endswith(f"report: {out / 'report.html'}\n")
    assert "RoPE" in (out / "report.html").read_text()
    # Plain lines, no escape codes: nobody is watching.
    assert "\x1b" not in said + told
    assert "study mine: 2 variants, 2 runs, 1,536 tokens to train, about 0:00:" in told
    assert [line for line in told.splitlines() if line.startswith("train ")] == [
        "train base, seed 0 (1 of 2)",
        "train rope, seed 0 (2 of 2)",
    ]

    # The same command again, and without a name: everything is there.
    for again in (["study", file, "--out", out], ["study", "--resume", "--out", out]):
        code, once_more, told = gptlab(*again)
        assert (code, once_more) == (0, said)
        assert "2 runs (2 done before), nothing left to train" in told
    (out / "report.html").unlink()
    assert gptlab("report", out) == (0, f"report: {out / 'report.html'}\n", "")
    assert (out / "report.html").exists()


CONVERSIONS = """
[uptrain]
set = [
  "batch.size=2", "schedule.warmup_steps=1", "train.evaluate_tokens=400", "train.dtype=float32", "train.compile=false",
]
shares = [0, 0.5]
[[variant]]
name = "z"
label = "trained on"
convert = {}
[[variant]]
name = "a"
label = "grouped"
convert = { n_kv_head = 2, method = "mean" }
"""


def test_conversions_have_a_table_of_their_own(gptlab: Gptlab, file: Path, tmp_path: Path) -> None:
    file.write_text(file.read_text().replace("[evaluate]", CONVERSIONS + "[evaluate]"))
    code, said, told = gptlab("study", file, "--out", tmp_path / "out", "--only", "a")
    assert code == 0, told
    variants = read_results(tmp_path / "out").variants
    whole, _, own = said.partition("loss less that of trained on, by share of the pre-training")
    for text in (whole, own):  # as the file has them, not by name
        assert text.index("│ trained on ") < text.index("│ grouped ")
    first, last = variants["a"].conversion.checkpoints
    for look, reference in zip((first, last), variants["z"].conversion.checkpoints, strict=True):
        assert look.difference is not None
        assert f"{look.difference.mean:+.4f}" in own
        assert reference.difference is None or reference.difference.mean == 0
    assert f"{variants['z'].conversion.checkpoints[-1].nats_per_token:.4f}" in own
    assert "are compared with 'trained on': the base after the same continued training." in own
    assert "train a, seed 0 (2 of 2)" in told


def test_flags(gptlab: Gptlab, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "other.txt").write_text("<|endoftext|>\n".join(f"{i} bottles of beer\n" * 9 for i in range(30)))
    out = tmp_path / "out"
    flags = ["--only", "base", "--seeds", 2, "--corpus", tmp_path / "other.txt", "--set", "budget.steps=6"]
    (tmp_path / "asked.txt").write_text("Is there a cat?\n" * 90)
    code, _, told = gptlab("study", file, "--out", out, *flags, "--text", tmp_path / "asked.txt")
    assert code == 0, told
    quality = read_results(out).variants["base"].quality
    assert (quality.text, quality.documents) == ("asked", 1)
    about = read_results(out).study
    assert (about.seeds, about.tokens, about.corpus.name) == ([0, 1], 6 * 2 * 32, "other")
    assert list(read_results(out).variants) == ["base"]
    before = (out / "results.json").read_bytes()
    code, _, told = gptlab("study", "--resume", "--out", out)  # as it was asked for
    assert code == 0, told
    assert (out / "results.json").read_bytes() == before
    # Without --out it lies below studies/.
    monkeypatch.chdir(tmp_path)
    assert gptlab("study", file, "--only", "base")[0] == 0
    assert (tmp_path / "studies/mine/results.json").exists()


@pytest.mark.slow
def test_the_report_of_a_study(file: Path, tmp_path: Path) -> None:
    """Everything as it is, in a process of its own."""
    command = [sys.executable, "-m", "gptlab", "study", file, "--out", tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(f"report: {tmp_path / 'out/report.html'}\n")
    for name in ("report.html", "report.md"):
        text = (tmp_path / "out" / name).read_text()
        loss = read_results(tmp_path / "out").variants["rope"].quality
        assert loss is not None
        assert f"{loss.nats_per_token:.3f}" in text
    timings = read_timings(tmp_path / "out")
    for variant in timings.variants.values():
        assert 0 < (variant.decoding_memory_bytes or 0) < (variant.training_memory_bytes or 0)
    assert all(rate > 1e8 for rate in (timings.peaks.bandwidth_bytes_per_second, *timings.peaks.flops.values()))


REFUSALS = [
    (
        ["study"],
        r"no study is named; give a .toml file or one of ages, convert, convert-8m, gpt2-small, heads, modern, papers",
    ),
    (["study", "qick"], r"no study 'qick' \(did you mean 'quick'\?\)"),
    (["study", "--resume"], r"--resume needs the directory of the study; name it by --out"),
    (["study", "--resume", "--out", "nowhere"], r"nowhere holds no study to go on with"),
    (["study", "--resume", "--out", "nowhere", "--seeds", 2], r"--resume without a name goes on as before"),
    (["study", "FILE", "--resume", "--out", "nowhere"], r"nowhere holds no study to go on with"),
    (["study", "FILE", "--data", "a", "--corpus", "b"], r"--data and --corpus both say what to train on"),
    (["study", "FILE", "--only", "ropes"], r"no variant 'ropes' \(did you mean 'rope'\?\)"),
    (["study", "FILE", "--seeds", 0], r"--seeds takes the number of seeds, at least 1, got 0"),
    (["study", "FILE", "--set", "budget.step=3"], r"unknown setting 'budget.step' .*\(did you mean 'steps'\?\)"),
    (["study", "FILE", "--set", "model.n_kv_head=3"], r"variant 'base' is impossible: n_kv_head=3 does not divide"),
    (["study", "FILE", "--corpus", "nowhere.txt"], r"no corpus at nowhere.txt"),
    (["study", "FILE", "--data", "nowhere"], r"nowhere is not a dataset"),
    (["study", "gpt2-small"], r"the study gpt2-small needs data"),
    (["study", "convert"], r"the study convert needs data"),
    (["study", "quick", "--seeds", 2], r"the study quick trains none of its variants"),
]


@pytest.mark.parametrize(("arguments", "said"), REFUSALS)
def test_bad_input(
    gptlab: Gptlab, file: Path, arguments: list[Any], said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = gptlab(*(file if argument == "FILE" else argument for argument in arguments))
    err = "".join(line for line in err.splitlines(True) if not line.startswith("prepare "))
    assert (code, out) == (2, "")
    assert re.fullmatch(rf"gptlab: .*{said}.*\n", err), err
    assert not list(tmp_path.rglob("checkpoints"))


@pytest.mark.slow
def test_no_space(file: Path, tmp_path: Path) -> None:
    """No file may grow beyond 40 KB, which is less than a checkpoint: for a program that is a full disk."""
    resource = pytest.importorskip("resource")
    line = [sys.executable, "-m", "gptlab", "study", file, "--out", tmp_path / "out"]
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))  # noqa: E731
    done = subprocess.run(line, capture_output=True, text=True, check=False, preexec_fn=limit)
    assert done.returncode == 2
    assert "gptlab: no variant could be trained: cannot write to" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.glob("out/results.json"))


def test_interrupted(gptlab: Gptlab, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for error, code in ((Interrupted(signal.SIGTERM), 143), (KeyboardInterrupt(), 130)):

        def stop(*_: object, error: BaseException = error, **__: object) -> None:
            raise error

        monkeypatch.setattr(running, "run_study", stop)
        status, said, told = gptlab("study", file, "--out", tmp_path / "out")
        assert (status, said) == (code, "")
        assert told == f"stopped and saved; go on with: gptlab study --resume --out {tmp_path / 'out'}\n"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_training_saves(file: Path, tmp_path: Path, number: signal.Signals) -> None:
    file.write_text(STUDY.format(corpus=tmp_path / "text.txt", steps=2000))
    out = tmp_path / "out"
    command = [sys.executable, "-m", "gptlab", "study", file, "--out", out]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not any('"step"' in path.read_text() for path in out.glob("runs/*/metrics.jsonl")):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    said, told = process.communicate(timeout=60)
    assert (process.returncode, said) == (128 + number, "")
    assert f"stopped and saved; go on with: gptlab study --resume --out {out}" in told
    assert len(list(out.glob("runs/*/checkpoints/step-*"))) == 1


# --- what is shown ------------------------------------------------------------------------------------------------


def interval(low: float | None, high: float | None) -> Interval:
    return Interval(mean=-0.25, low=low, high=high, n=3, unit="nats per token", method="paired over seeds")


def test_a_difference_inside_the_noise_is_called_that() -> None:
    assert difference(interval(-0.3, -0.2)) == "-0.2500 [-0.3000, -0.2000]"
    assert difference(interval(-0.6, 0.1)) == "-0.2500 [-0.6000, +0.1000, noise]"
    assert difference(interval(None, None)) == "-0.2500"
    assert difference(None) == "no run"


def test_a_failed_run_is_shown(gptlab: Gptlab, file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert gptlab("study", file, "--out", out)[0] == 0
    results, timings = read_results(out), read_timings(out)
    rope = results.variants["rope"]
    failed = rope.runs[0].model_copy(update={"status": "failed", "error": "the loss is nan"})
    results.variants["rope"] = rope.model_copy(update={"quality": None, "difference": None, "runs": [failed]})
    timings.variants["rope"].decode.clear()
    console = Console(file=io.StringIO(), width=140)
    console.print(summary(results, timings))
    assert isinstance(console.file, io.StringIO)
    (line,) = [line for line in console.file.getvalue().splitlines() if "│ RoPE " in line]
    assert [cell.strip() for cell in line.split("│")[4:7]] == ["failed", "no run", ""]
    assert notes(results, timings)[-1] == "Failed: rope, seed 0: the loss is nan"


def test_plans() -> None:
    row = {"study": "s", "variants": 8, "runs": 24, "done": 0, "tokens": 59_000_000, "seconds": 14_400.0}
    assert plan(row) == "study s: 8 variants, 24 runs, 59,000,000 tokens to train, about 4:00:00 by a trial step"


def events() -> list[dict[str, Any]]:
    """Two runs of 1,000 tokens, of which the second goes on from 400."""
    rows: list[dict[str, Any]] = [
        {"event": "plan", "study": "s", "variants": 2, "runs": 2, "done": 0, "tokens": 2000, "seconds": 20.0},
        {"event": "phase", "phase": "train", "what": "base, seed 0", "done": 0, "of": 2},
        {"event": "start", "step": 0, "tokens_per_step": 100},
        *({"event": "step", "tokens": 100 * i, "loss": 5.0 - i / 10, "tokens_per_second": 50.0} for i in range(1, 11)),
        {"event": "phase", "phase": "train", "what": "rope, seed 0", "done": 1, "of": 2},
        {"event": "start", "step": 4, "tokens_per_step": 100},
        *({"event": "step", "tokens": 100 * i, "loss": 5.0, "tokens_per_second": None} for i in range(5, 11)),
        {"event": "phase", "phase": "evaluate", "what": "base, seed 0", "done": 0, "of": 2},
        {"event": "phase", "phase": "evaluate", "what": "rope, seed 0", "done": 1, "of": 2},
        {"event": "note", "text": "rope, seed 0 failed: why"},
        {"event": "phase", "phase": "measure", "what": "prefill", "seconds_left": 75.0},
    ]
    return [{"event": "training", "row": row} if row["event"] in ("start", "step") else row for row in rows]


def test_plain_lines() -> None:
    now = [0.0]
    console = Console(file=io.StringIO(), width=80)
    with StudyProgress(console, lambda: now[0]) as progress:
        for row in events():
            progress(row)
            if row["event"] == "training" and row["row"]["event"] == "step":
                now[0] += 10.0
    assert isinstance(console.file, io.StringIO)
    # A line for every run, one for every other phase, and one every thirty seconds between. 100 tokens take 10 seconds.
    assert console.file.getvalue().splitlines() == [
        "study s: 2 variants, 2 runs, 2,000 tokens to train, about 0:00:20 by a trial step",
        "train base, seed 0 (1 of 2)",
        "  400 tokens, loss 4.600, 50 tokens/s, 0:02:00 left",
        "  700 tokens, loss 4.300, 50 tokens/s, 0:01:51 left",
        "  1,000 tokens, loss 4.000, 50 tokens/s, 0:01:30 left",
        "train rope, seed 0 (2 of 2)",
        "  800 tokens, loss 5.000, 0:00:19 left",
        "evaluate base, seed 0 (1 of 2)",
        "rope, seed 0 failed: why",
        "measure prefill",
    ]


def test_a_terminal_shows_a_bar() -> None:
    console = Console(file=io.StringIO(), width=120, force_terminal=True)
    with StudyProgress(console) as progress:
        for row in events():
            progress(row)
            progress.bar.refresh()
    assert isinstance(console.file, io.StringIO)
    shown = console.file.getvalue()
    for part in ("train base, seed 0", "loss 4.000", "evaluate rope, seed 0", "2 of 2", "0:01:15 left"):
        assert part in shown
    assert not progress.bar.live.is_started
