from __future__ import annotations

from pathlib import Path

import pytest
from helpers import studies

from gptlab.study import measure
from gptlab.study.results import Peaks
from gptlab.training import loop


@pytest.fixture(autouse=True)
def always_one_thread(one_thread: None) -> None:
    """Every test here has one thread."""


@pytest.fixture
def no_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out what takes seconds for each variant: processes of their own, and the machine's peaks."""
    monkeypatch.setattr(loop, "peak_flops", lambda device, dtype: (1e9, "not measured"))
    monkeypatch.setattr(measure, "peak_memory", lambda asked: {"training": 2000, "decoding": 1000})
    flops = {"float32": 1e11, "bfloat16": 2e11}
    peaks = Peaks(bandwidth_bytes_per_second=1e10, flops=flops, how="not measured")
    monkeypatch.setattr(measure, "peaks", lambda device: peaks)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return studies.text(tmp_path_factory.mktemp("corpus"))
