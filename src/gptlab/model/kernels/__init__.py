"""Interchangeable ways to compute the same attention, and the one function that chooses.

Every kernel has the signature of `reference` and is tested against it.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from gptlab.errors import GptlabError, nearest
from gptlab.model.kernels.banded import applies as banded_applies
from gptlab.model.kernels.banded import banded
from gptlab.model.kernels.reference import attention_weights, reference
from gptlab.model.kernels.sdpa import sdpa
from gptlab.model.masks import Tokens, Visibility

__all__ = ["KERNELS", "Kernel", "attention_weights", "banded", "reference", "sdpa", "select", "use"]

Kernel = Callable[..., Tensor]
KERNELS: dict[str, Kernel] = {"reference": reference, "sdpa": sdpa, "banded": banded}

LONG = 2
"""From this many spans of a window on, `banded` is faster than a masked `sdpa`."""

_forced: str | None = None  # a plain global: torch.compile cannot trace a ContextVar
_log = logging.getLogger(__name__)


@contextlib.contextmanager
def use(name: str) -> Iterator[None]:
    """Force one kernel for all attention inside the ``with`` block, in every thread.

    Raises:
        GptlabError: there is no kernel of that name.
    """
    if name not in KERNELS:
        raise GptlabError(f"unknown kernel {name!r}{nearest(name, KERNELS)}; there are {', '.join(KERNELS)}")
    global _forced
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def select(visibility: Visibility, queries: Tokens, keys: Tokens, dropout: float) -> Kernel:
    """Return the kernel for the attention at hand: the forced one, else the fastest that can do it.

    The choice is logged at level DEBUG under ``gptlab.model.kernels``.
    """
    name = _forced
    if name is None:
        span, length = visibility.span, queries.positions.shape[1]
        long = span is not None and length >= LONG * span
        name = "banded" if long and banded_applies(visibility, queries, keys, dropout) else "sdpa"
    if not torch.compiler.is_compiling():
        _log.debug("attention kernel: %s", name)
    return KERNELS[name]
