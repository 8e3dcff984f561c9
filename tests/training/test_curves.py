"""Metrics as a run writes them, and their smoothing."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from helpers.metrics import ROWS, START, step, write

from gptlab.errors import GptlabError
from gptlab.training.curves import Smoothed, read_curve, read_metrics, smooth

# --- reading --------------------------------------------------------------------------------------------------


def test_rows_come_back_as_they_were_written(tmp_path: Path) -> None:
    assert read_metrics(write(tmp_path, ROWS)) == ROWS


@pytest.mark.parametrize(
    "tail", [b'{"event": "st', b'{"event": "step", "step": 110, "loss": 3.\xc3', b"\0\0\0\n", b"{"]
)
def test_a_last_line_that_is_being_written_is_left_out(tmp_path: Path, tail: bytes) -> None:
    assert read_metrics(write(tmp_path, ROWS, tail)) == ROWS


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"event": "st\n', "not valid JSON"),
        (b"\n", "not valid JSON"),
        (b"\xff\n", "not valid JSON"),
        (b"[1]\n", "no object with 'event' and 'step'"),
        (b'{"step": 3}\n', "no object with 'event' and 'step'"),
        (b'{"event": "step", "step": "3"}\n', "no object with 'event' and 'step'"),
    ],
)
def test_a_damaged_line_before_the_last_is_named(tmp_path: Path, line: bytes, reason: str) -> None:
    write(tmp_path, ROWS[:3], line + json.dumps(ROWS[4]).encode())
    with pytest.raises(GptlabError) as caught:
        read_metrics(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / 'metrics.jsonl'} is damaged in line 4 ({reason})")


@pytest.mark.parametrize("content", [b"", b'{"event": "sta'])
def test_no_row_yet(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(content)
    with pytest.raises(GptlabError, match="has no row yet"):
        read_metrics(tmp_path)


def test_no_run(tmp_path: Path) -> None:
    with pytest.raises(GptlabError, match=r"is not a run: it has no metrics\.jsonl; name the directory"):
        read_metrics(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(GptlabError, match="is not a run"):
        read_metrics(tmp_path / "file")
    run = write(tmp_path / "a", ROWS)
    with pytest.raises(GptlabError, match="name one, as") as caught:
        read_metrics(tmp_path)
    assert str(run) in str(caught.value)
    (tmp_path / "b" / "metrics.jsonl").mkdir(parents=True)
    with pytest.raises(GptlabError, match="cannot be read: Is a directory"):
        read_metrics(tmp_path / "b")


def test_a_curve_has_a_column_per_figure(tmp_path: Path) -> None:
    curve = read_curve(write(tmp_path / "a", ROWS))
    steps = [row for row in ROWS if row["event"] == "step"]
    assert (curve.name, curve.planned) == ("a", 100)
    for column, key in (("steps", "step"), ("tokens", "tokens"), ("loss", "loss"), ("learning_rate", "learning_rate")):
        np.testing.assert_array_equal(curve.training[column], [row[key] for row in steps])
    np.testing.assert_array_equal(curve.training["hours"] * 3600, [row["seconds"] for row in steps])
    np.testing.assert_array_equal(curve.validation["loss"], [3.3, 3.2])
    np.testing.assert_array_equal(curve.validation["tokens"], [3200, 6400])


def test_a_distilled_run_is_drawn_by_its_cross_entropy(tmp_path: Path) -> None:
    rows = [{"event": "step", "step": 1, "loss": 2.0, "cross_entropy": 5.0}, {"event": "step", "step": 2, "loss": 4.5}]
    run = tmp_path / "taught"
    run.mkdir()
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_curve(run).training["loss"].tolist() == [5.0, 4.5]


def test_absent_figures_are_nan_and_tokens_follow_from_steps(tmp_path: Path) -> None:
    bare = [START, {"event": "step", "step": 10, "loss": 5.0}, {"event": "step", "step": 20, "loss": None}]
    training = read_curve(write(tmp_path, bare)).training
    np.testing.assert_array_equal(training["tokens"], [640, 1280])
    np.testing.assert_array_equal(training["loss"], [5.0, math.nan])
    assert np.isnan(training["hours"]).all()
    assert np.isnan(read_curve(write(tmp_path, bare[1:])).training["tokens"]).all()


@pytest.mark.parametrize("clock", ["goes on", "begins again"])
def test_hours_go_on_in_a_resumed_run(tmp_path: Path, clock: str) -> None:
    before = 0 if clock == "begins again" else 20
    first = [START, *(step(n, seconds=n) for n in (10, 20))]
    second = [{**START, "step": 20, "resumed_from": 20}, *(step(n, seconds=n - 20 + before) for n in (30, 40))]
    third = [{**START, "step": 40, "resumed_from": 40}, *(step(n, seconds=n - 40 + 2 * before) for n in (50, 60))]
    hours = read_curve(write(tmp_path, first + second + third)).training["hours"]
    np.testing.assert_allclose(hours * 3600, [10, 20, 30, 40, 50, 60])


# --- smoothing ------------------------------------------------------------------------------------------------


def test_the_running_average_is_bias_corrected() -> None:
    average, keep = Smoothed(span=20), math.exp(-10 / 20)
    total = 0.0
    for i, value in enumerate([8.0, 7.0, 5.0, 6.0]):  # Adam's recipe: decay from zero, divide by 1 - keep^n
        total = keep * total + (1 - keep) * value
        assert average.update(10 * (i + 1), value) == pytest.approx(total / (1 - keep ** (i + 1)), rel=1e-12)
    assert average.update(50, math.inf) == average.update(60, math.nan) == pytest.approx(total / (1 - keep**4))


def test_smoothing_is_a_weighted_mean_of_both_sides() -> None:
    draw_from = np.random.default_rng(0)
    steps = np.cumsum(draw_from.integers(1, 20, 50)).astype(float)
    values = draw_from.normal(size=50)
    values[[0, 7, 49]] = math.nan, math.inf, math.nan
    known = np.isfinite(values)
    weights = np.exp(-abs(steps[:, None] - steps[known]) / 30)
    expected = np.where(known, weights @ values[known] / weights.sum(1), math.nan)
    np.testing.assert_allclose(smooth(steps, values, 30), expected, rtol=1e-12)
    np.testing.assert_allclose(smooth(steps, np.full(50, 2.5), 30), np.full(50, 2.5), rtol=1e-12)
