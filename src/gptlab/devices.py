"""Where to compute and in which numbers, by the names that users give."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

from gptlab.errors import GptlabError, nearest

if TYPE_CHECKING:
    import torch

DTYPES = ("float32", "bfloat16", "float16", "float64")
"""Those that a model's weights may have in memory."""
SHORT = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
BITS: dict[str, Literal[8, 4]] = {"int8": 8, "int4": 4}
"""Whole numbers that weights may be rounded to, by name."""


def find_device(device: Any) -> torch.device:
    """Return a device by name (``cpu``, ``cuda``, ``cuda:1``, ``mps``); None takes a GPU where there is one.

    Raises:
        GptlabError: it is not here.
    """
    import torch

    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        resolved = torch.device(device)
        torch.zeros(1, device=resolved).item()  # not every name of torch's is a device that computes
    except (RuntimeError, AssertionError, TypeError, ValueError) as error:
        reason = str(error).splitlines()[0].partition(". ")[0]
        raise GptlabError(f"no device {str(device)!r} here ({reason}); 'cpu' is always available") from None
    return resolved


def find_dtype(dtype: Any) -> torch.dtype:
    """Return one of `DTYPES`, given by name or as torch's own.

    Raises:
        GptlabError: another, or none.
    """
    import torch

    name = str(dtype).removeprefix("torch.")
    name = SHORT.get(name, name)
    if name not in DTYPES or not isinstance(dtype, (str, torch.dtype)):
        raise GptlabError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}{nearest(name, DTYPES)}")
    resolved: torch.dtype = getattr(torch, name)
    return resolved


def find_precision(dtype: Any) -> tuple[torch.dtype, Literal[8, 4] | None]:
    """Return the dtype to read weights in and the bits to round them to, if any: one of `DTYPES` or of `BITS`.

    Raises:
        GptlabError: another, or none.
    """
    import torch

    if isinstance(dtype, str) and dtype in BITS:
        return torch.float32, BITS[dtype]
    names = (*DTYPES, *BITS, "auto")
    if isinstance(dtype, str) and dtype not in (*names, *SHORT):
        raise GptlabError(f"dtype must be one of {', '.join(names)}, got {dtype!r}{nearest(dtype, names)}")
    return find_dtype(dtype), None


def timed(step: Callable[[], object], device: torch.device) -> float:
    """Return the seconds that a call takes on a device."""
    _wait(device)
    start = time.perf_counter()
    step()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)
