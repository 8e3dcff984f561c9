from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import studies
import torch

from gptlab.study import measure
from gptlab.study.results import Peaks
from gptlab.training import loop


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small are faster on one core, much faster where the other cores are busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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
