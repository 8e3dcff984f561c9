"""The pages of the docs say what the result files say; those of studies come out of the report's own code."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from helpers import plausible, plausible_conversions

from gptlab.errors import GptlabError
from gptlab.report.blocks import nats, span
from gptlab.study.results import Interval

TOOLS = Path(__file__).resolve().parents[2] / "tools"
if not TOOLS.is_dir():
    pytest.skip("tools/ comes with a checkout alone", allow_module_level=True)

pytestmark = pytest.mark.usefixtures("no_drawing")
PAGE = "# Results\n\n<!-- standard -->\n\n<!-- end standard -->\n\n<!-- papers -->\n\n<!-- end papers -->\n\nThe end.\n"


def tool(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(TOOLS)
    return importlib.import_module(name)


@pytest.fixture
def docs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The builder of docs at work in an empty project."""
    module = tool("build_docs", monkeypatch)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr("sys.argv", ["build_docs.py"])
    (tmp_path / "docs/results").mkdir(parents=True)
    (tmp_path / "docs/appendix").mkdir()
    (tmp_path / "README.md").write_text("# A project\n")
    (tmp_path / "docs/appendix/all.md").write_text(PAGE)
    return module


def study(directory: Path) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    """A finished study with everything that the page shows."""
    results = plausible.results()
    results["study"]["recipe"]["data"] = {"corpus": ["/somewhere/else/enwiki.txt", "pydoc"]}
    claim = {"paper": "A paper", "claim": "a [b] < c", "ours": "0.1", "holds": True, "note": 'a "note"'}
    timed = plausible.timings(results) | {"claims": [claim]}
    return plausible.write(directory / "study", results, timed), results, timed


