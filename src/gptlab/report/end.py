"""The end of the report: the race, the papers' claims, samples, and how everything was made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gptlab.formatting import count, digits, listed, memory, millions
from gptlab.report import pictures as pictures
from gptlab.report.blocks import Block, Column, Paragraph, Pictures, Section, Table, Texts, literal
from gptlab.report.view import Study

VERDICTS = {True: "holds", False: "does not hold", None: "cannot be told"}


def race(study: Study) -> Section:
    """The short training that was run while the study was made."""
    found = study.results.race
    if not found:
        return Section("race", "A race", [])
    rows, failed = [], []
    for racer in found.variants.values():
        run, label = racer.run, literal(racer.label)
        if run.status == "failed":
            failed.append(f"{label}: {literal(run['error'] or 'no reason was recorded')}")
        loss = run.validation_loss
        rows.append([f"**{label}**", count(racer.parameters), "-" if loss is None else f"{loss:.3f}"])
    setting = (
        f"{millions(found['tokens'])} tokens of {literal(found['corpus']['name'])}, one seed; {study.machine_words}"
    )
    columns = [Column("model", "text"), Column("parameters"), Column("validation loss")]
    said = literal(found.label)
    blocks: list[Block] = [Paragraph(f"{said[:1].upper()}{said[1:]}.")]
    blocks += [Paragraph(f"**Failed:** {'; '.join(failed)}.", "warning")] if failed else []
    drawn = pictures.race(study)
    blocks += [
        Table("The race", setting, columns, rows, "Loss in nats a token."),
        *([Pictures(drawn)] if drawn else []),
    ]
    return Section("race", "A race", blocks)


def claim_words(study: Study) -> str:
    """How many claims hold, in words."""
    held = [sum(one.holds is verdict for one in study.claims) for verdict in VERDICTS]
    said = f"Of {len(study.claims)} claims of papers that were looked at, {held[0]} hold{'s' * (held[0] == 1)}"
    return f"{said} at this size, {held[1]} do{'es' * (held[1] == 1)} not, and of {held[2]} this study cannot tell"


def claims(study: Study) -> Section:
    """What papers say, and what was obtained here."""
    rows = [
        [
            *(literal(one[key]) for key in ("paper", "claim", "ours")),
            f"**{VERDICTS[one['holds']]}**",
            literal(one.note),
        ]
        for one in study.claims
    ]
    if not rows:
        return Section("claims", "Claims of the papers", [])
    titles = ("paper", "claim", "obtained here", "verdict", "note")
    table = Table("Claims", study.setting, [Column(title, "text") for title in titles], rows)
    return Section("claims", "Claims of the papers", [Paragraph(f"{claim_words(study)}."), table])


def samples(study: Study) -> Section:
    """What each variant writes after the same prompts."""
    prompts: dict[str, list[tuple[str, str]]] = {}
    for variant in study.variants.values():
        for sample in variant.samples:
            prompts.setdefault(sample.prompt, []).append((variant.label, sample.text))
    if not prompts:
        return Section("samples", "Samples", [])
    said = "The same prompts and the same seed for every variant, not chosen."
    return Section("samples", "Samples", [Paragraph(said), Texts(list(prompts.items()))])


def making(study: Study, files: str = "`results.json` and `timings.json` beside this page") -> Section:
    """Recipe, data, protocols and machine; ``files`` says where everything was written from."""
    about = study.about
    shipped = about.kind == "shipped"
    rows = [
        [
            "text" if shipped else "data",
            f"{literal(about['corpus']['name'])}, sha256 `{literal(about['corpus']['sha256'][:16])}`",
        ]
    ]
    if not shipped and about.tokens:
        rows.append(
            ["trained", f"{count(about['tokens'])} tokens a run, seed{'s' * (len(about['seeds']) > 1)} {_seeds(study)}"]
        )
    rows += [["recipe", _flat(about.recipe)]] if about.recipe and not shipped else []
    if converted := about.conversion:
        rows.append(["conversions", f"fitted on {literal(converted['calibration'])}"])
        rows += [["uptraining", _flat(converted.recipe)]] if converted.recipe else []
    qualities = [v.quality for v in study.variants.values() if v.quality]
    if qualities:
        q = qualities[0]
        words = f"{literal(q['text'])}, {count(q['tokens'])} tokens of {count(q['documents'])} documents"
        rows.append(["loss", f"{words}; {literal(q['protocol'])}"])
    positions = [v.by_position.protocol for v in study.variants.values() if v.by_position]
    rows += [["loss by position", literal(positions[0])]] if positions else []
    if study.timings:
        m, peaks = study.timings.machine, study.timings.peaks
        rows.append(["machine", f"{study.machine_words}, {memory(m['memory_bytes'])} of memory; {literal(m['date'])}"])
        best = [f"{digits(flops / 1e9)} GFLOP/s in {literal(dtype)}" for dtype, flops in peaks.flops.items()]
        rows.append(["its limits", listed([f"{digits(peaks['bandwidth_bytes_per_second'] / 1e9)} GB/s", *best])])
        rows.append(["how these were found", literal(peaks.how)])
        rows.append(["timings", literal(study.timings.how)])
    rows += [["made with", _flat(about.made_with)]] if about.made_with else []
    table = Table("Settings", study.setting, [Column("", "text"), Column("", "text")], rows)
    said = f"Everything here was written from {files}."
    return Section("making", "How it was made", [Paragraph(said, "note"), table])


def _seeds(study: Study) -> str:
    return listed([str(seed) for seed in study.about.seeds])


def _flat(values: Mapping[str, Any], before: str = "") -> str:
    """A nested object in one line: `optimizer.name=muon`, ..."""
    parts = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            parts.append(_flat(value, f"{before}{key}."))
        elif value is not None:
            parts.append(f"{literal(before + key)}\u00a0=\u00a0{literal(value)}")
    return ", ".join(part for part in parts if part)
