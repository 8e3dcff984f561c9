# OpenAI's own 124M, wherever it can be had without a download.
from __future__ import annotations

import os
from pathlib import Path

import pytest

from gptlab import verification

HOW = (
    "the original gpt2 is not here: set GPTLAB_GPT2 to a directory with its config.json and model.safetensors,"
    " or run `gptlab verify gpt2` once with a network"
)


@pytest.fixture
def gpt2() -> Path:
    if named := os.environ.get("GPTLAB_GPT2"):
        return Path(named)  # a wrong directory fails, since someone asked for it
    hub = pytest.importorskip("huggingface_hub", reason=HOW)
    for repository in ("openai-community/gpt2", "gpt2"):
        config = hub.try_to_load_from_cache(repository, "config.json")
        weights = hub.try_to_load_from_cache(repository, "model.safetensors")
        if isinstance(config, str) and isinstance(weights, str):
            return Path(config).parent
    pytest.skip(HOW)


def test_every_check_of_the_original_passes(gpt2: Path) -> None:
    results = [check() for check in verification.checks("gpt2", gpt2)]
    assert len(results) >= 4
    assert all(result.passed for result in results), "\n".join(map(verification.line, results))
