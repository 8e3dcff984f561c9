"""The report of a study: one page that needs nothing else, the same as Markdown, and the figures as files."""

from __future__ import annotations

import html
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from gptlab.checkpoints.files import write_files
from gptlab.errors import GptlabError
from gptlab.plotting import style
from gptlab.plotting.style import encode
from gptlab.report.blocks import Calculator, Picture, Pictures, Section, Table, literal, to_html, to_plain
from gptlab.report.changes import changes
from gptlab.report.conversion import conversion
from gptlab.report.counts import counts
from gptlab.report.end import claims, making, race, samples
from gptlab.report.operation import beyond, operation
from gptlab.report.speed import speed
from gptlab.report.summary import in_brief, quality, summary
from gptlab.report.texts import template as template_of
from gptlab.report.view import Study, read_study

HTML, MARKDOWN, FIGURES = "report.html", "report.md", "figures"


def write_report(directory: Path) -> Path:
    """Write the report of a study beside its results: the page, Markdown, and each figure as SVG and PNG.

    The same results give the same bytes. A file is replaced whole or not at all; the page comes last.

    Args:
        directory: of the study, with `results.json` and perhaps `timings.json`.

    Returns:
        The path of the page.

    Raises:
        GptlabError: no results, damaged ones or those of another version, matplotlib or jinja2 missing, or a directory
            that cannot be written.
    """
    study = read_study(directory)
    sections = [section for section in outline(study) if not section.empty]
    drawn = draw(sections, ("svg", "png"))
    inline = {
        picture.name: style.inline(
            drawn[f"{picture.name}.svg"], picture.name, html.escape(to_plain(picture.caption), quote=True)
        )
        for picture in _pictures(sections)
    }
    page, text = (render(name, study, sections, inline) for name in ("report.html.j2", "report.md.j2"))
    if drawn:
        write_files(directory / FIGURES, drawn)
    write_files(directory, {MARKDOWN: text.encode(), HTML: page.encode()})
    return directory / HTML


def outline(study: Study) -> list[Section]:
    """Return all sections that a report may have, those without content included."""
    return [
        in_brief(study),
        summary(study),
        quality(study),
        conversion(study),
        *changes(study),
        operation(study),
        speed(study),
        counts(study),
        race(study),
        claims(study),
        samples(study),
        making(study),
    ]


def excerpt(study: Study, files: str) -> list[Section]:
    """Return what a page of the docs takes of a report: what was found, and how.

    Args:
        study: what it is about.
        files: where its results lie, in words.
    """
    found = [in_brief(study), summary(study), quality(study), conversion(study), beyond(study), claims(study)]
    found.append(making(study, files))
    return [section for section in found if not section.empty]


def draw(sections: Sequence[Section], kinds: Sequence[str]) -> dict[str, bytes]:
    """Return the figures of sections as files of these kinds, by name."""
    return {
        f"{picture.name}.{kind}": encode(picture.drawing, kind) for picture in _pictures(sections) for kind in kinds
    }


def render(
    template: str,
    study: Study,
    sections: Sequence[Section],
    drawings: dict[str, str],
    *,
    level: int = 1,
    folder: str = FIGURES,
) -> str:
    """Return the page or the Markdown.

    Args:
        template: a name under ``templates/``.
        study: what it is about.
        sections: what it says, none of them empty.
        drawings: the figures as they stand in the page, by name.
        level: of the highest heading in Markdown.
        folder: of the figures in Markdown.
    """
    try:
        import jinja2
        import markupsafe
    except ImportError:
        raise GptlabError("a report needs matplotlib and jinja2; install them: pip install 'gptlab[report]'") from None
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(template_of),
        autoescape=template.endswith(".html.j2"),
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
    )
    environment.filters.update(
        kind=lambda block: type(block).__name__,
        markup=lambda text: markupsafe.Markup(to_html(text)),
        plain=to_plain,
        literal=literal,
        rows=_markdown_rows,
        # Inside a script element nothing is escaped, but its end must not appear.
        json=lambda data: markupsafe.Markup(json.dumps(data).replace("<", "\\u003c")),
    )
    values = {
        "title": study.about.title,
        "question": study.about.question,
        "setting": study.setting,
        "sections": sections,
        "drawings": drawings,
        "level": level,
        "folder": folder,
        "style": markupsafe.Markup(template_of("style.css")),
        "script": markupsafe.Markup(template_of("roofline.js") + template_of("calculator.js")),
        "calculates": any(isinstance(block, Calculator) for block in _blocks(sections)),
    }
    return environment.get_template(template).render(values)


def _blocks(sections: Sequence[Section]) -> Iterator[Any]:
    for section in sections:
        yield from section.blocks
        yield from _blocks(section.parts)


def _pictures(sections: Sequence[Section]) -> Iterator[Picture]:
    for block in _blocks(sections):
        if isinstance(block, Pictures):
            yield from block.pictures


def _markdown_rows(table: Table) -> str:
    """A table in Markdown, without the columns of drawn intervals."""
    shown = [i for i, column in enumerate(table.columns) if column.kind != "range"]
    lines = [
        "| " + " | ".join(table.columns[i].title for i in shown) + " |",
        "|" + "|".join("---:" if table.columns[i].kind == "number" else "---" for i in shown) + "|",
    ]
    lines += ["| " + " | ".join(str(row[i]) for i in shown) + " |" for row in table.rows]
    return "\n".join(lines)
