from __future__ import annotations

import gc
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


def pytest_make_parametrize_id(val: object) -> str | None:
    """Name bytes by their number: what a compressor writes holds the time, and workers must agree on names."""
    return f"{len(val)} bytes" if isinstance(val, bytes) else None


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real material that lies beside a checkout of the project and is not a part of it."""
    path = Path(__file__).resolve().parents[2] / "shared"
    if not path.is_dir():
        pytest.skip("../shared is absent")
    return path


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Models this small are faster on one core, much faster where the other cores are busy."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def small_disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A file system of two megabytes, or of as many as the module's ``DISK_MEGABYTES``."""
    disk = tmp_path / "disk"
    disk.mkdir()
    size = getattr(request.module, "DISK_MEGABYTES", 2)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}m", "tmpfs", str(disk)]
    try:
        done = subprocess.run(mount, capture_output=True, text=True, check=False)
    except OSError as error:
        pytest.skip(f"no mount command here: {error}")
    if done.returncode:
        pytest.skip(f"mounting a small tmpfs needs root on Linux: {done.stderr.strip()}")
    try:
        yield disk
    finally:
        gc.collect()  # the traceback of a refusal may hold a file that was open
        subprocess.run(["umount", str(disk)], check=True)


@pytest.fixture
def no_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out what takes seconds for each variant: processes of their own, and the machine's peaks."""
    from gptlab.study import measure
    from gptlab.study.results import Peaks
    from gptlab.training import loop

    monkeypatch.setattr(loop, "peak_flops", lambda device, dtype: (1e9, "not measured"))
    monkeypatch.setattr(measure, "peak_memory", lambda asked: {"training": 2000, "decoding": 1000})
    flops = {"float32": 1e11, "bfloat16": 2e11}
    peaks = Peaks(bandwidth_bytes_per_second=1e10, flops=flops, how="not measured")
    monkeypatch.setattr(measure, "peaks", lambda device: peaks)


@pytest.fixture
def no_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw nothing in reports: the tests of the text need not wait for it."""
    from gptlab.plotting import heads, lines, points
    from gptlab.report import page

    drawings = {lines: ("draw",), points: ("intervals", "scatter"), heads: ("grid", "matrix", "wiring")}
    for module, names in drawings.items():
        for name in names:
            monkeypatch.setattr(module, name, lambda *arguments, **options: None)
    monkeypatch.setattr(page, "encode", lambda figure, kind: b'<svg viewBox="0 0 9 9"></svg>')
