"""What is drawn: that it says the right thing, and that it goes into a page without breaking it."""

from __future__ import annotations

import re
import sys
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from matplotlib.figure import Figure

from gptlab.errors import GptlabError
from gptlab.plotting import heads, lines, points, style
from gptlab.plotting.lines import Series
from gptlab.plotting.style import INK, Look, encode


def names(figure: Figure) -> dict[str, tuple[float, float]]:
    """Every label of the axes and where it stands."""
    return {text.get_text(): text.get_position() for text in figure.axes[0].texts}


def some_lines(n: int = 8) -> Figure:
    series = [Series(f"variant {i}", Look(), [1, 2, 4], [3.0, 2.0, 1.0 + i / 1000]) for i in range(n)]
    return lines.draw(series, "tokens", "loss (nats)", powers=True)


def test_looks_tell_all_cells_apart() -> None:
    kinds = [(attention, rotary) for attention in ("plain", "gqa", "swa", "both") for rotary in (False, True)]
    looks = style.looks(kinds)
    assert len(set(looks)) == 8
    assert looks[0] == Look(INK, "-", False)
    assert all(
        look.hollow is rotary and (look.stroke == "--") is rotary
        for look, (_, rotary) in zip(looks, kinds, strict=True)
    )
    assert [look.colour for look in looks[::2]] == [look.colour for look in looks[1::2]]


def test_looks_of_more_variants_than_colours() -> None:
    looks = style.looks([(i, False) for i in range(12)])
    assert len(set(looks)) == 12


def test_series_that_coincide_become_one_line_with_both_names() -> None:
    a, b, c = (Series(name, Look(), [1, 2], y) for name, y in (("a", [3, 4]), ("b", [5, 6]), ("c", [3, 4])))
    assert [(one.label, one.y) for one in lines.merged([a, b, c])] == [("a, c", (3, 4)), ("b", (5, 6))]


def test_names_at_line_ends_do_not_overlap_and_keep_the_order_of_the_ends() -> None:
    placed = names(some_lines())
    heights = [placed[f"variant {i}"][1] for i in range(8)]
    assert min(np.diff(heights)) >= 1.2 * 8.5 / (0.78 * 72 * style.HEIGHT)
    assert heights[0] >= 0
    assert heights[-1] <= 1


def test_names_of_points_do_not_overlap() -> None:
    some = [(f"p{i}", Look(), 2.0 ** (10 + i), 4.0 + 0.001 * (i % 2), None, None) for i in range(8)]
    heights = sorted(y for _, y in names(points.scatter(some, [0], "bytes", "loss")).values())
    assert min(np.diff(heights)) >= 9.9 / (0.72 * 72 * style.HEIGHT)


def test_a_band_and_the_line_at_zero_are_drawn() -> None:
    one = Series("a", Look(), [1, 2], [1.0, 2.0], [0.5, 1.5], [1.5, 2.5])
    drawn = lines.draw([one], "x", "y", zero=True).axes[0]
    assert drawn.collections[0].get_datalim(drawn.transData).intervaly.tolist() == [0.5, 2.5]
    assert any(list(line.get_ydata()) == [0, 0] for line in drawn.lines)


def test_what_covers_zero_is_hollow() -> None:
    rows = [("sure", -0.1, -0.2, -0.05), ("unsure", 0.1, -0.1, 0.3), ("alone", 0.1, None, None)]
    axes = points.intervals(rows, "nats", 2).axes[0]
    faces = [line.get_markerfacecolor() for line in axes.lines if line.get_marker() == "o"]
    assert [face == style.PAPER for face in faces] == [False, True, True]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["sure", "unsure", "alone"]


