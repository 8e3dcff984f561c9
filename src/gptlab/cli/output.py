"""Standard output and error as they come: closed, piped, or unable to show every character."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

UNCUT = 10_000
"""Columns of what is not a terminal: a table in a file or a pipe is as wide as it needs to be."""


def prepare_streams() -> None:
    """Let no character stop the program: what a stream cannot show is written as an escape such as ``\\u2019``.

    A stream that was closed before the start (``>&-``) leads nowhere.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def table_console() -> Console:
    """Return a console for tables on standard output, cut to the width of a terminal only where there is one."""
    from rich.console import Console

    return Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else UNCUT)
