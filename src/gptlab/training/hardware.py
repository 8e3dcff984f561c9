"""What the machine can do, to set a run's speed against."""

from __future__ import annotations

import ctypes
import platform
import resource
import sys
import time

import torch

# Dense products with float32 accumulation, in operations a second, from NVIDIA's data sheets. float32 runs as TF32 only
# where asked for, which gptlab does not: for it the rate is measured.
_BFLOAT16_PEAKS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h of glibc


def peak_flops(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """Return floating-point operations a second that matrix products reach at best, and where the figure comes from.

    A GPU that is known has its data sheet's; elsewhere a product of two square matrices is timed.
    """
    name = str(dtype).removeprefix("torch.")
    if device.type == "cuda" and dtype == torch.bfloat16:
        card = torch.cuda.get_device_name(device)
        for key, peak in _BFLOAT16_PEAKS.items():
            if key in card:
                return peak, f"data sheet of {card}, dense {name}"
    n = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(4):
        _wait(device)
        start = time.perf_counter()
        a @ b
        _wait(device)
        best = min(best, time.perf_counter() - start)
    threads = f" on {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    return 2 * n**3 / best, f"measured: {name} product of {n} x {n} matrices{threads}"


def memory_bytes(device: torch.device) -> int:
    """Return the most memory that this process has held: on the GPU, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Linux counts kilobytes, macOS bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def keep_memory() -> None:
    """Let this process keep the memory that it frees, where the C library is glibc.

    By default a large block goes back to the system when it is freed, and comes back as pages that the system zeroes
    one by one. A training step asks for the same blocks again and again: on two CPU cores GPT-2 124M lost a quarter of
    its time to that. To be called after the first step: what lasts for the whole run then lies apart from what comes
    and goes, which leaves no holes.
    """
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
