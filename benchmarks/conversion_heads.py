"""How far the circuits of GPT-2's own heads move when they share keys and values, by method and grouping.

    python benchmarks/conversion_heads.py DIRECTORY [--out docs/results/conversion_heads.json]

DIRECTORY holds ``model.safetensors`` with the attention and layer norms of GPT-2 124M under Hugging Face's names; no
other weight counts. Relative squared errors of the QK and OV circuits of each layer, from the weights alone: what the
layer norm gives is taken as uncorrelated (`gptlab.conversion.statistics.assumed_statistics`).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import get_args

import torch
from safetensors import safe_open

from gptlab import GPT, ModelConfig
from gptlab.conversion.circuits import circuit_errors
from gptlab.conversion.heads import Grouping, Method, group_heads, permute_heads, regroup
from gptlab.conversion.layers import read_heads
from gptlab.conversion.statistics import assumed_statistics

COUNTS = (6, 4, 3, 2, 1)


def attention_of(file: Path, layers: int = 12) -> GPT:
    """Return GPT-2 124M with the attention and first norms of a file, and next to nothing of the rest."""
    model = GPT(ModelConfig.preset("gpt2", n_layer=layers, vocab_size=1, context_length=1, n_inner=1))
    with safe_open(file, "pt") as real, torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".attn." in name or ".ln_1." in name:
                tensor = real.get_tensor(name)
                # Weights are stored (in, out).
                parameter.copy_(tensor.T if tensor.ndim == 2 else tensor)
    return model


def measure(source: GPT, n_kv_head: int, method: Method) -> dict[str, object]:
    """Return the errors of a method where neighbours share, layer by layer."""
    started = time.perf_counter()
    converted = regroup(source, n_kv_head, method=method, grouping="contiguous")
    seconds = time.perf_counter() - started
    errors = [
        circuit_errors(read_heads(before.attn), read_heads(after.attn), assumed_statistics(before))
        for before, after in zip(source.blocks, converted.blocks, strict=True)
    ]
    qk, ov = zip(*errors, strict=True)
    return {
        "qk_mean": round(statistics.mean(qk), 4),
        "ov_mean": round(statistics.mean(ov), 4),
        "qk": [round(error, 4) for error in qk],
        "ov": [round(error, 4) for error in ov],
        "seconds": round(seconds, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    model = attention_of(arguments.directory / "model.safetensors")
    rows = []
    for n_kv_head in COUNTS:
        for grouping in get_args(Grouping):
            if n_kv_head == 1 and grouping == "fitted":
                continue  # one group of all heads
            # The order is the same for every method: look for it once.
            source = permute_heads(model, group_heads(model, n_kv_head, grouping=grouping))
            for method in get_args(Method):
                row = measure(source, n_kv_head, method)
                rows.append({"method": method, "grouping": grouping, "n_kv_head": n_kv_head, **row})
                means = f"QK {row['qk_mean']:.3f}  OV {row['ov_mean']:.3f}  {row['seconds']:5.1f} s"
                print(f"n_kv_head={n_kv_head} {method:<11} {grouping:<11} {means}", flush=True)
    result = {
        "work": "relative squared error of QK and OV circuits, one value a layer; GPT-2 124M's heads, weights alone",
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    if arguments.out:
        # One row a line.
        lines = ",\n".join(f"    {json.dumps(row)}" for row in rows)
        head = json.dumps(result, indent=2).removesuffix("\n}")
        arguments.out.write_text(f'{head},\n  "rows": [\n{lines}\n  ]\n}}\n', encoding="utf-8")


if __name__ == "__main__":
    main()
