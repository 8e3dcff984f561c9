# What a reader must refuse, and its words.
from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

import gptlab


def refusal(path: Path) -> str:
    """The sentence with which a model is refused."""
    with pytest.raises(gptlab.GptlabError) as caught:
        gptlab.load(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


class Payload:
    """Unpickling this creates a directory."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.path),))
