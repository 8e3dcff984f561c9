"""What a run shows: plain lines in a file, a live panel on a terminal, the plan before anything else."""

from __future__ import annotations

import io
import re
import sys
import time
from typing import Any

import pytest
from rich.console import Console

from gptlab.cli.progress import Progress
from gptlab.training.curves import Smoothed

START = {
    "event": "start",
    "step": 0,
    "steps": 2000,
    "tokens_per_step": 4096,
    "parameters": 2664576,
    "flops_per_token": 8e6,
    "peak_flops": 1.6e11,
    "peak_source": "measured: bfloat16 matrix product of 2048 on 1 thread",
    "device": "cpu",
    "dtype": "bfloat16",
    "name": "pocket",
    "resumed_from": None,
}
PLAN = (
    "pocket: 2,000 steps, 8,192,000 tokens (4,096 a step), 2,664,576 parameters, cpu bfloat16,"
    " MFU relative to 0.16 TFLOP/s (measured: bfloat16 matrix product of 2048 on 1 thread)"
)


class Clock:
    """Noon of a day, and then what the test makes of it."""

    def __init__(self) -> None:
        self.now = time.mktime((2026, 3, 2, 12, 0, 0, 0, 0, -1))

    def __call__(self) -> float:
        return self.now


def step(n: int, **more: Any) -> dict[str, Any]:
    """Two steps a second: 8,192 tokens."""
    row = {"event": "step", "step": n, "tokens": 4096 * n, "loss": 8 - n / 1000, "gradient_norm": 1.25}
    return row | {"learning_rate": 3e-4, "seconds": n / 2, "tokens_per_second": 8192.0, "memory_bytes": 3 << 29, **more}


def plain(rows: list[tuple[float, dict[str, Any]]]) -> list[str]:
    """The lines that the rows give in a file, each row that many seconds after the one before."""
    clock, file = Clock(), io.StringIO()
    with Progress(Console(file=file, width=40), clock) as progress:  # a line is a line, however narrow
        for seconds, row in rows:
            clock.now += seconds
            progress(row)
    assert "\x1b" not in file.getvalue()
    return file.getvalue().splitlines()


# --- plain lines ----------------------------------------------------------------------------------------------


def test_the_plan_comes_first_then_rate_and_finish() -> None:
    # 10 steps in 5 seconds: 1,990 are left, which is 995 seconds.
    assert plain([(0, START), (5, step(10))]) == [PLAN, "8,192 tokens/s  0:16:35 left  done at 12:16"]


def test_the_first_step_of_all_tells_the_rate_only_where_it_is_slow() -> None:
    quick, slow = (step(1, seconds=seconds, tokens_per_second=4096 / seconds) for seconds in (2.0, 20.0))
    lines = plain([(0, START), (2, quick), (5, step(11, seconds=7.0))])
    assert "done at" not in lines[1]
    assert lines[2] == "8,192 tokens/s  0:16:34 left  done at 12:16"
    assert plain([(0, START), (20, slow)])[1] == "205 tokens/s  11:06:20 left  done at 23:06"


def test_notes_are_lines_of_their_own() -> None:
    note = {"event": "note", "text": "compiling [red]"}
    assert plain([(0, note), (0, START), (0, note)]) == ["compiling [red]", PLAN, "compiling [red]"]
    assert screen(terminal([(0, START), (0, note)], width=200)) == [PLAN, "compiling [red]"]


def test_one_line_every_ten_seconds_and_one_for_each_evaluation() -> None:
    rows: list[tuple[float, dict[str, Any]]] = [(0, START)]
    for n in range(10, 110, 10):  # a row every five seconds
        rows.append((5, step(n)))
        if n in (50, 60):
            rows.append((0, {"event": "evaluate", "step": n, "tokens": 0, "validation_loss": 5.5, "seconds": 1.0}))
        rows.append((0, {"event": "checkpoint", "step": n, "path": "checkpoints/x"}))
    lines = plain(rows)[2:]
    shown = [re.match(r"step (\d+)( of 2,000  loss|  validation loss 5\.5000$)", line) for line in lines]
    assert [match and match[1] for match in shown] == ["30", "50", "50", "60", "70", "90"]
    assert lines[0] == (
        "step 30 of 2,000  loss 7.9700  smoothed 7.9793  8,192 tokens/s  MFU 41.0%  memory 1.50 GiB  done at 12:16"
    )


