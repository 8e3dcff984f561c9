"""What fewer bits a weight cost in loss, and what decoding takes in memory.

    python benchmarks/precisions.py [--text FILE] [--tokens 100000] [--models NAME ...] [--out FILE]

The loss is the mean over non-overlapping windows of each model's context, in plain PyTorch. The memory is what a fresh
process holds in anonymous pages at its peak while it decodes with random weights of GPT-2 124M, beyond the same process
before it has a model; weights mapped from a file are not anonymous.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch

import gptlab
from gptlab.conversion.calibration import DEFAULT_TEXT, calibration_rows
from gptlab.errors import GptlabError
from gptlab.generation.engine import decode
from gptlab.generation.sampling import Sampling
from gptlab.model import cost
from gptlab.study.measure import machine

DTYPES = ("float32", "bfloat16", "int8", "int4")
MODELS = ("pocket", "pocket-rope", "pocket-gqa", "pocket-swa", "pocket-rope-gqa-swa", "smollm2")
PROMPT, NEW = 128, 128


@torch.inference_mode()
def loss(model: gptlab.GPT, rows: list[torch.Tensor]) -> float:
    """Return the mean nats per token over rows of ids."""
    total, n = 0.0, 0
    for row in rows:
        logits = model(row[None, :-1].long())[0]
        total += torch.nn.functional.cross_entropy(logits, row[1:].long(), reduction="sum").item()
        n += len(row) - 1
    return total / n


def qualities(names: list[str], text: str | None, n_tokens: int) -> list[dict[str, Any]]:
    rows_of = []
    for name in names:
        measured: dict[str, float] = {}
        try:
            for dtype in DTYPES:
                lm = gptlab.load(name, dtype=dtype)
                length = min(1024, lm.config.context_length)
                tokenizer = lm.needs_tokenizer()
                if text is None:
                    rows = list(calibration_rows(tokenizer, length, n_tokens, DEFAULT_TEXT))
                else:
                    ids = torch.tensor(tokenizer.encode(text)[:n_tokens])
                    rows = [row for row in ids.split(length) if len(row) > 1]
                measured[dtype] = loss(lm.model, rows)
                print(f"{name} {dtype}: {measured[dtype]:.4f}", file=sys.stderr, flush=True)
        except GptlabError as error:
            print(f"{name} is left out: {error}", file=sys.stderr)
            continue
        rows_of.append({"model": name, "tokens": sum(len(row) - 1 for row in rows), "nats_per_token": measured})
    return rows_of


def anonymous() -> int:
    """Bytes of this process in pages that belong to no file."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon:"))


class Grows:
    """A text that is not decoded."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.finish = None

    def add(self, token: int) -> str:
        self.tokens.append(token)
        return ""

    def close(self, reason: str) -> str:
        return ""


def measure_memory(folder: str, dtype: str) -> dict[str, Any]:
    """Load and decode in this process, and watch its memory."""
    small = gptlab.GPT(gptlab.ModelConfig.preset("tiny")).eval()  # libraries and threads are there before the start
    list(decode(small, [[1, 2]], [Grows()], sampling=Sampling(0.0), max_new_tokens=3, vocab_size=256))  # type: ignore[list-item]
    start, peak, done = anonymous(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, anonymous())
            time.sleep(0.002)

    thread = threading.Thread(target=watch, daemon=True)  # an error here must not wait for it
    thread.start()
    lm = gptlab.load(Path(folder), dtype=dtype, tokenizer="gpt2")
    loading, peak = peak, 0
    loaded = anonymous()
    prompt = [i * 7919 % 50000 for i in range(PROMPT)]
    pieces = decode(lm.model, [prompt], [Grows()], sampling=Sampling(0.0), max_new_tokens=NEW, vocab_size=50257)  # type: ignore[list-item]
    next(pieces)
    reading, peak = peak, 0
    list(pieces)
    decoding = peak
    done.set()
    thread.join()
    tensors = {t.data_ptr(): t.nbytes for t in [*lm.model.parameters(), *lm.model.buffers()]}
    cache = cost.cache_bytes(lm.config, PROMPT + NEW, lm.model.cache_dtype.itemsize)
    return {
        "dtype": dtype,
        "weights": sum(tensors.values()),
        "cache": cache,
        "loading": loading - start,
        "loaded": loaded - start,
        "reading": reading - start,
        "decoding": decoding - start,
    }


def memories() -> list[dict[str, Any]]:
    found = []
    with tempfile.TemporaryDirectory() as scratch:
        model = gptlab.GPT(gptlab.ModelConfig.preset("gpt2"))
        gptlab.save(gptlab.LanguageModel(model), Path(scratch) / "float32")
        for dtype in DTYPES:
            folder = Path(scratch) / dtype
            if dtype != "float32":
                gptlab.save(gptlab.load(Path(scratch) / "float32", dtype=dtype), folder)
            command = [sys.executable, __file__, "--memory-of", str(folder), dtype]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found.append(json.loads(done.stdout.splitlines()[-1]))
            print(json.dumps(found[-1]), file=sys.stderr, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--text", type=Path, help="UTF-8; by default a text of Python's own")
    parser.add_argument("--tokens", type=int, default=100_000)
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--memory-of", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory_of:
        print(json.dumps(measure_memory(*arguments.memory_of)))
        return
    text = None if arguments.text is None else arguments.text.read_text(encoding="utf-8")
    result = {
        "text": "a text of Python's own" if arguments.text is None else arguments.text.name,
        "machine": machine(torch.device("cpu")).model_dump(),
        "memory": memories(),
        "quality": qualities(arguments.models, text, arguments.tokens),
    }
    print(json.dumps(result, indent=2))
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
