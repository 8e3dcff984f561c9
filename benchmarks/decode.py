"""Time reading a prompt and decoding at batch 1: gptlab beside transformers, the same random 124M weights.

    python benchmarks/decode.py [--out docs/results/decode.json]

The two programs take turns in one process; the figures are medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers

import gptlab
from gptlab.generation.padded import last_logits

PROMPT, NEW, ROUNDS = 128, 64, 5


def timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


@torch.inference_mode()
def ours(model: gptlab.GPT, ids: torch.Tensor, n: int) -> list[int]:
    cache = model.make_cache(1, ids.shape[1] + n)
    out = []
    for _ in range(n):
        ids = model(ids, cache=cache, head=last_logits).argmax(-1, keepdim=True)
        out.append(ids.item())
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        with tempfile.TemporaryDirectory() as folder:
            torch.manual_seed(0)
            judge = transformers.GPT2LMHeadModel(transformers.GPT2Config(bos_token_id=None, eos_token_id=None)).eval()
            judge.save_pretrained(folder)
            model = gptlab.load(folder, dtype=dtype).model
        judge = judge.to(dtype)
        ids = torch.randint(50257, (1, PROMPT))
        mask = torch.ones_like(ids)

        def theirs(
            n: int, judge: torch.nn.Module = judge, ids: torch.Tensor = ids, mask: torch.Tensor = mask
        ) -> object:
            return judge.generate(ids, attention_mask=mask, max_new_tokens=n, do_sample=False, use_cache=True)

        runs: dict[str, list[float]] = {"gptlab": [], "transformers": []}
        reads: dict[str, list[float]] = {"gptlab": [], "transformers": []}
        for round_ in range(ROUNDS + 1):  # the first warms up
            for name, work in (("gptlab", lambda n, m=model, i=ids: ours(m, i, n)), ("transformers", theirs)):
                read, whole = timed(lambda w=work: w(1)), timed(lambda w=work: w(1 + NEW))
                if round_:
                    reads[name].append(read)
                    runs[name].append((whole - read) / NEW)
        for name in runs:
            rows.append(
                {
                    "program": name,
                    "dtype": str(dtype).removeprefix("torch."),
                    "decode_tokens_per_second": 1 / statistics.median(runs[name]),
                    "prompt_milliseconds": 1000 * statistics.median(reads[name]),
                }
            )
    result = {
        "work": f"batch 1, prompt of {PROMPT} tokens, {NEW} new tokens, greedy, random weights of GPT-2 124M",
        "rounds": ROUNDS,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
        "rows": rows,
    }
    text = json.dumps(result, indent=2)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
