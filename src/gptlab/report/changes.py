"""One section for each change: what it is, what it did here, pitfalls and what improves it."""

from __future__ import annotations

from gptlab.formatting import listed
from gptlab.report.blocks import Block, Bullets, Formula, Paragraph, Section
from gptlab.report.sizes import at_four_sizes, where_it_pays
from gptlab.report.summary import variants_table
from gptlab.report.texts import known
from gptlab.report.view import NAMES, Study


def changes(study: Study) -> list[Section]:
    """Return the sections of all changes that the study makes."""
    return [_change(study, change) for change in NAMES if study.with_change(change)]


def _change(study: Study, change: str) -> Section:
    text = known()[change]
    parts = [
        Section(f"{change}-here", "What it did here", _here(study, change)),
        Section(f"{change}-sizes", "At GPT-2's four sizes", at_four_sizes(study, change)),
        Section(f"{change}-pays", "Where it pays, and where it does not", where_it_pays(study, change)),
        Section(f"{change}-operation", "How it changes the operation", [Paragraph(text["operation"])]),
        Section(f"{change}-pitfalls", "Pitfalls", [Bullets(text["pitfalls"])]),
        Section(f"{change}-improvements", "What improves it", [Bullets(text["improvements"])]),
    ]
    blocks: list[Block] = [
        Paragraph(text["what"]),
        Formula(text["tex"], text["mathml"]),
        Paragraph(f"{text['where']} {text['source']}.", "note"),
    ]
    return Section(change, text["title"], blocks, [part for part in parts if not part.empty])


def _here(study: Study, change: str) -> list[Block]:
    """The variants that make this change alone, beside the base."""
    alone = study.alone(change)
    if not alone:
        together = listed([study.label(name) for name in study.with_change(change)])
        return [Paragraph(f"This study makes the change only together with others: {together}. See the summary.")]
    titles = {study.base_name: study.label(study.base_name)} | {name: study.made(name) for name in alone}
    return [variants_table(study, "", list(titles), titles)]
