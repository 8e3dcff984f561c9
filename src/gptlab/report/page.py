"""The report of a study: one page that needs nothing else, the same as Markdown, and the figures as files."""

from __future__ import annotations

import html
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gptlab.checkpoints.files import write_files
from gptlab.errors import GptlabError
from gptlab.plotting.style import encode, inline
from gptlab.report.blocks import REQUIRED, Block, Calculator, Picture, Pictures, Section, literal, to_html, to_plain
from gptlab.report.changes import changes
from gptlab.report.claims import claims
from gptlab.report.conversion import conversion
from gptlab.report.counts import counts
from gptlab.report.making import making, samples
from gptlab.report.operation import beyond, operation
from gptlab.report.quality import quality
from gptlab.report.speed import speed
from gptlab.report.summary import summary
from gptlab.report.texts import template as template_of
from gptlab.report.view import Study, read_study

if TYPE_CHECKING:
    import jinja2

HTML, MARKDOWN, FIGURES = "report.html", "report.md", "figures"


def write_report(directory: Path) -> Path:
    """Write the report of a study beside its results: the page, Markdown, and each figure as SVG and PNG.

    The same results give the same bytes. A file is replaced whole or not at all; the page comes last.

    Args:
        directory: of the study, with `results.json` and perhaps `timings.json`.

    Returns:
        The path of the page.

    Raises:
        GptlabError: no results, damaged ones or those of another version, a library missing, or a directory that cannot
            be written.
    """
    study = read_study(directory)
    sections = [section for section in outline(study) if not section.empty]
    drawn = draw(sections, ("svg", "png"))
    in_page = {
        picture.name: inline(
            drawn[f"{picture.name}.svg"], picture.name, html.escape(to_plain(picture.caption), quote=True)
        )
        for picture in _pictures(sections)
    }
    page, text = (render(name, study, sections, in_page) for name in ("report.html.j2", "report.md.j2"))
    if drawn:
        write_files(directory / FIGURES, drawn)
    write_files(directory, {MARKDOWN: text.encode(), HTML: page.encode()})
    return directory / HTML


def outline(study: Study) -> list[Section]:
    """Return all sections that a report may have, those without content included."""
    return [
        summary(study),
        quality(study),
        conversion(study),
        *changes(study),
        operation(study),
        speed(study),
        counts(study),
        claims(study),
        samples(study),
        making(study),
    ]


def excerpt(study: Study, files: str) -> list[Section]:
    """Return what a page of the docs takes of a report.

    Args:
        study: what it is about.
        files: where its results lie, in words.
    """
    sections = [summary(study), quality(study), conversion(study), beyond(study), claims(study)]
    return [section for section in (*sections, making(study, files)) if not section.empty]


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
    values = {
        "title": study.about.title,
        "question": study.about.question,
        "setting": study.setting,
        "sections": sections,
        "drawings": drawings,
        "level": level,
        "folder": folder,
        "calculates": any(isinstance(block, Calculator) for block in _blocks(sections)),
    }
    return _environment(template.endswith(".html.j2")).get_template(template).render(values)


def _environment(escaped: bool) -> jinja2.Environment:
    try:
        import jinja2
        from markupsafe import Markup
    except ImportError:
        raise GptlabError(REQUIRED) from None
    loader = jinja2.FunctionLoader(template_of)
    environment = jinja2.Environment(
        loader=loader, autoescape=escaped, undefined=jinja2.StrictUndefined, keep_trailing_newline=True
    )
    environment.filters.update(
        kind=lambda block: type(block).__name__,
        markup=lambda text: Markup(to_html(text)),
        plain=to_plain,
        literal=literal,
        # Inside a script element nothing is escaped, but its end must not appear.
        json=lambda data: Markup(json.dumps(data).replace("<", "\\u003c")),
    )
    environment.globals["style"] = Markup(template_of("style.css"))
    environment.globals["script"] = Markup(template_of("roofline.js") + template_of("calculator.js"))
    return environment


def _blocks(sections: Sequence[Section]) -> Iterator[Block]:
    for section in sections:
        yield from section.blocks
        yield from _blocks(section.parts)


def _pictures(sections: Sequence[Section]) -> Iterator[Picture]:
    for block in _blocks(sections):
        if isinstance(block, Pictures):
            yield from block.pictures
