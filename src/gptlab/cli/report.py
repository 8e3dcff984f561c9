"""`gptlab report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="What `gptlab study --out` made.")],
    show: Annotated[bool, typer.Option("--open", help="Open the page in the browser.")] = False,
) -> None:
    """Write a study's report again from its results: report.html, report.md and the figures."""
    from gptlab.report.page import write_report

    page = write_report(directory)
    print(f"report: {page}")
    if show:
        import webbrowser

        if not webbrowser.open(page.resolve().as_uri()):
            print("there is no browser to open it with; open the file yourself")
