"""Which layers of a model can do with one key head, and whether it is the keys or the values that are missed.

    python benchmarks/shared_layers.py [--model smollm2] [--out docs/results/real-layers.json] TEXT

One layer after the other has its key and value heads shared by the conversion of `gptlab convert --n-kv-head 1`, all
others as they were: the rise of the loss on the first four windows of 2,048 tokens of TEXT. Then the layers are shared
together, the one that costs least first. Shared heads are written out once for each query head, which computes the
same, so that a layer may share keys and keep its values. Windows are scored in bfloat16 products.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch

import gptlab
from gptlab import GPT
from gptlab.conversion.calibration import calibration_rows
from gptlab.conversion.heads import regroup, repeat_heads
from gptlab.conversion.layers import Heads, read_heads, rebuild
from gptlab.conversion.statistics import collect_statistics
from gptlab.evaluation.scoring import token_logprobs
from gptlab.study.measure import machine

WINDOWS, LENGTH = 4, 2048
CALIBRATION = 16_384
PARTS: dict[str, Callable[[Heads, Heads], Heads]] = {
    "keys and values": lambda old, new: new,
    "keys": lambda old, new: old._replace(q=new.q, k=new.k),
    "values": lambda old, new: old._replace(v=new.v, o=new.o, bias=new.bias),
}


def mixed(original: GPT, shared: GPT, layers: set[int], part: str) -> GPT:
    """Return the original with one part of these layers' attention from the other model, without any shared head."""

    def change(layer: int, heads: Heads) -> Heads:
        if layer not in layers:
            return heads
        return PARTS[part](heads, read_heads(shared.blocks[layer].attn))

    return rebuild(original, change)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("text", type=Path)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--out", type=Path, default=Path("docs/results/real-layers.json"))
    asked = parser.parse_args()
    lm = gptlab.load(asked.model)
    tokenizer, n_head = lm.needs_tokenizer(), lm.config.n_head
    ids = torch.tensor(tokenizer.encode(asked.text.read_text(encoding="utf-8"))[: WINDOWS * (LENGTH - 1)])
    start = torch.tensor([tokenizer.start_of_text if tokenizer.start_of_text is not None else tokenizer.end_of_text])
    rows = [torch.cat([start, part]).numpy() for part in ids.split(LENGTH - 1)]
    calibration = list(calibration_rows(tokenizer, 1024, CALIBRATION))
    statistics = collect_statistics(lm.model, calibration)
    original = repeat_heads(lm.model, n_head)
    # In one group of all heads their order is as it was.
    shared = repeat_heads(regroup(lm.model, 1, grouping="contiguous", statistics=statistics), n_head)

    def loss(model: GPT) -> float:
        scores = torch.cat(token_logprobs(model, rows, dtype="bfloat16"))
        return -scores.double().mean().item()

    before = loss(original)
    print(f"as it is: {before:.4f}", flush=True)
    alone = {}
    for part in PARTS:
        alone[part] = []
        for layer in range(lm.config.n_layer):
            alone[part].append(round(loss(mixed(original, shared, {layer}, part)) - before, 4))
            print(f"layer {layer + 1}, {part}: {alone[part][-1]:+.4f}", flush=True)
    order = sorted(range(lm.config.n_layer), key=lambda layer: alone["keys and values"][layer])
    together = []
    for n in range(5, lm.config.n_layer + 1, 5):
        rises = {part: round(loss(mixed(original, shared, set(order[:n]), part)) - before, 4) for part in PARTS}
        together.append({"layers": n, **rises})
        print(together[-1], flush=True)
    result = {
        "model": asked.model,
        "text": asked.text.name,
        "windows": WINDOWS,
        "length": LENGTH,
        "calibration_tokens": CALIBRATION,
        "loss": round(before, 4),
        "machine": machine(torch.device("cpu")).model_dump(),
        "order": order,
        "alone": alone,
        "together": together,
    }
    asked.out.write_text(json.dumps(result) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
