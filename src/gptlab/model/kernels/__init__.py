"""Interchangeable ways to compute the same attention, and the one function that chooses.

Every kernel takes `Inputs` and returns (B, H, Tq, D) in the dtype of the queries, as `reference` does; each is tested
against it.
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
from gptlab.model.kernels.flex import flex
from gptlab.model.kernels.inputs import Inputs
from gptlab.model.kernels.reference import attention_weights, reference
from gptlab.model.kernels.sdpa import sdpa
from gptlab.model.kernels.unfused import unfused
from gptlab.model.kernels.varlen import varlen

__all__ = [
    "KERNELS",
    "SPECIAL",
    "Inputs",
    "Kernel",
    "attention_weights",
    "banded",
    "flex",
    "reference",
    "sdpa",
    "select",
    "unfused",
    "use",
    "varlen",
]

Kernel = Callable[[Inputs], Tensor]
KERNELS: dict[str, Kernel] = {"reference": reference, "sdpa": sdpa, "banded": banded, "unfused": unfused}
"""Those that compute on every device, forward and backward."""
SPECIAL: dict[str, Kernel] = {"flex": flex, "varlen": varlen}
"""Those that need a certain device or dtype, or know no gradients there."""

LONG = 2
"""From this many spans of a window on, `banded` is faster than a masked `sdpa`."""

SHORT = 512
"""Up to this many keys for a query `unfused` trains fastest in bfloat16 on a CPU; it keeps six bytes a weight."""

_forced: str | None = None  # a plain global: torch.compile cannot trace a ContextVar
_log = logging.getLogger(__name__)


@contextlib.contextmanager
def use(name: str) -> Iterator[None]:
    """Force one kernel for all attention inside the ``with`` block, in every thread.

    A kernel that cannot do what it is then asked says so by a `GptlabError` of its own.

    Raises:
        GptlabError: there is no kernel of that name.
    """
    names = KERNELS | SPECIAL
    if name not in names:
        raise GptlabError(f"unknown kernel {name!r}{nearest(name, names)}; there are {', '.join(names)}")
    global _forced
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def select(inputs: Inputs) -> Kernel:
    """Return the kernel for the attention at hand: the forced one, else the fastest that can do it.

    The choice is logged at level DEBUG under ``gptlab.model.kernels``.
    """
    name = _forced or _fastest(inputs)
    if not torch.compiler.is_compiling():
        _log.debug("attention kernel: %s", name)
    return KERNELS[name] if name in KERNELS else SPECIAL[name]


def _fastest(inputs: Inputs) -> str:
    span, length = inputs.visibility.span, inputs.queries.positions.shape[1]
    if _low_precision_training_on_cpu(inputs.q) and banded_applies(inputs):
        if min(length, span or length) <= SHORT:
            return "unfused"
        if torch.compiler.is_compiling():
            return "banded"
    if span is None or length < LONG * span:
        return "sdpa"
    # On the CPU `flex` is never chosen: it would hold back the first text by the seconds that it takes to compile, for
    # a prefill that takes `banded` a fraction of one. On CUDA nothing but `sdpa` is: no GPU has run the others.
    if inputs.q.device.type == "cuda":
        return "sdpa"
    return "banded" if banded_applies(inputs) else "sdpa"


def _low_precision_training_on_cpu(q: Tensor) -> bool:
    return q.device.type == "cpu" and q.dtype == torch.bfloat16 and torch.is_grad_enabled() and q.requires_grad
