"""Time a training step of GPT-2 124M: gptlab beside nanoGPT and transformers, the same shapes and the same optimizer.

    python benchmarks/train.py --nanogpt path/to/nanoGPT --out docs/results/train.json

Every program runs in a process of its own, so that its peak memory is its own; they take turns, one step at a time, and
the figures are medians. Each holds some 3 GB meanwhile, so that not all are timed unless ``--programs`` names them. A
step is forward, backward, clipping and AdamW on one batch of random tokens. Without ``--nanogpt`` its rows are left
out; "whole logits" is gptlab's own model with nanoGPT's way of computing the loss.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import multiprocessing
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil

SHAPES = ((4, 256), (1, 1024))
DTYPES = ("float32", "bfloat16")
PROGRAMS = (
    "gptlab",
    "gptlab compiled",
    "gptlab recompute",
    "gptlab compiled recompute",
    "whole logits",
    "nanoGPT",
    "nanoGPT compiled",
    "transformers",
    "transformers compiled",
)
USUAL = ("gptlab", "gptlab compiled", "gptlab recompute", "nanoGPT", "nanoGPT compiled", "transformers")
ROUNDS = 5
PROGRAM_BYTES = 3_400_000_000
"""What a program holds while it waits for its turn, on average."""


def adamw(torch: Any, model: Any) -> Any:
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=6e-4, betas=(0.9, 0.95), fused=True)


def make_step(program: str, batch: int, length: int, dtype: str, nanogpt: str | None) -> tuple[Callable[[], None], int]:
    """Return one whole training step of a program, with random weights; and the bytes that its libraries take alone."""
    import torch
    from torch.nn import functional as F

    torch.manual_seed(0)
    name, _, mode = program.partition(" ")
    settle: Callable[[], None] = lambda: None  # noqa: E731
    low = getattr(torch, dtype)
    tokens = torch.randint(50257, (batch, length + 1))
    ids, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def autocast() -> Any:
        return torch.autocast("cpu", dtype=low) if low != torch.float32 else contextlib.nullcontext()

    if name == "gptlab":
        import gptlab
        from gptlab.training.data import Batch
        from gptlab.training.hardware import keep_memory
        from gptlab.training.loss import softmax_gradient
        from gptlab.training.optimizer import make_optimizers
        from gptlab.training.parallel import Group
        from gptlab.training.settings import OptimizerSettings
        from gptlab.training.step import compile_step, gradients, recompute_blocks, spare_embedding

        settle = keep_memory
        libraries = peak_bytes()
        model = gptlab.GPT(gptlab.ModelConfig.preset("gpt2"))
        spare_embedding(model)
        rows, gradient = Batch(ids, targets, None, torch.zeros(batch)), softmax_gradient
        if "compiled" in mode:
            gradient = compile_step(model, rows, low, True, print, "recompute" in mode) or gradient
        elif mode == "recompute":
            recompute_blocks(model)
        optimizers = make_optimizers(model, OptimizerSettings(learning_rate=6e-4))
        group = Group(0, 1, torch.device("cpu"))
        backward = lambda: gradients(model, rows, None, low, group, gradient)  # noqa: E731
    else:
        if name == "whole":
            import gptlab

            libraries = peak_bytes()
            model = gptlab.GPT(gptlab.ModelConfig.preset("gpt2"))
            forward: Callable[[], Any] = lambda: F.cross_entropy(model(ids).flatten(0, 1), targets.flatten())  # noqa: E731
        elif name == "nanoGPT":
            sys.path.insert(0, str(nanogpt))
            from model import GPT, GPTConfig

            libraries = peak_bytes()
            model = GPT(GPTConfig(block_size=1024, vocab_size=50257, bias=True))
            called = torch.compile(model) if mode else model
            forward = lambda: called(ids, targets)[1]  # noqa: E731
        else:
            import transformers

            _ = transformers.GPT2LMHeadModel  # imported when it is first asked for
            libraries = peak_bytes()
            settings = transformers.GPT2Config(
                resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=None, eos_token_id=None, use_cache=False
            )
            model = transformers.GPT2LMHeadModel(settings)
            called = torch.compile(model) if mode else model

            def forward() -> Any:
                return F.cross_entropy(called(ids).logits.float().flatten(0, 1), targets.flatten())

        optimizers = [adamw(torch, model)]

        def backward() -> None:
            with autocast():
                loss = forward()
            loss.backward()

    model.train()

    steps = itertools.count()

    def step() -> None:
        if next(steps) == 1:
            settle()
        backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return step, libraries


def peak_bytes() -> int:
    """Most memory that this process has had resident."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def serve(pipe: Connection, arguments: tuple[Any, ...]) -> None:
    """Take a step whenever asked, and answer with its seconds and the peak memory so far in bytes."""
    try:
        step, libraries = make_step(*arguments)
        for _ in range(3):  # the optimizer's state is made in the first, and memory settles in the second
            step()
        pipe.send(libraries)
        while pipe.recv():
            started = time.perf_counter()
            step()
            seconds = time.perf_counter() - started
            pipe.send((seconds, peak_bytes()))
    except Exception as error:
        pipe.send(f"{type(error).__name__}: {error}")


