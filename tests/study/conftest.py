from __future__ import annotations

from pathlib import Path

import pytest
from helpers import studies


@pytest.fixture(autouse=True)
def always_one_thread(one_thread: None) -> None:
    """Every test here has one thread."""


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return studies.text(tmp_path_factory.mktemp("corpus"))
