# A browser for pages: Debian's Chromium, or what lies beside it.
from __future__ import annotations

import os
import shutil

import pytest

PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
NEEDED = "GPTLAB_NEEDS_CHROMIUM"
"""An environment variable: where it is set, tests fail without a browser in place of being skipped."""


def chromium() -> str:
    """Return the path of a Chromium; without one the test is skipped, or fails where it must not be."""
    program = next(filter(None, map(shutil.which, PROGRAMS)), None)
    if program is None:
        said = "there is no Chromium to open the page with; install it: apt-get install chromium"
        (pytest.fail if os.environ.get(NEEDED) else pytest.skip)(said)
    return program
