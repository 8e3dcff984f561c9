"""The picture of runs: what is drawn is what the file says."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from helpers.metrics import ROWS, START, evaluation, step, write
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.text import Text

from gptlab.errors import GptlabError
from gptlab.plotting import style
from gptlab.plotting.curves import draw
from gptlab.plotting.style import encode, spread
from gptlab.training.curves import Curve, read_curve, smooth


def axes(figure: Figure) -> tuple[Axes, Axes]:
    upper, lower = figure.axes
    return upper, lower


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
        zip(names, style.COLOURS[:5], strict=True)
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
    assert to_rgb(lower.lines[0].get_color()) not in [to_rgb(colour) for colour in style.COLOURS]


@pytest.mark.parametrize("length", [5, 16, 60, 200])
def test_a_long_name_leaves_the_plot_its_room(tmp_path: Path, length: int) -> None:
    drawing = draw([read_curve(write(tmp_path, [START, *(step(n) for n in range(10, 60, 10))]), "W" * length)])
    drawing.draw_without_rendering()
    upper = axes(drawing)[0]
    assert upper.get_position().width * drawing.get_figwidth() > 4  # inches
    assert all(text.get_window_extent().x1 <= drawing.bbox.x1 for text in upper.texts)


def test_the_end_of_a_long_run_fills_the_picture(tmp_path: Path) -> None:
    rows = [START, *(step(n, loss=3 + 600 / n) for n in range(1, 1001))]
    low, high = axes(draw([read_curve(write(tmp_path, rows))]))[0].get_ylim()
    assert low < 3.6 < 8.5 < high < 12  # and not 603, where it began


def test_smoothing_can_be_left_out(tmp_path: Path) -> None:
    figure = draw([read_curve(write(tmp_path, ROWS))], span=0)
    upper = figure.axes[0]
    assert [len(line.get_xdata()) for line in upper.lines] == [10, 2, 2]  # the last leads to the name
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
