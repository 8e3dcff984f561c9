"""What the report says of conversions, from numbers that nobody measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers import plausible
from helpers.plausible_conversions import MADE, conversion_results

from gptlab.report.blocks import Section, Table, to_plain
from gptlab.report.conversion import conversion
from gptlab.report.page import outline, write_report
from gptlab.report.view import read_study


def section(results: dict[str, Any]) -> Section:
    return conversion(plausible.study(results))


@pytest.mark.usefixtures("no_drawing")
def test_the_table_has_variants_in_the_order_of_the_file() -> None:
    table, _, made = (block for block in section(conversion_results()).blocks if isinstance(block, Table))
    assert [row[0] for row in table.rows] == [f"**by {name}**" for name in MADE]
    assert [column.title for column in table.columns][:4] == ["variant", "0%", "1%", "5%"]
    rows = {row[0].strip("*").removeprefix("by "): row[1:7] for row in table.rows}
    assert rows["longer"] == ["4.4000", "4.3900", "4.3800", "", "", ""]
    assert rows["mean"] == ["+0.200", "+0.060", "+0.030", "85%", "+0.194 to +0.206", "+0.024 to +0.036"]
    assert rows["svd"][2] == "(+0.00010)"  # inside the noise
    assert "less those of by longer, GPT-2 after the same continued training" in table.note
    assert [row[0] for row in made.rows] == [row[0] for row in table.rows]


def ranking(whole: Section) -> list[list[str]]:
    """The rows that compare several ways to one architecture."""
    (table,) = (block for block in whole.blocks if isinstance(block, Table) and block.title.startswith("Several ways"))
    return [[to_plain(cell) for cell in row] for row in table.rows]


@pytest.mark.usefixtures("no_drawing")
def test_what_came_back_and_which_way_is_the_best() -> None:
    whole = section(conversion_results())
    table = next(block for block in whole.blocks if isinstance(block, Table))
    recovered = {row[0].strip("*").removeprefix("by "): row[4] for row in table.rows}
    assert recovered == {"longer": "", "svd": "99.0%", "mean": "85%", "rope": "95.0%", "swa": "", "all": "90.9%"}
    assert ranking(whole) == [
        ["conversion", "by svd", "by mean +0.190"],
        ["5%", "by svd", "by mean +0.030"],
    ]


@pytest.mark.usefixtures("no_drawing")
def test_a_conversion_that_changed_nothing_is_called_identical() -> None:
    results = conversion_results(("longer", "mean", "rope"))
    same = {"mean": 2e-8, "low": 1e-9, "high": 4e-8}  # what float32 leaves of a blend at its start
    results["variants"]["rope"]["conversion"]["checkpoints"][0]["difference"] |= same
    table = next(block for block in section(results).blocks if isinstance(block, Table))
    (row,) = (row for row in table.rows if row[0] == "**by rope**")
    assert (row[1], row[4], row[5]) == ("identical", "", "")


@pytest.mark.usefixtures("no_drawing")
def test_one_that_was_not_uptrained_is_compared_where_it_can_be() -> None:
    results = conversion_results(("longer", "svd", "mean"))
    about = results["variants"]["mean"]["conversion"]
    for name, n in (("early", 2), ("still", 1)):
        shorter = {"label": name, "conversion": {**about, "checkpoints": about["checkpoints"][:n]}}
        results["variants"][name] = results["variants"]["mean"] | shorter
    study = plausible.study(results)
    assert [row[:2] for row in ranking(conversion(study))] == [["conversion", "by svd"], ["5%", "by svd"]]
    labels = [row[0].strip("*") for block in conversion(study).blocks if isinstance(block, Table) for row in block.rows]
    assert "still (not uptrained)" in labels
    assert "early" in labels


@pytest.mark.usefixtures("no_drawing")
def test_without_uptraining_and_without_conversions() -> None:
    whole = section(conversion_results(("svd", "mean"), uptrained=False))
    table = next(block for block in whole.blocks if isinstance(block, Table))
    assert [column.title for column in table.columns][:2] == ["variant", "0%"]
    assert "continued training" not in table.note
    assert section(plausible.results()).empty


@pytest.mark.usefixtures("no_drawing")
def test_a_failed_conversion_has_no_row(tmp_path: Path) -> None:
    results = conversion_results(("longer", "mean", "svd"))
    failed = {"seed": 0, "status": "failed", "error": "it is singular", "key": "k", "curve": [], "validation_curve": []}
    results["variants"]["mean"] |= {"runs": [{**failed, "validation_loss": None}], "quality": None}
    results["variants"]["mean"]["conversion"] |= {"checkpoints": [], "divergence": None}
    results["variants"]["mean"]["difference"] = None
    for look in results["variants"]["svd"]["conversion"]["checkpoints"]:
        look["rivals"] = {}
    directory = plausible.write(tmp_path / "study", results)
    write_report(directory)
    text = (directory / "report.md").read_text(encoding="utf-8")
    assert "by mean, seed 0: it is singular" in text
    assert "None" not in text


@pytest.mark.usefixtures("no_drawing")
def test_the_rest_of_the_report_compares_like_with_like(tmp_path: Path) -> None:
    directory = plausible.write(tmp_path / "study", conversion_results(), plausible.timings(conversion_results()))
    study = read_study(directory)
    assert study.reference("mean") == "longer"
    assert study.reference("longer") == "base"
    assert study.drawn == ["base", "svd", "rope", "swa", "all"]  # mean and longer have the architecture of others
    assert study.made("mean") == "by mean"
    titles = [part.title for part in outline(study) if not part.empty]
    assert titles[:3] == ["Summary", "Quality", "Conversion"]
    write_report(directory)
    text = (directory / "report.md").read_text(encoding="utf-8")
    assert "Uptrained variants are compared with by longer, which saw the same number of tokens." in text
    assert "Variants of one architecture share a row, named after the best of them." in text


def test_the_curves_are_drawn(tmp_path: Path) -> None:
    drawn = conversion(plausible.study(conversion_results())).blocks[1].pictures  # type: ignore[union-attr]
    assert [one.name for one in drawn] == [
        f"conversion-{kind}" for kind in ("heads", "positions", "windows", "several")
    ]
    axes = [one.drawing.axes[0] for one in drawn]
    lines = {line.get_label(): line for line in axes[0].lines if len(line.get_xdata()) == 3}
    assert sorted(tuple(line.get_ydata()) for line in lines.values()) == sorted([MADE["svd"][1], MADE["mean"][1]])
    assert all(tuple(line.get_xdata()) == (0.0, 1.0, 5.0) for line in lines.values())
    assert len({line.get_linestyle() for line in lines.values()}) == 2  # one architecture, two ways
    assert axes[1].get_ylim()[1] < 1.0  # the first point of abrupt leaves the picture, and the caption says so
    assert "are outside the figure" in drawn[1].caption
    assert "are outside the figure" not in drawn[2].caption
