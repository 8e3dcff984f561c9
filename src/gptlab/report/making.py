"""The end of the report: samples of text, and how everything was made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gptlab.formatting import count, digits, listed, memory
from gptlab.report.blocks import Column, Paragraph, Section, Table, Texts, literal
from gptlab.report.view import Study


def samples(study: Study) -> Section:
    """Return what each variant writes after the same prompts."""
    prompts: dict[str, list[tuple[str, str]]] = {}
    for variant in study.variants.values():
        for sample in variant.samples:
            prompts.setdefault(sample.prompt, []).append((variant.label, sample.text))
    if not prompts:
        return Section("samples", "Samples", [])
    words = "The same prompts and the same seed for every variant; not selected."
    return Section("samples", "Samples", [Paragraph(words), Texts(list(prompts.items()))])


def making(study: Study, files: str = "`results.json` and `timings.json` beside this page") -> Section:
    """Return recipe, data, protocols and machine; ``files`` says where the results are."""
    rows = [*_data(study), *_protocols(study), *_machine(study)]
    rows += [["made with", _flat(study.about.made_with)]] if study.about.made_with else []
    table = Table("Settings", study.setting, [Column("", "text"), Column("", "text")], rows)
    return Section("making", "How it was made", [Paragraph(f"All figures come from {files}.", "note"), table])


def _data(study: Study) -> list[list[str]]:
    about, trained = study.about, study.about.kind != "shipped"
    corpus = f"{literal(about.corpus.name)}, sha256 `{literal(about.corpus.sha256[:16])}`"
    rows = [["data" if trained else "text", corpus]]
    if trained and about.tokens:
        seeds = f"seed{'s' * (len(about.seeds) > 1)} {listed([str(seed) for seed in about.seeds])}"
        rows.append(["trained", f"{count(about.tokens)} tokens per run, {seeds}"])
    rows += [["recipe", _flat(about.recipe)]] if about.recipe and trained else []
    if about.conversion:
        rows.append(["conversions", f"fitted on {literal(about.conversion.calibration)}"])
        rows += [["uptraining", _flat(about.conversion.recipe)]] if about.conversion.recipe else []
    return rows


def _protocols(study: Study) -> list[list[str]]:
    rows = []
    if q := next((v.quality for v in study.variants.values() if v.quality), None):
        size = f"{count(q.tokens)} tokens of {count(q.documents)} documents"
        rows.append(["loss", f"{literal(q.text)}, {size}; {literal(q.protocol)}"])
    if p := next((v.by_position for v in study.variants.values() if v.by_position), None):
        rows.append(["loss by position", literal(p.protocol)])
    return rows


def _machine(study: Study) -> list[list[str]]:
    if not study.timings:
        return []
    machine, peaks = study.timings.machine, study.timings.peaks
    best = [f"{digits(flops / 1e9)} GFLOP/s in {literal(dtype)}" for dtype, flops in peaks.flops.items()]
    return [
        ["machine", f"{study.machine_words}, {memory(machine.memory_bytes)} of memory; {literal(machine.date)}"],
        ["its limits", listed([f"{digits(peaks.bandwidth_bytes_per_second / 1e9)} GB/s", *best])],
        ["how the limits were measured", literal(peaks.how)],
        ["timings", literal(study.timings.how)],
    ]


def _flat(values: Mapping[str, Any], before: str = "") -> str:
    """A nested object in one line: `optimizer.name=muon`, ..."""
    parts = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            parts.append(_flat(value, f"{before}{key}."))
        elif value is not None:
            parts.append(f"{literal(before + key)}\u00a0=\u00a0{literal(value)}")
    return ", ".join(part for part in parts if part)
