"""Photograph what `gptlab explore` shows of two models' attention, for the README. It needs Chromium.

python tools/draw_explore.py docs/images/explore.png
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from playwright.sync_api import sync_playwright


def main(path: str) -> None:
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        page = Path(folder) / "page.html"
        subprocess.run([sys.executable, "-m", "gptlab", "explore", "--export", str(page)], check=True)
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        view = browser.new_page(viewport={"width": 1280, "height": 900}, color_scheme="light")
        view.goto(page.as_uri())
        view.locator("#maps canvas").last.wait_for()
        view.wait_for_timeout(2000)  # all of them are drawn
        view.locator("#maps").screenshot(path=path)
        browser.close()


if __name__ == "__main__":
    main(sys.argv[1])
