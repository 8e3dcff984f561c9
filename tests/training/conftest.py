from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.trainings import RECIPE, Commands, make_dataset, sentences, serve

from gptlab.text.shards import Dataset
from gptlab.training import loop


@pytest.fixture(autouse=True)
def always_one_thread(one_thread: None) -> None:
    """Every test here has one thread."""


@pytest.fixture(autouse=True, scope="module")
def no_measuring() -> Iterator[None]:
    """What the machine could do at best takes a second to measure, and nothing here depends on it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "peak_flops", lambda device, dtype: (1e9, "not measured"))
        yield


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Sixty documents of the small grammar, in bytes: about 700 windows of 32 tokens to train on."""
    texts = [sentences(8 + i % 20, seed=i) for i in range(60)]
    return make_dataset(tmp_path_factory.mktemp("grammar") / "data", texts)


@pytest.fixture(scope="session")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small recipe as a file, for the command line."""
    path = tmp_path_factory.mktemp("recipes") / "small.toml"
    path.write_text(RECIPE)
    return path


@pytest.fixture(scope="session")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    """`gptlab` in processes of its own."""
    if sys.platform != "linux":
        pytest.skip("forks a process that has torch loaded")
    with serve(tmp_path_factory.mktemp("output")) as server:
        yield server
