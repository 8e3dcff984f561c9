"""How long work says how far it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Report = Callable[[dict[str, Any]], None]
"""Called with one row of plain values at a time, whose ``event`` says what it is about."""
