"""The report: true sentences, no empty heading, nothing that breaks, whatever a study lacks and its texts hold."""

from __future__ import annotations

import copy
import math
import re
import subprocess
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from helpers import plausible
from helpers.browser import chromium

from gptlab.config import ModelConfig
from gptlab.errors import GptlabError
from gptlab.model import cost
from gptlab.report import page as report
from gptlab.report.blocks import Section, Table, bracketed, direction, nats, probability, span, to_html, to_plain
from gptlab.report.page import write_report
from gptlab.report.view import machine_of, read_study
from gptlab.roofline import Machine
from gptlab.study.results import Interval, Timings

Results = dict[str, Any]
LADDER: list[tuple[str, ...]] = [(), ("rope",), ("gqa",), ("swa",), ("rope", "gqa"), ("rope", "gqa", "swa")]


class Page(HTMLParser):
    """What a page holds, and whether its elements are closed in the order in which they were opened."""

    EMPTY = ("meta", "link", "input", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.outline: list[tuple[int, str]] = []  # headings by level, and (0, text) for anything else
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        results = dict(attrs)
        if results.get("id"):
            self.ids.append(str(results["id"]))
        for name in ("href", "src", "xlink:href", "action"):
            if name in results:
                self.links.append(str(results[name]))
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        before = list(self.open)
        self.handle_starttag(tag, attrs)
        self.open = before

    def handle_data(self, data: str) -> None:
        if data.strip() and not {"title", "style", "script"} & set(self.open):
            headings = [int(tag[1]) for tag in self.open if re.fullmatch("h[1-6]", tag)]
            self.outline.append((headings[0] if headings else 0, data.strip()))
            self.text += data


def check_page(path: Path) -> Page:
    """Read a page; refuse what is not well formed, looks outside, or is a heading without content."""
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == []
    assert len(set(page.ids)) == len(page.ids)
    for link in page.links:
        assert link.startswith("data:") or (link.startswith("#") and link[1:] in page.ids), link
    assert not re.search(r"(?:https?:)?//(?!www\.w3\.org/)[\w-]+\.\w", re.sub(r"//[^\n]*", "", page.text))
    assert not re.search(r"url\((?!#)|@import|\bfetch\(|XMLHttpRequest", text)
    for (level, title), (following, _) in zip(page.outline, [*page.outline[1:], (1, "")], strict=True):
        assert not level or level == 1 or not following or following > level, f"nothing below {title!r}"
    assert not re.search(r"\b(None|nan|inf|NaN|undefined)\b", page.text)
    return page


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a study that has everything, drawn."""
    results = plausible.results(LADDER)
    results["claims"] = [claim(True), claim(None)]
    timed = plausible.timings(results) | {"claims": [claim(False)]}
    directory = plausible.write(tmp_path_factory.mktemp("whole"), results, timed)
    write_report(directory)
    return directory


@pytest.fixture
def written(tmp_path: Path, no_drawing: None) -> Callable[..., tuple[Page, str]]:
    """Write a report without drawings; return its page, checked, and its Markdown."""

    def write(results: Results, timed: Results | None = None) -> tuple[Page, str]:
        directory = plausible.write(tmp_path / "study", results, timed)
        page = check_page(write_report(directory))
        return page, (directory / "report.md").read_text(encoding="utf-8")

    return write


def claim(holds: bool | None) -> dict[str, Any]:
    return {"paper": "A paper", "claim": "a < b", "ours": "0.1", "holds": holds, "note": f"noted {holds}"}


def tables(sections: list[Section]) -> Iterator[Table]:
    for section in sections:
        yield from (block for block in section.blocks if isinstance(block, Table))
        yield from tables(list(section.parts))


def test_the_page_is_whole_and_needs_nothing_else(whole: Path) -> None:
    page = check_page(whole / "report.html")
    drawn = {path.stem for path in (whole / "figures").glob("*.svg")}
    assert {i.removeprefix("figure-") for i in page.ids if re.fullmatch(r"figure-[a-z0-9-]+", i)} == drawn
    assert {path.stem for path in (whole / "figures").glob("*.png")} == drawn
    assert drawn >= {
        "loss-curves",
        "loss-differences",
        "loss-by-position",
        "cache-against-context",
        "decode-speed-batch-1",
        "decode-speed-batch-8",
        "decode-speed-against-batch",
        "prediction-batch-1",
        "attention-base",
        "attention-swa",
        "shared-heads",
        "divergence-gqa",
        "quality-against-cache",
        "copying-at-a-distance",
    }
    titles = [title for level, title in page.outline if level == 2]
    assert titles == [
        "Summary",
        "Quality",
        "Rotary positions (RoPE)",
        "Grouped-query attention (GQA)",
        "Sliding-window attention (SWA)",
        "What changes inside",
        "When does it pay?",
        "Sizes, counted",
        "Claims",
        "Samples",
        "How it was made",
    ]


def test_markdown_says_the_same(whole: Path) -> None:
    page, text = check_page(whole / "report.html"), (whole / "report.md").read_text(encoding="utf-8")
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    # The calculator and its heading are the page's alone; so are the titles in drawings.
    assert headings == [title for level, title in page.outline if level and title != "Try it"]
    linked = re.findall(r"!\[.*\]\((.*)\)", text)
    assert sorted(linked) == sorted(f"figures/{path.name}" for path in (whole / "figures").glob("*.svg"))
    said = " ".join(page.text.split())
    for item in re.findall(r"^- (.*)$", text, re.MULTILINE):
        assert (
            " ".join(to_plain(item).replace("\u00a0", " ").split()) in said.replace("\u00a0", " ")
            or ": city of" in item
        )


def test_the_same_results_give_the_same_bytes(tmp_path: Path) -> None:
    results = plausible.results([(), ("gqa",)], [0])
    for lacking in ("heads", "maps", "copy"):  # what is left draws every kind of line
        MISSING[lacking](results)
    trees = []
    for name in ("a", "b"):
        directory = plausible.write(tmp_path / name, results)
        write_report(directory)
        trees.append({str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()})
    assert trees[0] == trees[1]
    assert len(trees[0]) > 10
    assert not [name for name in trees[0] if ".partial" in name]


def test_the_calculator_works_in_a_browser(whole: Path, tmp_path: Path) -> None:
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}", "--enable-logging=stderr"]
    command = [chromium(), *flags, "--virtual-time-budget=2000", "--dump-dom", (whole / "report.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert 'data-agrees="true"' in done.stdout
    assert "CONSOLE" not in done.stderr  # where the page's errors and warnings go


def test_every_table_names_model_tokens_and_hardware(no_drawing: None) -> None:
    results = plausible.results(LADDER)
    for table in tables(report.outline(plausible.study(results, plausible.timings(results)))):
        model, trained, hardware = re.split("; ", table.setting, maxsplit=2)
        assert "GPT-2" in model
        assert "8.19M tokens trained, 3 seeds" in trained or trained == "untrained"
        assert "Some Processor, 2 threads, torch\u00a02.13.0" in hardware or "no hardware" in hardware


def test_the_summary_holds_the_results_own_figures(no_drawing: None) -> None:
    results = plausible.results(LADDER)
    timed = plausible.timings(results)
    by_title = {t.title: t for t in tables(report.outline(plausible.study(results, timed)))}
    table, counted = by_title["Variants"], {row[0]: row[1] for row in by_title["Cache of keys and values"].rows}
    assert len(table.rows) == len(LADDER)
    for row, (name, variant) in zip(table.rows, results["variants"].items(), strict=True):
        config = ModelConfig.from_dict(variant["config"])
        point = next(p for p in timed["variants"][name]["decode"] if (p["context"], p["batch"]) == (512, 8))
        assert row[1] == f"{sum(cost.parameters(config).values()):,}"
        assert counted[f"**{variant['label']}**"] == f"{cost.cache_bytes_per_token(config, 2) / 1024:.2f}\u00a0KiB"
        assert row[3] == f"{point['tokens_per_second']:,.0f}"
        assert row[5] == f"{variant['quality']['nats_per_token']:.3f}"
        gap = variant["difference"]
        assert row[6] == ("base" if gap is None else nats(Interval(**gap)))
        assert row[8] == (None if gap is None else Interval(**gap))


def test_the_four_sizes_are_gpt2s(written: Callable[..., tuple[Page, str]]) -> None:
    _, text = written(plausible.results(LADDER))
    assert "| **gpt2** | 124,439,808 | 114,990,336 | −7.6% | 36.0\u00a0MiB → 12.0\u00a0MiB |" in text
    assert "| **gpt2-xl** | 1,557,611,200 | 1,555,972,800 | −0.1% |" in text


def between(low: float | None, mean: float, high: float | None) -> dict[str, Any]:
    return {"low": low, "mean": mean, "high": high, "n": 3, "unit": "nats per token", "method": "paired over seeds"}


@pytest.mark.parametrize(
    ("interval", "words"),
    [
        (between(-0.05, -0.02, 0.01), ("(−0.020)", "−0.050 to +0.010", "within noise")),
        (between(-0.05, -0.02, -0.01), ("−0.020", "−0.050 to −0.010", "lower loss")),
        (between(0.01, 0.02, 0.05), ("+0.020", "+0.010 to +0.050", "higher loss")),
        (between(0.0, 0.0, 0.0), ("identical", "", "identical")),
        (between(1e-9, 2e-8, 4e-8), ("identical", "", "identical")),
        (between(0.0, 0.02, 0.04), ("(+0.020)", "0.000 to +0.040", "within noise")),
        (between(0.0299, 0.03, 0.0301), ("+0.03000", "+0.02990 to +0.03010", "higher loss")),
        (between(None, -0.4, None), ("−0.400", "", "no interval")),
    ],
)
def test_a_difference_in_words(interval: dict[str, Any], words: tuple[str, str, str]) -> None:
    gap = Interval(**interval)
    assert (bracketed(gap), span(gap), direction(gap)) == words


def test_effects_and_interactions_in_a_table(written: Callable[..., tuple[Page, str]]) -> None:
    results = plausible.results()
    for i, one in enumerate(results["effects"]["interactions"].values()):
        one.update(between(-0.02, -0.01, -0.005) if i == 0 else between(-0.02, 0.01, 0.03))
    text = written(results)[1]
    assert "| RoPE × GQA | −0.010 | −0.020 to −0.005 | better together |" in text
    assert "| RoPE × SWA | +0.010 | −0.020 to +0.030 | within noise |" in text
    for one in results["effects"]["interactions"].values():
        one.update(between(None, 0.01, None))
    assert "| RoPE × GQA | +0.010 | - | no interval |" in written(results)[1]


@pytest.mark.parametrize(("p", "said"), [(None, ""), (0.0, "< 0.0001"), (0.0123, "0.012"), (0.5, "0.50")])
def test_probabilities_in_two_digits(p: float | None, said: str) -> None:
    assert probability(p) == said


def older(results: Results) -> None:
    """Let a study have two ages, a count model, a search of rates, and tested claims."""
    variants = {name: one for name, one in results["variants"].items() if one["difference"]}
    effects = results["effects"]
    for one in (*effects["main"].values(), *(variant["difference"] for variant in variants.values())):
        one.update(p=0.01, adjusted=0.02)
    base = results["variants"]["base"]
    baseline = {"label": "count trigram", "definition": "counts", "tokens": 8_192_000}
    baseline["quality"] = base["quality"] | {"nats_per_token": 4.321}
    for n in (1_000_000, 8_192_000):
        age = {"tokens": n, "induction": {}, "copying": {}, "residual": None, "baseline": baseline, "effects": effects}
        age["quality"] = {name: one["quality"] for name, one in results["variants"].items()}
        results.setdefault("ages", []).append({**age, "differences": {n: v["difference"] for n, v in variants.items()}})
    results["baselines"] = [baseline]
    results["residual"] = {"deviation": 0.01, "df": 14, "by_variant": {}}
    tried = [{"learning_rate": rate, "variant": "x", "nats_per_token": 4 - rate} for rate in (0.003, 0.01)]
    results["rates"] = {"rope": [*tried, {"learning_rate": 0.02, "variant": "x", "nats_per_token": None}]}
    results["claims"] = [claim(True) | {"paper": "", "p": 0.001, "adjusted": 0.004}]


def test_ages_rates_a_count_model_and_corrected_probabilities(written: Callable[..., tuple[Page, str]]) -> None:
    results = plausible.results()
    older(results)
    text = written(results)[1]
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    gap = Interval(**results["variants"]["rope"]["difference"])
    cell = f"{bracketed(gap)} [{span(gap)}]"
    assert f"| **RoPE** | {cell} | {cell} |" in rows
    assert "| count trigram | 4.321 | 4.321 |" in rows
    assert "| count trigram, 8.19M tokens |  |  | 4.321 |  |  |" in rows
    effect = Interval(**results["effects"]["main"]["rope"])
    assert f"| RoPE | {nats(effect)} | {span(effect)} | 0.020 | {direction(effect)} |" in rows
    assert f"| RoPE | {bracketed(effect)} [{span(effect)}] | {bracketed(effect)} [{span(effect)}] |" in rows
    assert "| rope | 3.997 | **3.990** | - |" in rows
    assert r"| this study | a \< b | 0.1 | **holds** | 0.0010 | 0.0040 | noted True |" in rows
    assert "pooled over variants: 0.0100 nats per token (14 degrees of freedom)" in text
    assert "differences-by-age.svg" in text
    assert "effects-by-age.svg" in text


@pytest.mark.parametrize(("speed", "said"), [(110.0, "(1.10×)"), (120.0, "1.20×"), (90.0, "(0.90×)")])
def test_a_ratio_of_speeds_is_a_tie_where_it_is_small(speed: float, said: str, no_drawing: None) -> None:
    results = plausible.results([(), ("gqa",)])
    results["variants"]["again"] = plausible.variant((), label="again")  # the base's architecture: no ratio
    timed = plausible.timings(results)
    for name, rate in (("base", 100.0), ("gqa", speed), ("again", 102.0)):
        timed["variants"][name]["decode"] = [
            {"context": 512, "batch": 8, "milliseconds": 1.0, "tokens_per_second": rate}
        ]
    (table,) = (t for t in tables(report.outline(plausible.study(results, timed))) if t.title == "Variants")
    assert [row[4] for row in table.rows] == ["", said, ""]


def test_where_it_pays_and_where_it_does_not(written: Callable[..., tuple[Page, str]]) -> None:
    results = plausible.results(LADDER)
    text = written(results, plausible.timings(results))[1]
    rope, _, swa = (part.partition("### How it changes")[0] for part in text.split("### Where it pays, ")[1:])
    assert "×" not in rope  # nothing to compare: the same bytes and the same arithmetic
    gains = re.findall(r"^\| ([\d,]+) tokens, (.*?) \|.*\*\*([\d.]+)×\*\* \|$", swa, re.MULTILINE)
    assert [(context, batch) for context, batch, gain in gains if float(gain) < 1.15] == [
        ("128", "one sequence"), ("1,024", "one sequence"),
    ]  # fmt: skip
    assert "keys and values outweigh the weights from 6.6 sequences of 1,024 tokens." in swa
    assert "outweigh the weights from" not in rope


def without(*path: str | int, value: Any = None) -> Callable[[Results], None]:
    """Put nothing where a path leads to."""

    def change(results: Results) -> None:
        for variant in results["variants"].values():
            here: Any = variant
            for step in path[:-1]:
                here = here[step]
            here[path[-1]] = copy.copy(value)

    return change


def shipped_only(results: Results) -> None:
    results["study"].update(kind="shipped", seeds=[], tokens=0, recipe={}, made_with={})
    results["effects"] = None
    for variant in results["variants"].values():
        variant.update(source="shipped", runs=[], tokens_trained=None)


def undecided(results: Results) -> None:
    results["effects"] = None
    for variant in results["variants"].values():
        variant["difference"] = None


def no_quality(results: Results) -> None:
    for variant in results["variants"].values():
        for run in variant["runs"]:
            run.update(status="failed", error="out of memory", curve=[], validation_curve=[], validation_loss=None)
        variant.update(
            quality=None, by_position=None, copying=[], induction=None, heads=None, attention_map=None, samples=[]
        )
    undecided(results)


def single_seed(results: Results) -> None:
    for variant in results["variants"].values():
        if variant["difference"]:
            variant["difference"].update(low=None, high=None, n=1)
    results["effects"] = None


def only_the_base(results: Results) -> None:
    results["variants"] = {"base": results["variants"]["base"]}
    undecided(results)


def base_failed(results: Results) -> None:
    for run in results["variants"]["base"]["runs"]:
        run.update(status="failed", error=None, curve=[], validation_curve=[], validation_loss=None)
    results["variants"]["base"].update(quality=None, by_position=None, heads=None, attention_map=None)
    undecided(results)


MISSING: dict[str, Callable[[Results], None]] = {
    "nothing": lambda results: None,
    "quality": no_quality,
    "base": base_failed,
    "others": only_the_base,
    "shipped": shipped_only,
    "intervals": single_seed,
    "effects": lambda results: results.update(effects=None),
    "sizes": lambda results: results.update(four_sizes={}),
    "cache": without("cache", value=[]),
    "heads": without("heads"),
    "maps": without("attention_map"),
    "copy": without("copying", value=[]),
    "induction": without("induction"),
    "positions": without("by_position"),
    "samples": without("samples", value=[]),
    "curves": lambda results: [
        run.update(curve=[], validation_curve=[]) for v in results["variants"].values() for run in v["runs"]
    ],
    "flops": without("flops_per_token", value={"forward": {}, "training": 1.0}),
    "claims": lambda results: results.update(claims=[]),
}


@pytest.mark.parametrize(
    ("missing", "timed"),
    [*((missing, True) for missing in MISSING), *((missing, False) for missing in ("nothing", "quality", "cache"))],
)
def test_whatever_is_missing_the_rest_is_said(
    missing: str, timed: bool, written: Callable[..., tuple[Page, str]]
) -> None:
    results = plausible.results()
    MISSING[missing](results)
    page, text = written(results, plausible.timings(results) if timed else None)
    titles = [title for level, title in page.outline if level]
    assert ("When does it pay?" in titles) is timed
    assert ("tokens/s" in text) is timed
    assert {"How it was made", "Summary"} <= set(titles)
    gone = {"samples": "Samples", "sizes": "At GPT-2's four sizes", "others": "Rotary positions (RoPE)"}
    assert gone.get(missing) not in titles
    assert ("95%, paired over seeds" in text) is (missing not in ("quality", "base", "others"))


def test_failed_runs_are_named(written: Callable[..., tuple[Page, str]]) -> None:
    results = plausible.results(LADDER)
    results["variants"]["gqa"]["runs"][1].update(status="failed", error="killed by *hand*", validation_loss=None)
    page, text = written(results)
    assert "1 of 18 runs failed and are left out of all figures: GQA, seed 1: killed by *hand*." in page.text
    assert r"GQA, seed 1: killed by \*hand\*" in text
    no_quality(results)
    assert "18 of 18 runs failed" in written(results)[0].text


def test_timings_that_lack_peaks_or_a_variant(written: Callable[..., tuple[Page, str]]) -> None:
    results = plausible.results(LADDER)
    timed = plausible.timings(results)
    timed["peaks"]["flops"] = {"float32": 1e11}  # but timed in bfloat16
    del timed["variants"]["gqa"]
    timed["variants"]["swa"].update(training_tokens_per_second=None, training_memory_bytes=None, prefill=[], decode=[])
    page, text = written(results, timed)
    assert "calculator" not in page.ids
    assert "Measured speed and memory" in text
    assert "GPT-2 small, `n_kv_head=4`; untrained; no hardware: bytes read for a step, bfloat16" in text


def test_several_variants_of_one_change_stand_in_one_table(written: Callable[..., tuple[Page, str]]) -> None:
    results = plausible.results([(), ("gqa",)])
    single = ModelConfig.preset("pocket", n_kv_head=1)
    results["variants"]["mqa"] = plausible.variant(
        ("gqa",), label="MQA", config=single.to_dict(), difference=between(0.01, 0.05, 0.09)
    )
    _, text = written(results, plausible.timings(results))
    here = text[text.index("### What it did here") : text.index("### At GPT-2's four sizes")]
    rows = [line for line in here.splitlines() if line.startswith("| **")]
    assert [row.split("|")[1].strip() for row in rows] == [
        "**GPT-2**",
        "**GQA with 2 key/value heads for 6**",
        "**GQA with 1 key/value head for 6**",
    ]
    assert rows[2].endswith("| +0.050 | +0.010 to +0.090 |")


def test_a_change_made_only_with_others_is_taken_alone_at_gpt2s_sizes(
    written: Callable[..., tuple[Page, str]],
) -> None:
    alone, together = (written(plausible.results(cells))[1] for cells in ([(), ("gqa",)], [(), ("rope", "gqa", "swa")]))
    (row,) = (line for line in alone.splitlines() if line.startswith("| **gpt2** |"))
    assert row in together.splitlines()
    assert "This study makes the change only together with others: RoPE + GQA + SWA." in together


def test_a_base_that_has_a_change_already(written: Callable[..., tuple[Page, str]]) -> None:
    results = plausible.results([("swa",), ("rope", "swa"), ()], [0])
    results["study"]["base"] = "swa"
    for name, kinds in (("swa", []), ("rope-swa", ["rope"]), ("base", ["swa"])):
        results["variants"][name].update(kinds=kinds, difference=between(-0.1, 0.0, 0.1) if kinds else None)
    _, text = written(results, plausible.timings(results))
    assert "| **SWA with no window** |" in text
    assert text.index("| **SWA** |") < text.index("| **GPT-2** |")


def test_claims_of_both_files_with_their_verdicts(whole: Path) -> None:
    text = (whole / "report.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if "A paper" in line]
    assert [re.findall(r"\*\*(.*?)\*\*", row) for row in rows] == [["holds"], ["undecided"], ["does not hold"]]


def test_texts_stand_for_themselves(written: Callable[..., tuple[Page, str]]) -> None:
    nasty = "</script><script>alert(1)</script> **a** `b` | $c$ \"d' &amp; [e](f) \\ # <!-- ]]>"
    results = plausible.results([(), ("gqa",)])
    results["study"].update(title=nasty, question=nasty, recipe={"a": nasty}, made_with={"b": nasty})
    results["study"]["corpus"]["name"] = nasty
    results["variants"]["gqa"].update(label=nasty, samples=[{"prompt": nasty, "text": nasty}])
    results["variants"]["gqa"]["runs"][0].update(status="failed", error=nasty)
    results["claims"] = [dict.fromkeys(("paper", "claim", "ours", "note"), nasty) | {"holds": None}]
    timed = plausible.timings(results)
    timed["machine"]["processor"] = nasty
    page, text = written(results, timed)
    assert page.outline[0] == (1, nasty)
    assert page.text.count(nasty) > 8
    assert "<script>alert" not in text.replace(r"\<script\>alert", "")
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()}) == 1


def test_labels_may_hold_markup_in_drawings_too(tmp_path: Path) -> None:
    results = plausible.results([(), ("gqa",)], [0])
    for lacking in ("curves", "copy", "positions"):
        MISSING[lacking](results)
    results["variants"]["gqa"]["label"] = "<b>&\"'$x$"
    results["variants"]["../../gqa"] = results["variants"].pop("gqa")
    check_page(write_report(plausible.write(tmp_path / "study", results)))
    assert [path.name for path in tmp_path.iterdir()] == ["study"]


def test_markup_to_html() -> None:
    assert to_html("**a *b* c** `d*e*` \\*f\\* <g> \\<h\\>") == (
        "<strong>a <em>b</em> c</strong> <code>d*e*</code> *f* &lt;g&gt; &lt;h&gt;"
    )


def damage(results: Results, *path: str | int, value: Any) -> Results:
    here: Any = results
    for step in path[:-1]:
        here = here[step]
    here[path[-1]] = value
    return results


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("format",), "something", "is not a gptlab study of version 1"),
        (("version",), 2, "is not a gptlab study of version 1"),
        (("study",), None, "damaged: study: input should be an object"),
        (("study", "kind"), "new", "damaged: study.kind: input should be 'trained', 'shipped' or 'mixed'"),
        (("study", "base"), "lost", "damaged: it lacks its base 'lost'"),
        (("variants", "gqa", "cache"), {}, "damaged: variants.gqa.cache: input should be a valid array"),
        (
            ("variants", "gqa", "runs", 0, "seed"),
            True,
            r"damaged: variants.gqa.runs\[0\].seed: input should be a valid integer",
        ),
        (("variants", "gqa", "quality"), {}, "damaged: variants.gqa.quality.protocol: field required"),
        (("variants", "gqa", "config", "n_head"), 5, "n_head=5"),
        (("variants", "gqa", "difference", "low"), "-1", "variants.gqa.difference.low: input should be a valid number"),
    ],
)
def test_damaged_results_are_refused(path: tuple[str | int, ...], value: Any, message: str, tmp_path: Path) -> None:
    results = damage(plausible.results([(), ("gqa",)]), *path, value=value)
    with pytest.raises(GptlabError, match=message):
        write_report(plausible.write(tmp_path, results))
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_other_bad_input(tmp_path: Path) -> None:
    with pytest.raises(GptlabError, match=r"there is no study in .*nowhere"):
        write_report(tmp_path / "nowhere")
    with pytest.raises(GptlabError, match=r"has no results\.json"):
        write_report(tmp_path)
    (tmp_path / "results.json").write_text('{"format": "gptlab')
    with pytest.raises(GptlabError, match=r"results\.json cannot be read"):
        write_report(tmp_path)
    plausible.write(tmp_path, plausible.results([()]))
    (tmp_path / "timings.json").write_text("[]")
    with pytest.raises(GptlabError, match=r"timings\.json is not a gptlab study timings of version 1"):
        write_report(tmp_path)


def test_an_old_report_stays_where_a_new_one_cannot_be_written(tmp_path: Path, no_drawing: None) -> None:
    directory = plausible.write(tmp_path, plausible.results([(), ("gqa",)]))
    (tmp_path / "report.html").write_text("old")
    (tmp_path / "figures").write_text("no directory")
    with pytest.raises(GptlabError, match=r"cannot write to .*figures"):
        write_report(directory)
    assert (tmp_path / "report.html").read_text() == "old"


def test_a_file_of_a_study_is_read_as_it_was_written(tmp_path: Path) -> None:
    results = plausible.results([(), ("rope",), ("swa",), ("rope", "swa")])
    timed = plausible.timings(results)
    study = read_study(plausible.write(tmp_path, results, timed))
    assert study.results == plausible.study(results).results
    assert study.kinds == {
        "base": frozenset(),
        "rope": {"rope"},
        "swa": {"swa"},
        "rope-swa": {"rope", "swa"},
    }
    assert study.made("rope-swa") == "RoPE and SWA with a window of 128"
    assert math.isclose(
        study.rates("base", "decode")[128, 1], timed["variants"]["base"]["decode"][0]["tokens_per_second"]
    )


def test_the_machine_is_that_of_the_dtype_that_was_timed() -> None:
    timed = plausible.timings({"variants": {}})
    for dtype, machine in (("float32", Machine(3e10, 1e11)), ("bfloat16", Machine(3e10, 2e11)), ("int8", None)):
        assert machine_of(Timings.model_validate({**timed, "dtype": dtype})) == machine
    assert machine_of(None) is None
