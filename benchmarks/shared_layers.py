"""Which layers of a model can do with one key head, and whether it is the keys or the values that are missed.

    python benchmarks/shared_layers.py [--model smollm2] [--out docs/results/real-layers.json] TEXT

One layer after the other has its key and value heads shared by the conversion of `gptlab convert --n-kv-head 1`, all
others as they were: the rise of the loss on the first four windows of 2,048 tokens of TEXT. Then the layers are shared
together, the one that costs least first. Shared heads are written out once for each query head, which computes the
same, so that a layer may share keys and keep its values. Windows are scored in bfloat16 products.
"""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
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
STEP = 6
"""Layers that join those that share from one measurement to the next."""
CALIBRATION = 16_384
PARTS: dict[str, Callable[[Heads, Heads], Heads]] = {
    "keys and values": lambda old, new: new,
    "keys": lambda old, new: old._replace(q=new.q, k=new.k),
    "values": lambda old, new: old._replace(v=new.v, o=new.o, bias=new.bias),
}


def variants(original: GPT, shared: GPT) -> dict[str, GPT]:
    """Return the model with each part of every layer's attention shared; in bfloat16, for its layers."""

    def change(part: Callable[[Heads, Heads], Heads]) -> GPT:
        new = rebuild(original, lambda layer, heads: part(heads, read_heads(shared.blocks[layer].attn)))
        return new.bfloat16()

    return {name: change(part) for name, part in PARTS.items()}


@contextlib.contextmanager
def with_layers(model: GPT, other: GPT, layers: Sequence[int]) -> Iterator[GPT]:
    """Give the model with the attention of another one in some layers."""
    own = [block.attn for block in model.blocks]
    for layer in layers:
        model.blocks[layer].attn = other.blocks[layer].attn
    try:
        yield model
    finally:
        for block, attention in zip(model.blocks, own, strict=True):
            block.attn = attention


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

    others = variants(original, shared)
    model = original.bfloat16()

    def loss(part: str, layers: Sequence[int]) -> float:
        with with_layers(model, others[part], layers):
            scores = torch.cat(token_logprobs(model, rows, dtype="bfloat16"))
        return -scores.double().mean().item()

    whole, n_layer = "keys and values", lm.config.n_layer
    before = loss(whole, [])
    print(f"as it is: {before:.4f}", flush=True)
    alone = []
    for layer in range(n_layer):
        alone.append(round(loss(whole, [layer]) - before, 4))
        print(f"layer {layer + 1}: {alone[-1]:+.4f}", flush=True)
    order = sorted(range(n_layer), key=alone.__getitem__)
    together = []
    for n in range(STEP, n_layer + 1, STEP):
        rises = {part: round(loss(part, order[:n]) - before, 4) for part in PARTS}
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