def test_the_smoothed_loss_is_the_bias_corrected_average() -> None:
    average = Smoothed(100)
    values = [average.update(n, 8 - n / 1000) for n in (10, 20, 30)]
    assert f"smoothed {values[-1]:.4f}  " in plain([(0, START), (5, step(10)), (5, step(20)), (5, step(30))])[-1]


def test_the_finish_follows_the_measured_mean_with_evaluations() -> None:
    # The first row claims 2 steps a second, the clock says 1: 1,980 seconds are left after 20 steps.
    first = step(10, seconds=5.0)
    lines = plain([(0, START), (5, first), (10, step(20, seconds=15.0))])
    assert lines[1].endswith("0:16:35 left  done at 12:16")
    assert lines[2].endswith("done at 12:33")


def test_a_finish_on_another_day_has_its_date() -> None:
    slow = step(10, tokens_per_second=40.96)
    end = time.strftime("%a %d %b %H:%M", time.localtime(Clock().now + 5 + 199000))
    assert plain([(0, START), (5, slow)])[1] == f"41 tokens/s  2 d 7:16:40 left  done at {end}"


def test_a_resumed_run_tells_so_and_counts_from_there() -> None:
    start = {**START, "step": 500, "resumed_from": 500}
    lines = plain([(0, start), (5, step(510, seconds=5.0)), (10, step(520, seconds=10.0))])
    assert "cpu bfloat16, resumed after step 500, MFU" in lines[0]
    assert lines[1].startswith("8,192 tokens/s  0:12:25 left")
    assert lines[2].endswith("done at 12:12")


@pytest.mark.parametrize("reason", ["finished", "stopped by SIGINT"])
def test_the_end(reason: str) -> None:
    end = {"event": "end", "step": 1999, "reason": reason, "validation_loss": 3.21, "seconds": 3600.0}
    expected = f"{reason}  step 1,999  validation loss 3.2100  1:00:05 elapsed"
    assert plain([(0, START), (5, step(10)), (3600, end)])[-1] == expected


def test_rows_with_next_to_nothing_in_them() -> None:
    bare: list[dict[str, Any]] = [
        {"event": "start"},
        {"event": "step", "step": 1},
        {"event": "step", "step": 2, "loss": float("nan")},
        {"event": "step"},
        {"event": "evaluate", "step": 2},
        {"event": "checkpoint"},
        {"event": "something new"},
        {"event": "end"},
    ]
    assert plain([(20, row) for row in bare])[-1] == "0:02:20 elapsed"
    assert "step 2  loss nan" in plain([(20, row) for row in bare])
    out = terminal([(20, row) for row in bare])
    assert "step 1" in out
    assert "MFU" not in out


