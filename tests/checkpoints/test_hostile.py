"""Damaged and hostile files in every format: each loads, or is refused in one sentence, soon and within bounds."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path

import hostile
import pytest

pytest.importorskip("gguf")


def test_a_sample(tmp_path: Path) -> None:
    with warnings.catch_warnings(action="ignore"):
        assert hostile.run(tmp_path, n=150, seed=1) == []


@pytest.mark.slow
def test_two_thousand(tmp_path: Path) -> None:
    # In a process of its own: what parses foreign bytes in C or Rust could take the tests down with it.
    command = [sys.executable, "-W", "ignore", hostile.__file__, str(tmp_path), "2000", "7"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == ""
