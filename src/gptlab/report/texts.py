"""What a report says whatever was measured."""

from __future__ import annotations

import importlib.resources
import tomllib
from functools import cache
from typing import Any


def template(name: str) -> str:
    """Return a file of ``templates/``."""
    path = importlib.resources.files("gptlab") / "report" / "templates" / name
    return path.read_text(encoding="utf-8")


@cache
def known() -> dict[str, Any]:
    """Return the words about each change, and about the prediction."""
    return tomllib.loads(template("texts.toml"))
