from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from gptlab.text.tokenizers import GPT2Tokenizer


@pytest.fixture(scope="session")
def gpt2_tokenizer() -> GPT2Tokenizer:
    return GPT2Tokenizer()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of two megabytes."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)]
    try:
        done = subprocess.run(mount, capture_output=True, text=True, check=False)
    except OSError as error:
        pytest.skip(f"no mount command here: {error}")
    if done.returncode:
        pytest.skip(f"mounting a small tmpfs needs root on Linux: {done.stderr.strip()}")
    try:
        yield disk
    finally:
        subprocess.run(["umount", str(disk)], check=True)