def keep(directory: Path, docs: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    return tool("keep_results", monkeypatch).keep(directory, "standard", docs.ROOT / "docs/results")


def stale(docs: ModuleType) -> list[str]:
    docs.excerpt.cache_clear()
    return sorted(str(path.relative_to(docs.ROOT / "docs")) for path in docs.stale())


def test_the_docs_are_current(monkeypatch: pytest.MonkeyPatch) -> None:
    docs = tool("build_docs", monkeypatch)
    docs.excerpt.cache_clear()
    assert not [str(path.relative_to(docs.ROOT)) for path in docs.stale()], "run `make docs`"


def test_without_results_there_is_no_section(docs: ModuleType) -> None:
    assert stale(docs) == []
    docs.main()
    assert (docs.ROOT / "docs/appendix/all.md").read_text() == PAGE


def test_the_page_holds_the_results_own_figures(
    docs: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, results, timed = study(tmp_path)
    keep(directory, docs, monkeypatch)
    assert "appendix/all.md" in stale(docs)
    docs.main()
    assert stale(docs) == []
    page = (docs.ROOT / "docs/appendix/all.md").read_text()
    assert re.findall(r"^#+ .*", page, re.MULTILINE) == [
        "# Results",
        f"# {results['study']['title']}",
        "## Summary",
        "## Quality, and how the changes combine",
        "## Beyond the trained length",
        "## Claims",
        "## How it was made",
    ]
    assert page.startswith("# Results\n\n<!-- standard -->\n# ")
    assert page.endswith("<!-- end standard -->\n\n<!-- papers -->\n\n<!-- end papers -->\n\nThe end.\n")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("|")]
    by_name = {row[0]: row for row in reversed(rows)}  # the first table has all variants
    for name, variant in results["variants"].items():
        row = by_name[f"**{variant['label']}**"]
        assert row[1] == f"{variant['parameters']['total']:,}"
        assert f"{variant['quality']['nats_per_token']:.3f}" in row
        if name != "base":
            assert nats(Interval(**variant["difference"])) in row
    for part in ("main", "interactions"):
        for term, one in results["effects"][part].items():
            (row,) = (r for r in rows if r[0].replace(" × ", "-").lower() == term.replace(" x ", "-"))
            assert row[1] == nats(Interval(**one))
    assert "**holds**" in by_name["A paper"]
    assert f"; {timed['machine']['date']}" in by_name["machine"][1]
    assert timed["machine"]["processor"] in by_name["machine"][1]
    assert "optimizer.name\u00a0=\u00a0muon" in by_name["recipe"][1]
    assert "[standard.json](../results/standard.json) and [standard-timings.json]" in page
    for link in re.findall(r"\]\((\.\./results/.*?)\)", page):
        assert (docs.ROOT / "docs/appendix" / link).is_file()


def test_what_differs_is_found(
    docs: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    directory, *_ = study(tmp_path)
    kept, _ = keep(directory, docs, monkeypatch)
    docs.main()
    folder = docs.ROOT / "docs/results/standard"
    drawn = sorted(path.name for path in folder.iterdir())
    assert {"effects.svg", "loss-curves.svg", "loss-by-position.svg", "quality-against-cache.svg"} <= set(drawn)
    monkeypatch.setattr("sys.argv", ["build_docs.py", "--check"])
    assert docs.main() is None
    # A figure that is gone, one that nothing shows, one of other results.
    (folder / "effects.svg").unlink()
    (folder / "old.svg").write_text("<svg/>")
    (folder / "loss-curves.svg").write_text("<svg/><!-- drawn from 0123 -->\n")
    changed = [f"results/standard/{name}.svg" for name in ("effects", "loss-curves", "old")]
    assert stale(docs) == changed
    # Other results: every figure is to be drawn again.
    values = json.loads(kept.read_text())
    values["variants"]["rope"]["quality"]["nats_per_token"] += 0.01
    kept.write_text(json.dumps(values))
    assert stale(docs) == sorted(
        ["appendix/all.md", "results/standard/old.svg", *(f"results/standard/{n}" for n in drawn)]
    )
    docs.excerpt.cache_clear()
    with pytest.raises(SystemExit, match=r"^out of date: docs/appendix/all.md, .*; run `make docs`$"):
        docs.main()
    assert not (folder / "effects.svg").exists()  # a check changes nothing
    monkeypatch.setattr("sys.argv", ["build_docs.py"])
    docs.main()
    assert sorted(path.name for path in folder.iterdir()) == drawn
    assert stale(docs) == []


def test_what_is_kept_of_a_study(docs: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory, written, timed = study(tmp_path)
    results, timings = keep(directory, docs, monkeypatch)
    assert (results.name, timings.name) == ("standard.json", "standard-timings.json")
    assert json.loads(timings.read_text()) == plausible.study(written, timed).timings.model_dump(mode="json")
    expected = plausible.study(written).results.model_dump(mode="json")
    expected["study"]["recipe"]["data"]["corpus"] = ["enwiki.txt", "pydoc"]
    for variant in expected["variants"].values():
        variant["attention_map"] = None
    assert json.loads(results.read_text()) == expected
    (line,) = {line for line in results.read_text().splitlines() if '"seeds"' in line}
    assert line.strip() == '"seeds": [ 0, 1, 2 ],'


def test_lists_on_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    encode = tool("keep_results", monkeypatch).encode
    values = {"a": [[1, 2.5], [], ["x"]], "b  [1,\n 2]": '"[ \\" 1,   2 ]"', "c": [{"d": [None, True]}], "ü": ["[ "]}
    assert json.loads(encode(values)) == values
    assert b"[ 1, 2.5 ]" in encode(values)


def test_what_is_not_kept(docs: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = tool("keep_results", monkeypatch)
    directory, *_ = study(tmp_path)
    folder = docs.ROOT / "docs/results"
    with pytest.raises(GptlabError, match=r"holds the study 'standard', not 'papers'; name that one"):
        module.keep(directory, "papers", folder)
    monkeypatch.setattr(module, "MOST_BYTES", 10_000)
    with pytest.raises(GptlabError, match=r"standard.json would have .* bytes, more than 10,000"):
        module.keep(directory, "standard", folder)
    (directory / "timings.json").unlink()
    with pytest.raises(GptlabError, match=r"has no timings\.json; finish its study first: gptlab study --resume --out"):
        module.keep(directory, "standard", folder)
    assert list(folder.iterdir()) == []


def test_a_study_of_conversions_is_kept_and_shown(
    docs: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = plausible_conversions.conversion_results()
    results["study"] |= {"name": "convert", "recipe": {}}
    results["variants"]["svd"]["conversion"]["settings"] = ["distill.teacher=base"]
    directory = plausible.write(tmp_path / "study", results, plausible.timings(results))
    kept, _ = tool("keep_results", monkeypatch).keep(directory, "convert", docs.ROOT / "docs/results")
    values = json.loads(kept.read_text())
    assert {name: (one["heads"], one["samples"]) for name, one in values["variants"].items() if name != "base"} == {
        name: (None, []) for name in plausible_conversions.MADE
    }
    expected = plausible.study(results).results.variants["svd"].conversion
    assert expected is not None
    assert values["variants"]["svd"]["conversion"] == expected.model_dump(mode="json")
    page = docs.ROOT / "docs/appendix/convert.md"
    page.write_text(
        "<!-- convert -->\n\n<!-- end convert -->\n\n<!-- conversion table -->\n<!-- end conversion table -->\n"
    )
    docs.main()
    text = page.read_text()
    assert "## Conversion\n" in text
    assert "| **by mean** | +0.200 | +0.060 | +0.030 | 85% | +0.194 to +0.206 | +0.024 to +0.036 |" in text
    assert "| 2 key heads, svd, distilled | +0.010 | (0.000) |" in text
    for link in re.findall(r"\]\((\.\./results/.*?)\)", text):
        assert (page.parent / link).is_file()


@pytest.mark.parametrize(
    ("last", "said"),
    [
        ((0.2, 0.194, 0.206), "+0.200 (+0.194 to +0.206)"),
        ((0.003, -0.001, 0.007), "+0.003 (−0.001 to +0.007, within noise)"),
    ],
)
def test_the_headline_of_conversions(
    last: tuple[float, float, float], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = plausible_conversions.conversion_results()
    about = results["variants"]["all"]
    about["conversion"]["checkpoints"][-1]["difference"] |= dict(zip(("mean", "low", "high"), last, strict=True))
    about["quality"]["nats_per_token"] = results["variants"]["base"]["quality"]["nats_per_token"] + 0.19
    text = tool("conversion_tables", monkeypatch).headline(plausible.study(results).results, "all")
    assert "2 of its 6 key heads, rotary positions and a window of 128 needs 0.12 MiB of cache for 512 tokens" in text
    assert "in place of 1.50. Loss added, in nats per token: +2.200 (+2.194 to +2.206) right after" in text
    # Two upper ends are a bound of the sum: of this difference, 0.206, and of the reference's to the base, 0.006.
    assert "; +0.190 (at most +0.212) after continued training for 5% of its pre-training; " in text
    assert f"{said} against the original after as many tokens of continued training at one rate." in text


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("rope", "cache of 8,192 tokens 24.0\u00a0MiB, as without it; decoding"),
        ("gqa", "GQA with 2 key/value heads for 6, in a model of 2.66M parameters (8.19M tokens trained, 3 seeds"),
        ("swa", "cache of 8,192 tokens 384\u00a0KiB in place of 24.0\u00a0MiB; decoding"),
    ],
)
def test_what_a_change_did_stands_in_a_line(change: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tables, results = tool("study_tables", monkeypatch), plausible.results()
    study = plausible.study(results, plausible.timings(results))
    gap = study.variants[change].difference
    assert gap is not None
    line = tables.measured(change, study, tool("build_docs", monkeypatch).cards())
    assert "\n" not in line
    assert said in line
    assert f"loss {nats(gap)} nats per token ({span(gap)})" in line


def test_windows_are_drawn_where_there_are_several(monkeypatch: pytest.MonkeyPatch) -> None:
    real, record = tool("real_study", monkeypatch), SimpleNamespace

    def results(*changes: dict[str, Any]) -> Any:
        made = {
            str(i): record(conversion=record(changes=one), difference=record(mean=i / 10))
            for i, one in enumerate(changes)
        }
        return record(variants={"base": record(conversion=None, difference=None), **made})

    sinks, layers = {"window": 64, "sinks": 4}, {"window": [64, None]}
    assert real.windows(results({"window": 64}, sinks)) == {}
    assert real.windows(results({"window": 64}, sinks, {"window": 32}, {"n_kv_head": 1}, layers)) == {
        0: [(32, 0.2), (64, 0.0)],
        4: [(64, 0.1)],
    }


def test_conversions_of_several_studies_stand_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    record = SimpleNamespace  # with no more than the table asks for

    def look(share: float, mean: float, half: float = 0.004) -> Any:
        return record(share=share, difference=record(mean=mean, low=mean - half, high=mean + half))

    def results(label: str, n_head: int, half: int, added: float) -> Any:
        made = {
            "longer": ({}, [], [look(0, 0), record(share=0.05, difference=None)]),
            "some": ({"n_kv_head": half, "method": "mean"}, [], [look(0, added), look(0.05, 0.001)]),
            "best": ({"n_kv_head": half, "method": "svd"}, [], [look(0, added / 2), look(0.05, -0.02)]),
            "still": ({"n_kv_head": 1, "method": "first"}, [], [look(0, 1)]),
            "blend": (
                {"position": "blend", "rotary": "abrupt"},
                ["blend.ramp=pairs"],
                [look(0, 1e-8, 2e-8), look(0.05, 0.3)],
            ),
            "all": (
                {"n_kv_head": 1, "position": "rope", "rotary": "fit", "window": 128},
                ["distill.teacher=base"],
                [look(0, 0.2), look(0.05, 0.1)],
            ),
            "fast": ({"window": 8}, ["optimizer.attention_factor=10"], [look(0, 0.2), look(0.05, 0.1)]),
        }
        variants: dict[str, Any] = {"base": record(label=label, config=record(n_head=n_head), conversion=None)}
        for name, (changes, uptrain, looks) in made.items():
            about = record(changes=changes, settings=uptrain, checkpoints=looks)
            variants[name] = record(conversion=about)
        variants["failed"] = record(conversion=record(changes={"window": 8}, settings=[], checkpoints=[]))
        about = record(base="base", conversion=record(pretraining_tokens=8_200_000))
        return record(study=about, variants=variants)

    tables = tool("conversion_tables", monkeypatch)
    assert tables.table({}) == ""
    text = tables.table({"convert": results("small", 6, 3, 0.5), "convert-8m": results("large", 8, 4, 0.25)})
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    assert rows == [
        ["", "small, 0%", "small, 5%", "large, 0%", "large, 5%"],
        ["half of the key heads, svd", "+0.250", "−0.020", "+0.125", "−0.020"],
        ["half of the key heads, mean", "+0.500", "(+0.001)", "+0.250", "(+0.001)"],
        ["1 key head, first", "+1.000", "", "+1.000", ""],
        ["RoPE, blend", "identical", "+0.300", "identical", "+0.300"],
        ["window 8, attention faster", "+0.200", "+0.100", "+0.200", "+0.100"],
        ["all three: 1 key head, RoPE, fit, window 128, distilled", "+0.200", "+0.100", "+0.200", "+0.100"],
    ]
    assert "small 8.2 million, large 8.2 million" in text
    assert len(tables.table({"convert": results("small", 6, 3, 0.5)}).splitlines()[0].split("|")) == 5
    (row,) = (
        line
        for line in tables.table({"convert": results("small", 6, 3, 0.5)}, ["half of the key heads, mean"]).splitlines()
        if line.startswith("| half")
    )
    assert row == "| half of the key heads, mean | +0.500 [+0.496, +0.504] | (+0.001) [−0.003, +0.005] |"
