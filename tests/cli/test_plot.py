"""`gptlab plot`: the table, where the picture goes, and what it refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from gptlab.plotting import style

Run = Callable[..., tuple[int, str, str]]
COMMAND = ("plot",)


def make(run: Path, losses: tuple[float, ...] = (3.5, 3.25, 3.375), steps: int = 1500) -> Path:
    """A run that logs every 100 steps of 4,000 tokens and evaluates every 500."""
    rows: list[dict[str, Any]] = [{"event": "start", "step": 0, "steps": 1500, "tokens_per_step": 4000}]
    for n in range(100, steps + 1, 100):
        figures = {"loss": 3 + 100 / n, "learning_rate": 1e-3, "seconds": n / 2, "tokens_per_second": 8000.0 + n}
        rows.append({"event": "step", "step": n, "tokens": 4000 * n, **figures})
        if n % 500 == 0 and len(losses) >= n // 500:
            rows.append({"event": "evaluate", "step": n, "tokens": 4000 * n, "validation_loss": losses[n // 500 - 1]})
    run.mkdir(parents=True)
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run


def test_a_table_and_a_picture(run: Run, tmp_path: Path) -> None:
    a, b = make(tmp_path / "runs" / "a"), make(tmp_path / "runs" / "longer-name", losses=(), steps=300)
    code, out, err = run(a, b)
    assert (code, err) == (0, "")
    assert out == (
        "run                   steps     tokens  best validation loss  tokens/s\n"
        "a            1,500 of 1,500  6,000,000  3.2500 at step 1,000     8,800\n"
        "longer-name    300 of 1,500  1,200,000              none yet     8,200\n"
        f"drawn: {tmp_path / 'runs' / 'curves.png'}\n"
    )
    assert (tmp_path / "runs" / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_the_picture_of_one_run_lies_in_it(run: Run, tmp_path: Path) -> None:
    a = make(tmp_path / "a")
    assert run(a)[1].endswith(f"drawn: {a / 'curves.png'}\n")
    assert sorted(os.listdir(a)) == ["curves.png", "metrics.jsonl"]


def test_runs_of_one_name_far_apart(run: Run, tmp_path: Path) -> None:
    runs = [make(tmp_path / "x" / seed / "pocket") for seed in ("seed-0", "seed-1")]
    out = run(*runs)[1]
    assert (tmp_path / "x" / "curves.png").exists()
    assert [line.split()[0] for line in out.splitlines()[1:3]] == ["seed-0/pocket", "seed-1/pocket"]


def test_what_a_shell_finds_in_the_directory_of_runs(run: Run, tmp_path: Path) -> None:
    a = make(tmp_path / "a")
    run(a, make(tmp_path / "b.png"))
    code, out, _ = run(*sorted(tmp_path.iterdir()), a / "metrics.jsonl", f"{a}/../a")  # a, b.png and curves.png
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == ["run", "a", "b.png", "drawn:"]


@pytest.mark.parametrize(("suffix", "magic"), [("png", b"\x89PNG"), ("SVG", b"<?xml"), ("pdf", b"%PDF")])
def test_formats_and_new_directories(run: Run, tmp_path: Path, suffix: str, magic: bytes) -> None:
    out = tmp_path / "new" / f"x.{suffix}"
    assert run(make(tmp_path / "a"), "--out", out)[0] == 0
    assert out.read_bytes().startswith(magic)
    assert os.listdir(out.parent) == [out.name]


@pytest.mark.parametrize("suffix", style.FORMATS)
def test_an_old_picture_survives_a_failure(
    monkeypatch: pytest.MonkeyPatch, run: Run, tmp_path: Path, suffix: str
) -> None:
    a, out = make(tmp_path / "a"), tmp_path / f"x.{suffix}"
    assert run(a, "--out", out)[0] == 0
    old = out.read_bytes()

    def half(self: Figure, file: Any, **rest: Any) -> None:
        file.write(old[: len(old) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", half)
    code, printed, err = run(a, "--out", out)
    assert (code, printed) == (2, "")
    assert "No space left" in err
    assert out.read_bytes() == old
    assert sorted(os.listdir(tmp_path)) == ["a", out.name]


def test_a_picture_is_moved_into_place_whole(monkeypatch: pytest.MonkeyPatch, run: Run, tmp_path: Path) -> None:
    a, out = make(tmp_path / "a"), tmp_path / "x.svg"
    assert run(a, "--out", out)[0] == 0
    old, moved = out.read_bytes(), []
    replace = os.replace

    def watched(source: Path, target: Path) -> None:
        moved.append((Path(source).read_bytes(), Path(target), out.read_bytes()))
        replace(source, target)

    monkeypatch.setattr(os, "replace", watched)
    assert run(a, "--out", out, "--smooth", 0)[0] == 0
    new = out.read_bytes()
    assert moved == [(new, out, old)]
    assert new != old


def test_the_axis_and_the_smoothing_reach_the_picture(run: Run, tmp_path: Path) -> None:
    a, out = make(tmp_path / "a"), tmp_path / "x.svg"
    assert run(a, "--out", out, "--x", "hours", "--smooth", 123)[0] == 0
    text = out.read_text()
    assert "training time (minutes)" in text
    assert "smoothed over 123 steps" in text


def test_no_display_is_needed(tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k not in ("DISPLAY", "WAYLAND_DISPLAY")}
    command = [sys.executable, "-m", "gptlab", "plot", str(make(tmp_path / "a")), "--out", str(tmp_path / "x.pdf")]
    done = subprocess.run(
        command, env={**environment, "MPLBACKEND": "tkagg"}, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "x.pdf").exists()


# --- refusals -------------------------------------------------------------------------------------------------


def test_what_is_refused(run: Run, tmp_path: Path) -> None:
    a = make(tmp_path / "a")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "metrics.jsonl").touch()
    (tmp_path / "x.png").touch()
    damaged = make(tmp_path / "damaged") / "metrics.jsonl"
    damaged.write_text(damaged.read_text().replace('"step"', "step", 1))

    def refused(*arguments: object) -> str:
        code, out, err = run(*arguments)
        assert (code, out) == (2, "")
        assert err.startswith("gptlab: ")
        assert err.count("\n") == 1
        return err

    assert "has no metrics.jsonl" in refused(tmp_path / "nowhere")
    assert f"{tmp_path} is not a run: it has no metrics.jsonl; name one, as {a}" in refused(a, tmp_path)
    assert f"{tmp_path / 'empty' / 'metrics.jsonl'} has no row yet" in refused(a, tmp_path / "empty")
    assert f"{damaged} is damaged in line 1 (not valid JSON)" in refused(a, damaged.parent)
    assert "x.png is a picture; name the directory of a run" in refused(tmp_path / "x.png")
    assert "no axis 'step' (did you mean 'steps'?); --x takes tokens, steps, hours" in refused(a, "--x", "step")
    assert "--smooth must be a number of steps" in refused(a, "--smooth", -1)
    assert "--smooth must be a number of steps" in refused(a, "--smooth", "nan")
    assert "end it in .png, .svg or .pdf" in refused(a, "--out", tmp_path / "x.gif")
    assert "end it in .png, .svg or .pdf" in refused(a, "--out", tmp_path)
    assert "cannot write to" in refused(a, "--out", tmp_path / "x.png" / "y.png")
    assert not list(tmp_path.rglob("curves.png"))


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch, run: Run, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    code, out, err = run(make(tmp_path / "a"))
    assert (code, out) == (2, "")
    assert err == "gptlab: drawing needs matplotlib; install it with: pip install 'gptlab[report]'\n"