def test_a_file_gets_no_escape_codes_even_where_colour_is_forced(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in ("FORCE_COLOR", "CLICOLOR_FORCE", "TTY_COMPATIBLE"):
        monkeypatch.setenv(name, "1")
    with Progress() as progress:
        progress(START)
        progress(step(10))
    out = capfd.readouterr().out
    assert out.startswith(PLAN + "\n8,192 tokens/s")
    assert "\x1b" not in out


# --- the terminal ---------------------------------------------------------------------------------------------


def terminal(rows: list[tuple[float, dict[str, Any]]], width: int = 100) -> str:
    """Everything that the rows write to a terminal; the panel is drawn at least once after each."""
    clock, file = Clock(), io.StringIO()
    console = Console(file=file, force_terminal=True, width=width, color_system=None, legacy_windows=False, _environ={})
    with Progress(console, clock) as progress:
        for seconds, row in rows:
            clock.now += seconds
            progress(row)
            if progress.live is not None:
                progress.live.refresh()
    return file.getvalue()


def screen(written: str) -> list[str]:
    """The lines that a terminal shows in the end: erased and overwritten ones are gone."""
    lines, row = [""], 0
    for token in re.findall(r"\x1b\[\??\d*[A-Za-z]|[^\x1b\r\n]+|\r|\n", written):
        if token == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif token == "\x1b[2K":
            lines[row] = ""
        elif token.endswith("A") and token.startswith("\x1b"):
            row -= int(token[2:-1])
        elif token[0] not in "\r\x1b":
            lines[row] += token
    return [line for line in lines if line]


def test_the_panel_shows_everything() -> None:
    out = terminal([(0, START), (5, step(10)), (5, step(20))])
    panel = out[out.rindex("╭") : out.rindex("╯")]
    assert "╭─ pocket ─" in panel
    assert "step 20 of 2,000" in panel
    assert "loss 7.9800  smoothed 7.9848  learning rate 3.00e-04  gradient norm 1.25" in panel
    assert "8,192 tokens/s  MFU 41.0%  memory 1.50 GiB" in panel
    assert "0:00:10 elapsed  0:16:30 left  done at 12:16" in panel


def test_clocks_tick_between_rows() -> None:
    clock = Clock()
    console = Console(file=io.StringIO(), force_terminal=True, width=80, _environ={})
    with Progress(console, clock) as progress:
        progress(START)
        clock.now += 5
        progress(step(10))
        clock.now += 60
        with console.capture() as captured:
            console.print(progress.panel())
    assert "0:01:05 elapsed  0:15:35 left  done at 12:16" in captured.get()


def test_the_plan_stands_above_the_panel_before_the_first_step() -> None:
    out = terminal([(0, START)])
    assert out.index(PLAN) < out.index("╭─ pocket")
    assert "measuring the rate" in out


def test_what_stays_on_the_screen() -> None:
    rows: list[tuple[float, dict[str, Any]]] = [(0, START), (5, step(10))]
    rows += [(20, step(20)), (0, {"event": "evaluate", "step": 20, "validation_loss": 5.5})]
    rows += [(0, {"event": "checkpoint", "step": 20, "path": "a/[red]:smile:"}), (20, step(30))]
    rows += [(0, {"event": "end", "step": 30, "reason": "stopped by SIGINT", "validation_loss": 5.25})]
    assert screen(terminal(rows, width=200)) == [
        PLAN,
        "8,192 tokens/s  0:16:35 left  done at 12:16",
        "step 20  validation loss 5.5000",
        "step 20  saved a/[red]:smile:",
        "stopped by SIGINT  step 30  validation loss 5.2500  0:00:45 elapsed",
    ]


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()])
def test_the_terminal_is_sane_after_an_exception(error: BaseException) -> None:
    file, streams = io.StringIO(), (sys.stdout, sys.stderr)
    progress = Progress(Console(file=file, force_terminal=True, width=80, color_system=None, _environ={}))

    def train() -> None:
        with progress:
            progress(START)
            assert file.getvalue().count("\x1b[?25l") == 1  # the cursor is hidden
            raise error

    with pytest.raises(type(error)):
        train()
    assert progress.live is None
    assert file.getvalue().rindex("\x1b[?25h") > file.getvalue().rindex("\x1b[?25l")
    assert (sys.stdout, sys.stderr) == streams
    assert not any("╭" in line for line in screen(file.getvalue()))


def test_a_terminal_that_can_do_nothing_gets_plain_lines() -> None:
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=80, _environ={"TERM": "dumb"})
    with Progress(console, Clock()) as progress:
        progress(START)
        progress(step(10))
    assert file.getvalue() == f"{PLAN}\n8,192 tokens/s  0:16:35 left  done at 12:16\n"