def test_a_map_shows_weights_and_nothing_where_there_are_none() -> None:
    weights = [[1.0], [0.25, 0.75], [0.0, 0.5, 0.5]]
    axes = heads.grid(weights, "key", "query", edge=2).axes[0]
    alpha = np.asarray(axes.images[0].get_array())[..., 3]
    assert np.allclose(alpha, np.sqrt([[1, 0, 0], [0.25, 0.75, 0], [0, 0.5, 0.5]]))
    # The edge of the window passes between key q - 2, hidden, and q - 1.
    assert [list(line.get_xdata()) for line in axes.lines][1] == [-0.5, 0.5]
    assert [list(line.get_ydata()) for line in axes.lines][1] == [1.5, 2.5]


def test_neighbouring_query_heads_are_wired_to_one_key_head() -> None:
    axes = heads.wiring([("GQA", 6, 2)]).axes[0]
    wires = [tuple(line.get_xdata()) for line in axes.lines if len(line.get_xdata()) == 2]
    assert wires == [(0, 1), (1, 1), (2, 1), (3, 4), (4, 4), (5, 4)]


def test_frames_enclose_the_groups() -> None:
    values = [[0.0 if i == j else 0.25 for j in range(6)] for i in range(6)]
    axes = heads.matrix(values, "head", "head", groups=2, most=0.5).axes[0]
    frames = [(min(line.get_xdata()), max(line.get_xdata())) for line in axes.lines]
    assert frames == [(-0.5, 2.5), (2.5, 5.5)]
    alpha = np.asarray(axes.images[0].get_array())[..., 3]
    assert np.allclose(alpha, 0.5 * (1 - np.eye(6)))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (512, "512"),
        (1024, "1k"),
        (16384, "16k"),
        (1500, "1.5k"),
        (2.5e6, "2.5M"),
        (1e9, "1B"),
        (-0.05, "−0.05"),
    ],
)
def test_ticks(value: float, text: str) -> None:
    assert style.short(value) == text


def test_ticks_of_bytes_and_of_differences() -> None:
    assert [style.in_unit(n) for n in (512, 2**10, 36 * 2**20, 3 * 2**30)] == ["512 B", "1 KiB", "36 MiB", "3 GiB"]
    assert [style.short(n, sign=True) for n in (-0.1, 0, 0.1)] == ["−0.1", "0", "+0.1"]


def test_ticks_of_a_logarithmic_axis_are_round_and_few() -> None:
    assert style.tens([400, 620]) == [500]
    assert style.tens([90, 2100]) == [100, 200, 500, 1000, 2000]
    assert style.tens([1, 1e6]) == [10.0**i for i in range(7)]


def test_the_same_figure_gives_the_same_bytes() -> None:
    for kind in ("svg", "png"):
        assert encode(some_lines(3), kind) == encode(some_lines(3), kind)
    assert b"<dc:date>" not in encode(some_lines(3), "svg")


def test_a_page_takes_its_drawings_colours_and_names_from_variables() -> None:
    figure = some_lines(3)
    first, second = (style.inline(encode(figure, "svg"), name, "what to see &amp; why") for name in ("one", "two"))
    assert not re.search(r"#[0-9a-fA-F]{3,8}\b", re.sub(r"(url\(|href=\")#[\w-]+", "", first))
    assert "var(--ink)" in first
    assert "<style" not in first
    assert "http" not in first
    ids = [re.findall(r'\bid="([^"]+)"', text) for text in (first, second)]
    assert len(set(ids[0] + ids[1])) == len(ids[0]) + len(ids[1])
    assert set(re.findall(r'(?:url\(|href=")#([\w-]+)', first)) <= set(ids[0])
    root = ElementTree.fromstring(first.replace("xlink:href", "href"))
    assert root.get("aria-label") == "what to see & why"


def test_labels_are_not_taken_for_formulas() -> None:
    one = Series("costs $5 and $6_x", Look(), [1, 2], [1.0, 2.0])
    assert "costs $5 and $6_x" in encode(lines.draw([one], "x", "a $title_y$"), "svg").decode()


def test_without_matplotlib_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(GptlabError, match=r"needs matplotlib; install it with: pip install 'gptlab\[report\]'"):
        some_lines()