def compare(programs: list[str], batch: int, length: int, dtype: str, nanogpt: str | None) -> list[dict[str, Any]]:
    context = multiprocessing.get_context("spawn")
    workers: dict[str, tuple[Any, Connection]] = {}
    libraries: dict[str, int] = {}
    for program in programs:  # one after the other: starting is work, too
        here, there = context.Pipe()
        worker = context.Process(target=serve, args=(there, (program, batch, length, dtype, nanogpt)), daemon=True)
        worker.start()
        if isinstance(answer := here.recv(), str):
            print(f"{program} does not run: {answer}", file=sys.stderr)
            worker.kill()
            continue
        workers[program], libraries[program] = (worker, here), answer
    seconds: dict[str, list[float]] = {program: [] for program in workers}
    memory: dict[str, int] = {}
    for _ in range(ROUNDS):
        for program, (_, pipe) in workers.items():
            pipe.send(True)
            taken, memory[program] = pipe.recv()
            seconds[program].append(taken)
    for worker, pipe in workers.values():
        pipe.send(False)
        worker.join()
    # Weights, gradients and AdamW's two moments in float32: what no program can do without.
    state = 124_439_808 * 16
    return [
        {
            "program": program,
            "batch": batch,
            "length": length,
            "dtype": dtype,
            "tokens_per_second": batch * length / statistics.median(taken),
            "peak_gigabytes": memory[program] / 1e9,
            "libraries_gigabytes": libraries[program] / 1e9,
            "above_state_gigabytes": (memory[program] - libraries[program] - state) / 1e9,
        }
        for program, taken in seconds.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--nanogpt", help="a clone of karpathy/nanoGPT")
    parser.add_argument("--programs", nargs="+", default=list(USUAL), choices=PROGRAMS)
    parser.add_argument("--shapes", nargs="+", type=int, default=[0, 1], help="0 is 4 x 256, 1 is 1 x 1024")
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=DTYPES)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    programs = [p for p in arguments.programs if arguments.nanogpt or not p.startswith("nanoGPT")]
    there = psutil.virtual_memory().available
    if there < PROGRAM_BYTES * len(programs):
        most = there // PROGRAM_BYTES
        parser.exit(2, f"there is memory for {most} programs at once, not {len(programs)}; name fewer: --programs\n")
    rows = []
    for shape in arguments.shapes:
        for dtype in arguments.dtypes:
            compared = compare(programs, *SHAPES[shape], dtype, arguments.nanogpt)
            rows += compared
            for row in compared:
                print(json.dumps(row), flush=True)
    import torch
    import transformers

    result = {
        "work": "one training step of GPT-2 124M on random tokens: forward, backward, clipping, AdamW",
        "rounds": ROUNDS,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "rows": rows,
    }
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
