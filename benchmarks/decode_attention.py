"""Time of attention alone when one token is generated, against cached tokens, batch, key/value heads and window.

    python benchmarks/decode_attention.py [--out docs/results/decode_attention.json]

GPT-2 small's 12 layers of 12 heads of 64, bfloat16 cache, the kernel that gptlab selects. Layers have keys and values
of their own, so that none is found in the processor's caches; where all 12 do not fit the memory allowed, fewer run
and the time is scaled up.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path

import torch

import gptlab
from gptlab.model import cost, kernels
from gptlab.model.masks import Tokens, Visibility

LAYERS, HEADS, HEAD_DIM, MEMORY = 12, 12, 64, 3 * 2**30
VARIANTS: dict[str, dict[str, int]] = {
    "12 key/value heads": {},
    "4": {"n_kv_head": 4},
    "1": {"n_kv_head": 1},
    "12, window 256": {"window": 256},
}


@torch.inference_mode()
def measure(context: int, batch: int, n_kv_head: int, window: int | None, rounds: int) -> float:
    """Return the median milliseconds of attention in all layers for one new token a row."""
    visibility = Visibility(window)
    slots = visibility.capacity(context, 1)
    size = 2 * batch * n_kv_head * slots * HEAD_DIM * 2
    n_layers = max(1, min(LAYERS, MEMORY // size))
    shape = (batch, n_kv_head, slots, HEAD_DIM)
    layers = [(torch.randn(shape).bfloat16(), torch.randn(shape).bfloat16()) for _ in range(n_layers)]
    q = torch.randn(batch, HEADS, 1, HEAD_DIM).bfloat16()
    query = Tokens(torch.full((batch, 1), context - 1), plain=True)
    keys = Tokens(torch.arange(context - slots, context).expand(batch, -1), plain=True)
    kernel = kernels.select(kernels.Inputs(q, *layers[0], visibility, query, keys))
    times = []
    for _ in range(rounds + 1):
        started = time.perf_counter()
        for k, v in layers:
            kernel(kernels.Inputs(q, k, v, visibility, query, keys))
        times.append(1000 * (time.perf_counter() - started) * LAYERS / n_layers)
    return statistics.median(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    rows = []
    for batch in (1, 8, 32):
        for context in (1024, 4096, 16384):
            for name, changes in VARIANTS.items():
                config = gptlab.ModelConfig.preset("gpt2", position="rope", **changes)
                window = changes.get("window")
                row = {
                    "variant": name,
                    "batch": batch,
                    "context": context,
                    "milliseconds": measure(context, batch, config.kv_heads, window, arguments.rounds),
                    "megabytes_read": cost.decode_bytes(config, context - 1, 2, batch=batch)[1] / 1e6,
                }
                rows.append(row)
                print(row, flush=True)
    result = {
        "work": "attention of 12 layers, 12 heads of 64, one new token a row, bfloat16",
        "rounds": arguments.rounds,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "rows": rows,
    }
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
