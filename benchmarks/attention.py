"""Time and memory of one layer's attention at GPT-2 small's shape, against sequence length: windows and full.

    python benchmarks/attention.py [--out docs/results/attention.json] [--longest 16384] [--rounds 5]

Each figure is taken in a process of its own, so that peak memory is its own; the kernels take turns, round after
round, and the medians are kept.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

HEADS, HEAD_DIM, WINDOW = 12, 64, 256
VARIANTS = ("sdpa causal", "sdpa with a window mask", "banded", "flex")
FORWARD_ONLY = ("flex",)  # on the CPU


def measure(variant: str, length: int, backward: bool, repeats: int) -> dict[str, float]:
    """Run one kernel in this process; return the median milliseconds and the extra peak memory in MB.

    What is loaded or compiled once, for any length, is not counted.
    """
    import torch

    from gptlab.model import kernels
    from gptlab.model.masks import Tokens, Visibility

    torch.manual_seed(0)
    visibility = Visibility(None if variant == "sdpa causal" else WINDOW)
    kernel = {"banded": kernels.banded, "flex": kernels.flex}.get(variant, kernels.sdpa)

    def once(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        tokens = Tokens(torch.arange(q.shape[2])[None], plain=True, in_order=True)  # new: so is flex's mask
        with torch.set_grad_enabled(backward):
            y = kernel(kernels.Inputs(q, k, v, visibility, tokens, tokens))
            if backward:
                y.backward(y.detach())
                q.grad = k.grad = v.grad = None

    def tensors(length: int) -> list[torch.Tensor]:
        return [torch.randn(1, HEADS, length, HEAD_DIM, requires_grad=backward) for _ in range(3)]

    once(*tensors(2 * WINDOW))
    qkv = tensors(length)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak so far is forgotten
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    once(*qkv)
    extra = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        once(*qkv)
        times.append(1000 * (time.perf_counter() - started))
    return {"milliseconds": statistics.median(times), "extra_megabytes": extra / 1024}


def in_process(variant: str, length: int, backward: bool) -> dict[str, float]:
    command = [sys.executable, __file__, "--one", variant, str(length), str(int(backward))]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def exponent(rows: list[dict], variant: str, backward: bool, first: int, last: int) -> float | None:
    """Return p of time ~ length^p between two lengths."""
    seconds = {
        row["length"]: row["milliseconds"] for row in rows if (row["variant"], row["backward"]) == (variant, backward)
    }
    if first not in seconds or last not in seconds:
        return None
    return math.log(seconds[last] / seconds[first]) / math.log(last / first)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--longest", type=int, default=16384)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--one", nargs=3)
    arguments = parser.parse_args()
    if arguments.one:
        variant, length, backward = arguments.one
        print(json.dumps(measure(variant, int(length), backward == "1", 3)))
        return
    lengths = [n for n in (1024, 2048, 4096, 8192, 16384, 32768) if n <= arguments.longest]
    rows = []
    for backward in (False, True):
        for length in lengths:
            variants = [v for v in VARIANTS if not (backward and v in FORWARD_ONLY)]
            if length > (4096 if backward else 8192):  # a mask of T x T and its gradients do not fit far beyond this
                variants.remove("sdpa with a window mask")
            measurements: dict[str, list[dict[str, float]]] = {variant: [] for variant in variants}
            for _ in range(arguments.rounds):
                for variant in variants:
                    measurements[variant].append(in_process(variant, length, backward))
            for variant, values in measurements.items():
                row = {"variant": variant, "length": length, "backward": backward}
                row |= {key: statistics.median(value[key] for value in values) for key in values[0]}
                rows.append(row)
                print(
                    f"{variant:<24} T={length:<6} {'forward+backward' if backward else 'forward':<17}"
                    f" {row['milliseconds']:9.1f} ms  {row['extra_megabytes']:8.1f} MB",
                    flush=True,
                )
    import torch

    growth = {
        f"{variant}, {'forward+backward' if backward else 'forward'}": exponent(rows, variant, backward, 4096, 16384)
        for variant in VARIANTS
        for backward in (False, True)
    }
    result = {
        "work": f"one layer, batch 1, {HEADS} heads of {HEAD_DIM}, window {WINDOW}, float32",
        "rounds": arguments.rounds,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "exponent_4096_to_16384": growth,
        "rows": rows,
    }
    print(json.dumps(growth, indent=2))
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
