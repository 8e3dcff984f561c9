"""Numbers and sizes in words."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

MINUS, TIMES, NBSP = "\u2212", "\u00d7", "\u00a0"
UNITS = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10))


def readable(name: str) -> str:
    """The name of a file as text: it need not be Unicode, and Python keeps such bytes as lone surrogates."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return os.fsencode(name).decode(errors="backslashreplace")
    return name


def count(n: float) -> str:
    """A whole number with separators."""
    return f"{n:,.0f}".replace("-", MINUS)


def millions(n: float) -> str:
    """A number of parameters or tokens in three digits: 2.66M."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(n) >= size:
            return f"{digits(n / size)}{letter}"
    return count(n)


def digits(value: float, n: int = 3) -> str:
    """A number in ``n`` significant digits, never in powers of ten."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else "-"
    places = max(0, n - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{min(places, 6)}f}".replace("-", MINUS)


def memory(n: float) -> str:
    """Bytes in the unit that fits."""
    for unit, size in UNITS:
        if n >= size:
            return f"{digits(n / size)}{NBSP}{unit}"
    return f"{n:,.0f}{NBSP}B"


def signed(value: float, places: int = 3) -> str:
    """A difference with its sign."""
    text = f"{abs(value):.{places}f}"
    if float(text) == 0:
        return text
    return ("+" if value > 0 else MINUS) + text


def percent(value: float, of: float) -> str:
    """How much ``value`` is above or below ``of``."""
    return f"{signed(100 * (value / of - 1), 1)}%"


def times(ratio: float) -> str:
    """A ratio, 1.12x or 34x."""
    return f"{ratio:.2f}{TIMES}" if ratio < 10 else f"{ratio:,.0f}{TIMES}"


def listed(words: Sequence[str]) -> str:
    """a, b and c."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
