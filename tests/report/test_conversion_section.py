"""What the report says of conversions, from numbers that nobody measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers import plausible
from helpers.plausible_conversions import MADE, found

from gptlab.report import pictures_conversion as pictures
from gptlab.report.blocks import Bullets, Section, Table, to_plain
from gptlab.report.conversion import conversion
from gptlab.report.page import outline, write_report
from gptlab.report.summary import in_brief
from gptlab.report.view import read_study


def section(results: dict[str, Any]) -> Section:
    return conversion(plausible.study(results))


def sentences(part: Section) -> str:
    return " ".join(to_plain(item) for block in part.blocks if isinstance(block, Bullets) for item in block.items)


@pytest.mark.usefixtures("no_drawing")
def test_the_table_has_variants_in_the_order_of_the_file() -> None:
    table, made = (block for block in section(found()).blocks if isinstance(block, Table))
    assert [row[0] for row in table.rows] == [f"**by {name}**" for name in MADE]
    assert [column.title for column in table.columns][:4] == ["variant", "0%", "1%", "5%"]
    rows = {row[0].strip("*").removeprefix("by "): row[1:5] for row in table.rows}
    assert rows["longer"] == ["4.4000", "4.3900", "4.3800", ""]
    assert rows["mean"] == ["+0.200", "+0.060", "+0.030", "+0.024 to +0.036"]
    assert rows["svd"][2] == "(+0.00010)"  # inside the noise
    assert [row[0] for row in made.rows] == [row[0] for row in table.rows]


@pytest.mark.usefixtures("no_drawing")
def test_sentences_are_made_of_numbers() -> None:
    parts = {part.title: sentences(part) for part in section(found()).parts}
    assert list(parts) == ["Fewer key heads", "Rotary positions", "Windows", "Several changes at once"]
    heads = parts["Fewer key heads"]
    assert "by mean. Right after conversion loss 0.200 nats a token higher (95% interval +0.194 to +0.206)." in heads
    assert "After 5% loss 0.030 nats a token higher (95% interval +0.024 to +0.036): 85% of it came back." in heads
    assert "by svd. Right after conversion loss 0.010 nats a token higher" in heads
    assert "After 5% loss inside the noise, +0.00010 nats a token" in heads
    assert "Right after conversion by svd has the lowest loss of 2 ways to the same architecture." in heads
    assert "Behind it: by mean (+0.190) nats a token. It adds 5.0% of the loss that the other adds." in heads
    assert (
        "After 5% by svd has the lowest loss of 2 ways to the same architecture. Behind it: by mean (+0.030)" in heads
    )
    assert "came back" not in parts["Windows"]
    assert "ways to the same" not in parts["Rotary positions"]


@pytest.mark.usefixtures("no_drawing")
def test_one_that_was_not_trained_on_is_compared_where_it_can_be() -> None:
    results = found(("longer", "svd", "mean"))
    about = results["variants"]["mean"]["conversion"]
    for name, n in (("early", 2), ("still", 1)):
        shorter = {"label": name, "conversion": {**about, "checkpoints": about["checkpoints"][:n]}}
        results["variants"][name] = results["variants"]["mean"] | shorter
    whole = conversion(plausible.study(results))
    heads = sentences(whole.parts[0])
    assert "Right after conversion by svd has the lowest loss of 4 ways to the same architecture." in heads
    assert "After 5% by svd has the lowest loss of 2 ways to the same architecture." in heads
    assert "After 1%" not in heads.partition("After 5% by svd has")[2]
    assert "still (not trained on). Right after conversion loss 0.200 nats" in heads
    assert "early. Right after" in heads
    brief = in_brief(plausible.study(results))
    said = [item.partition(".**")[0].strip("*") for item in brief.blocks[0].items]  # type: ignore[union-attr]
    assert [name for name in said if name in ("by svd", "by mean", "early", "still (not trained on)")] == [
        "by svd", "by mean", "early",
    ]  # fmt: skip
    assert "Those with figures after 0% were then trained on" in to_plain(whole.blocks[0].text)  # type: ignore[union-attr]
    assert "It was then trained on" in to_plain(section(found()).blocks[0].text)  # type: ignore[union-attr]


@pytest.mark.usefixtures("no_drawing")
def test_without_uptraining_and_without_conversions() -> None:
    whole = section(found(("svd", "mean"), uptrained=False))
    table = next(block for block in whole.blocks if isinstance(block, Table))
    assert [column.title for column in table.columns][:2] == ["variant", "0%"]
    assert "None was trained on" in to_plain(whole.blocks[0].text)  # type: ignore[union-attr]
    assert section(plausible.results()).empty


@pytest.mark.usefixtures("no_drawing")
def test_a_failed_conversion_has_no_row(tmp_path: Path) -> None:
    results = found(("longer", "mean", "svd"))
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
    directory = plausible.write(tmp_path / "study", found(), plausible.timings(found()))
    study = read_study(directory)
    assert study.reference("mean") == "longer"
    assert study.reference("longer") == "base"
    assert study.drawn == ["base", "svd", "rope", "swa", "all"]  # mean and longer have the architecture of others
    assert study.made("mean") == "by mean"
    titles = [part.title for part in outline(study) if not part.empty]
    assert titles[:4] == ["In brief", "Summary", "Quality", "Conversion"]
    write_report(directory)
    text = (directory / "report.md").read_text(encoding="utf-8")
    assert "What was converted and trained on is compared with by longer, which saw as many tokens." in text
    assert "Variants of one architecture have one row, that of the first." in text


def test_the_curves_are_drawn(tmp_path: Path) -> None:
    drawn = pictures.curves(plausible.study(found()))
    assert [one.name for one in drawn] == [
        f"conversion-{kind}" for kind in ("heads", "positions", "windows", "several")
    ]
    axes = [one.drawing.axes[0] for one in drawn]
    lines = {line.get_label(): line for line in axes[0].lines if len(line.get_xdata()) == 3}
    assert sorted(tuple(line.get_ydata()) for line in lines.values()) == sorted([MADE["svd"][1], MADE["mean"][1]])
    assert all(tuple(line.get_xdata()) == (0.0, 1.0, 5.0) for line in lines.values())
    assert len({line.get_linestyle() for line in lines.values()}) == 2  # one architecture, two ways
    assert axes[1].get_ylim()[1] < 1.0  # the first point of abrupt leaves the picture, and the caption says so
    assert "leave the picture" in drawn[1].caption
    assert "leave the picture" not in drawn[2].caption
