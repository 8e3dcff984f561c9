"""How much memory is left, so that what cannot be had is said before it is asked for.

A system that promises more memory than it has ends the process when the promise falls due, without a word.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from gptlab.errors import GptlabError

_CGROUP, _CGROUP_1 = Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/memory")


def available_memory(device: torch.device) -> int | None:
    """Return the bytes that can still be had on a device, or None where nothing tells."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type != "cpu" or sys.platform != "linux":
        return None
    free_of = [_free_of_the_machine(), *map(_free_of_the_group, _groups())]
    return min((free for free in free_of if free is not None), default=None)


def check_memory(n_bytes: int, device: torch.device, what: str, way_out: str) -> None:
    """Refuse what needs more memory than there is.

    Raises:
        GptlabError: ``what``, with its verb, takes ``n_bytes``, more than is free; ``way_out`` says what to do.
    """
    free = available_memory(device)
    if free is not None and n_bytes > free:
        raise GptlabError(
            f"{what} about {n_bytes / 2**30:,.1f} GiB of memory, and {free / 2**30:,.1f} GiB are free; {way_out}"
        )


def is_shortage(error: BaseException) -> bool:
    """Did an operation fail for want of memory?"""
    said = str(error)
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and "alloc" in said and "memory" in said
    )


def _free_of_the_machine() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except (OSError, ValueError):
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _groups() -> list[Path]:
    """The control groups that this process is in: containers limit memory by them."""
    groups = [_CGROUP, _CGROUP_1]
    try:
        for line in Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            root = _CGROUP if not controllers else _CGROUP_1 if "memory" in controllers.split(",") else None
            if root is not None:
                own = root / path.lstrip("/")
                groups += [own, *(up for up in own.parents if root in up.parents)]
    except (OSError, ValueError):
        pass
    return groups


def _free_of_the_group(group: Path) -> int | None:
    for limit, used in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
        try:
            most, held = (int((group / name).read_text(encoding="ascii")) for name in (limit, used))
            lines = (group / "memory.stat").read_text(encoding="ascii").splitlines()
        except (OSError, ValueError):  # not there, or "max": no limit
            continue
        # Pages of files that nobody uses at the moment are given back on demand.
        cached = next((int(line.split()[1]) for line in lines if line.startswith("inactive_file ")), 0)
        return max(most - held + cached, 0)
    return None
