"""Metrics as a run writes them, and the picture: what is drawn is what the file says."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.text import Text

from gptlab.errors import GptlabError
from gptlab.training import curves
from gptlab.training.curves import Curve, Smoothed, draw, encode, read_curve, read_metrics, smooth, spread

START = {"event": "start", "step": 0, "steps": 100, "tokens_per_step": 64, "name": "pocket", "resumed_from": None}


def step(n: int, loss: float | None = None, **more: Any) -> dict[str, Any]:
    rate = 1e-3 * min(n / 20, 1)
    row = {"event": "step", "step": n, "tokens": 64 * n, "loss": 3 + 5 / n if loss is None else loss}
    return row | {"learning_rate": rate, "seconds": n / 8, "tokens_per_second": 512.0, **more}


def evaluation(n: int, loss: float) -> dict[str, Any]:
    return {"event": "evaluate", "step": n, "tokens": 64 * n, "validation_loss": loss, "seconds": n / 8}


ROWS = [START, *(step(n) for n in range(10, 60, 10)), evaluation(50, 3.3), *(step(n) for n in range(60, 110, 10))]
ROWS += [evaluation(100, 3.2), {"event": "end", "step": 100, "reason": "finished", "validation_loss": 3.2}]


def write(run: Path, rows: list[dict[str, Any]], tail: bytes = b"") -> Path:
    run.mkdir(parents=True, exist_ok=True)
    (run / "metrics.jsonl").write_bytes("".join(json.dumps(row) + "\n" for row in rows).encode() + tail)
    return run


def axes(figure: Figure) -> tuple[Axes, Axes]:
    upper, lower = figure.axes
    return upper, lower


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
        (b'{"event": "st\n', "no valid JSON"),
        (b"\n", "no valid JSON"),
        (b"\xff\n", "no valid JSON"),
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
    with pytest.raises(GptlabError, match=r"is no run: it has no metrics\.jsonl; name the directory"):
        read_metrics(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(GptlabError, match="is no run"):
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


# --- drawing --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x", "key", "size"), [("tokens", "tokens", 1), ("steps", "step", 1), ("hours", "seconds", 3600)]
)
def test_what_is_drawn_is_what_the_file_says(tmp_path: Path, x: str, key: str, size: float) -> None:
    other = [START, *(step(n, loss=4 + 3 / n, learning_rate=2e-3) for n in range(5, 45, 5)), evaluation(20, 4.5)]
    written = {"a": ROWS, "b": other}
    figure = draw([read_curve(write(tmp_path / name, rows)) for name, rows in written.items()], x, span=20)
    upper, lower = axes(figure)
    raw, main, marks = upper.lines[0::3], upper.lines[1::3], upper.lines[2::3]
    for i, rows in enumerate(written.values()):
        steps = [row for row in rows if row["event"] == "step"]
        evaluations = [row for row in rows if row["event"] == "evaluate"]
        across = np.array([row[key] for row in steps]) / size
        loss = np.array([row["loss"] for row in steps])
        averaged = smooth(np.array([float(row["step"]) for row in steps]), loss, 20)
        rates = [row["learning_rate"] for row in steps]
        np.testing.assert_array_equal(raw[i].get_xydata(), np.stack([across, loss], 1))
        np.testing.assert_array_equal(main[i].get_xydata(), np.stack([across, averaged], 1))
        np.testing.assert_array_equal(marks[i].get_xdata(), np.array([row[key] for row in evaluations]) / size)
        np.testing.assert_array_equal(marks[i].get_ydata(), [row["validation_loss"] for row in evaluations])
        np.testing.assert_array_equal(lower.lines[i].get_xydata(), np.stack([across, rates], 1))
        assert len({line.get_color() for line in (raw[i], main[i], marks[i], lower.lines[i])}) == 1
        assert raw[i].get_linewidth() < main[i].get_linewidth()
    assert raw[0].get_color() != raw[1].get_color()


def test_each_run_is_labelled_in_its_colour_outside_the_axes(tmp_path: Path) -> None:
    names = ["a", "b $x$ _", "c", "d", "e"]  # nothing in a name is mathematics
    figure = draw([read_curve(write(tmp_path / name, ROWS)) for name in names])
    upper = figure.axes[0]
    assert sorted(text.get_text() for text in upper.texts) == names
    assert not any(text.get_parse_math() for text in upper.texts)
    assert {text.get_text(): text.get_color() for text in upper.texts} == dict(
        zip(names, curves.COLOURS[:5], strict=True)
    )
    figure.draw_without_rendering()
    boxes = sorted(
        (Text.get_window_extent(text) for text in upper.texts), key=lambda box: box.y0
    )  # without the leaders
    assert all(low.y1 <= high.y0 for low, high in pairwise(boxes))
    assert all(upper.get_window_extent().x1 < box.x0 < box.x1 <= figure.bbox.x1 for box in boxes)


def test_axes_have_names_and_units(tmp_path: Path) -> None:
    curve = read_curve(write(tmp_path, ROWS))

    def names(x: str, factor: float = 1) -> tuple[str, str]:
        training = {**curve.training, x: curve.training[x] * factor}
        upper, lower = axes(draw([curve._replace(training=training)], x))
        assert (upper.get_ylabel(), lower.get_ylabel()) == ("loss (nats per token)", "learning rate")
        shown = [label for label in lower.get_xticklabels() if label.get_position()[0] <= lower.get_xlim()[1]]
        return lower.get_xlabel(), shown[-1].get_text()

    assert names("tokens") == ("training tokens (thousands)", "6")
    assert names("tokens", 0.1) == ("training tokens", "600")
    assert names("tokens", 1000) == ("training tokens (millions)", "6")
    assert names("tokens", 1e6) == ("training tokens (billions)", "6")
    assert names("steps", 20) == ("optimizer steps", "2,000")
    assert names("hours", 1000)[0] == "training time (hours)"
    assert names("hours")[0] == "training time (minutes)"


def test_one_schedule_of_all_runs_is_drawn_as_such(tmp_path: Path) -> None:
    unfinished = read_curve(write(tmp_path / "b", ROWS[:6]))
    lower = axes(draw([read_curve(write(tmp_path / "a", ROWS)), unfinished]))[1]
    assert lower.get_ylabel() == "learning rate\n(all runs)"
    assert len({line.get_color() for line in lower.lines}) == 1
    assert to_rgb(lower.lines[0].get_color()) not in [to_rgb(colour) for colour in curves.COLOURS]


def test_the_end_of_a_long_run_fills_the_picture(tmp_path: Path) -> None:
    rows = [START, *(step(n, loss=3 + 600 / n) for n in range(1, 1001))]
    low, high = axes(draw([read_curve(write(tmp_path, rows))]))[0].get_ylim()
    assert low < 3.6 < 8.5 < high < 12  # and not 603, where it began


def test_smoothing_can_be_left_out(tmp_path: Path) -> None:
    figure = draw([read_curve(write(tmp_path, ROWS))], span=0)
    upper = figure.axes[0]
    assert [len(line.get_xdata()) for line in upper.lines] == [10, 2]
    assert [text.get_text() for text in upper.get_legend().get_texts()] == ["training loss", "validation loss"]


def test_the_smoothing_that_was_chosen_is_told(tmp_path: Path) -> None:
    long = [START, *(step(n) for n in range(10, 5010, 10))]
    legend = axes(draw([read_curve(write(tmp_path, long))]))[0].get_legend()
    texts = [text.get_text() for text in legend.get_texts()]
    assert texts == ["training loss as logged", "smoothed over 100 steps"]  # and no mark where there is no evaluation


def test_runs_without_a_step_are_left_out(tmp_path: Path) -> None:
    new = read_curve(write(tmp_path / "new", [START]))
    old = read_curve(write(tmp_path / "old", ROWS))
    assert [text.get_text() for text in axes(draw([new, old]))[0].texts] == ["old"]
    with pytest.raises(GptlabError, match="no run has a measured step yet"):
        draw([new])


def test_losses_that_are_no_numbers_leave_gaps(tmp_path: Path) -> None:
    rows = [START, *(step(n, loss=math.nan if n == 30 else None) for n in range(10, 60, 10)), evaluation(50, math.inf)]
    curve = read_curve(write(tmp_path, rows))
    figure = draw([curve])
    drawn = figure.axes[0].lines[1].get_ydata()
    np.testing.assert_array_equal(np.isnan(drawn), [False, False, True, False, False])
    assert encode(figure, "png").startswith(b"\x89PNG")


def test_an_axis_that_a_run_does_not_record(tmp_path: Path) -> None:
    curve = read_curve(write(tmp_path / "a", [{"event": "step", "step": 1, "loss": 3.0}]))
    with pytest.raises(GptlabError, match="the run a does not record its hours; choose another --x"):
        draw([curve], "hours")
    assert draw([curve], "steps").axes[0].lines[1].get_ydata() == [3.0]


@pytest.mark.parametrize(("kind", "magic"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_the_same_runs_give_the_same_file(tmp_path: Path, kind: str, magic: bytes) -> None:
    curve = read_curve(write(tmp_path / "a", ROWS))
    first, second = (encode(draw([curve]), kind) for _ in range(2))
    assert first == second
    assert first.startswith(magic)
    assert first != encode(draw([curve._replace(name="b")]), kind)


def test_drawing_changes_no_global_setting(tmp_path: Path) -> None:
    import matplotlib
    import matplotlib.pyplot as plt

    before = dict(matplotlib.rcParams)
    encode(draw([read_curve(write(tmp_path, ROWS))]), "svg")
    assert dict(matplotlib.rcParams) == before
    assert plt.get_fignums() == []


def test_more_runs_than_colours(tmp_path: Path) -> None:
    curve = read_curve(write(tmp_path, ROWS))
    many: list[Curve] = [curve._replace(name=f"run {i}") for i in range(20)]
    main = axes(draw(many))[0].lines[1::3]
    assert len({(line.get_color(), line.get_linestyle()) for line in main}) == 20


def test_labels_are_moved_apart_as_little_as_possible() -> None:
    assert spread([0.1, 0.5, 0.9], 0.1) == pytest.approx([0.1, 0.5, 0.9])
    assert spread([0.5, 0.5, 0.5], 0.1) == pytest.approx([0.4, 0.5, 0.6])
    assert spread([0.2, 0.5, 0.52, 0.9], 0.1) == pytest.approx([0.2, 0.46, 0.56, 0.9])
    assert spread([-3.0, 0.01, 5.0], 0.1) == pytest.approx([0.0, 0.1, 1.0])
    assert spread([0.98, 0.99, 1.0], 0.1) == pytest.approx([0.8, 0.9, 1.0])
