"""Load `gptlab serve` with many clients, and put its throughput beside that of `gptlab generate --batch`.

    python benchmarks/serve.py [--model pocket] [--clients 200] [--seconds 30] [--rounds 2] [--dtype float32]

The clients are coroutines of this process, which shares the machine with the server. Each asks for texts of mixed
lengths, half of them streamed, and leaves one answer in ten midway. In each round the prompts that were answered then
go through `gptlab generate --batch`, each with the mean of the new tokens. Both rates are of new tokens, counted by who
received them; those of an answer that was left count as far as they came. Of the processor's time it tells who took it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import psutil

COMMAND = [sys.executable, "-m", "gptlab"]


async def ask(port: int, body: dict[str, object], leaves: float | None, counts: Counter[str]) -> None:
    """Send one request and read its answer, or leave: a stream after a few events, a whole answer after a while."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**20)
    try:
        content = json.dumps(body).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(content)}\r\n"
        writer.write(f"{head}Connection: close\r\n\r\n".encode() + content)
        if leaves is not None and not body["stream"]:
            await asyncio.sleep(leaves)
            counts["left"] += 1
            return
        status = (await reader.readline()).split()[1].decode()
        counts[status] += 1
        if status == "429":
            await reader.read()
            await asyncio.sleep(0.5 + leaves if leaves else 0.5)
            return
        if not body["stream"]:
            answer = (await reader.read()).partition(b"\r\n\r\n")[2]
            counts["tokens"] += json.loads(answer)["usage"]["completion_tokens"]
            return
        events = Counter[str]()
        until = time.monotonic() + leaves if leaves is not None else float("inf")
        tail = b""
        while part := await reader.read(2**16):
            events["n"] += part.count(b'"finish_reason"')
            tail = (tail + part)[-2000:]
            if time.monotonic() > until:
                counts["left"] += 1
                counts["tokens"] += events["n"]
                return
        used = re.search(rb'"completion_tokens":(\d+)', tail)
        counts["tokens"] += int(used[1]) if used else 0
        counts["broken"] += b"data: [DONE]" not in tail
    except (OSError, ValueError, IndexError) as error:
        counts[f"error {error!r}"] += 1
    finally:
        writer.close()


async def client(port: int, seed: int, end: float, counts: Counter[str], asked: list[dict[str, object]]) -> None:
    draw = random.Random(seed)
    while time.monotonic() < end:
        body: dict[str, object] = {
            "prompt": "The city of " * draw.randint(1, 60),
            "max_tokens": draw.randint(1, 150),
            "seed": draw.randrange(2**31),
            "stream": draw.random() < 0.5,
        }
        if body["stream"]:
            body["stream_options"] = {"include_usage": True}
        asked.append(body)
        await ask(port, body, draw.random() if draw.random() < 0.1 else None, counts)


async def load(port: int, clients: int, seconds: float, seed: int) -> tuple[Counter[str], list[dict[str, object]]]:
    counts, asked = Counter[str](), list[dict[str, object]]()
    end = time.monotonic() + seconds
    tasks = [asyncio.create_task(client(port, seed * 10**6 + i, end, counts, asked)) for i in range(clients)]
    _, late = await asyncio.wait(tasks, timeout=seconds)  # answers that come later do not count
    counted = Counter(counts)
    for task in late:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return counted, asked


def processor(process: psutil.Process) -> float:
    """Seconds that a process has computed."""
    times = process.cpu_times()
    return float(times.user + times.system)


def batch(model: list[str], asked: list[dict[str, object]], seconds: float, rate: float) -> float:
    """Return the tokens a second that `gptlab generate --batch` tells of as many of the prompts as take so long."""
    new = round(sum(int(str(body["max_tokens"])) for body in asked) / len(asked))
    few = asked[: 32 * max(2, round(seconds * rate / new / 32))]  # no last batch that is half empty
    with tempfile.TemporaryDirectory() as directory:
        prompts, out = Path(directory) / "prompts.jsonl", Path(directory) / "out.jsonl"
        prompts.write_text("".join(json.dumps({"prompt": body["prompt"]}) + "\n" for body in few), encoding="utf-8")
        command = [*COMMAND, "generate", *model, "--batch", str(prompts), "--out", str(out), "--seed", "0"]
        command += ["--temperature", "1", "--top-k", "0"]  # as the server samples where nothing is asked for
        done = subprocess.run(
            [*command, "--max-new-tokens", str(new)], capture_output=True, text=True, check=True, env=os.environ
        )
    found = re.findall(r"([\d,.]+) tokens a second", done.stderr)
    return float(found[-1].replace(",", ""))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pocket")
    parser.add_argument("--dtype", default=None)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--rounds", type=int, default=2)
    asked = parser.parse_args()
    model = ["--model", asked.model, *(["--dtype", asked.dtype] if asked.dtype else [])]
    served = subprocess.Popen([*COMMAND, "serve", "--port", "0", *model], stderr=subprocess.PIPE, text=True)
    assert served.stderr is not None
    try:
        found = re.search(r":(\d+)/v1", served.stderr.readline())
        assert found, "the server did not start"
        port, server, me = int(found[1]), psutil.Process(served.pid), psutil.Process()
        for i in range(asked.rounds):
            before, begun = (processor(server), processor(me)), time.monotonic()
            counts, bodies = asyncio.run(load(port, asked.clients, asked.seconds, i))
            wall = time.monotonic() - begun
            taken = processor(server) - before[0], processor(me) - before[1]
            rate = counts["tokens"] / wall
            served.send_signal(signal.SIGSTOP)  # what is left of the load is not to compute beside the batch
            alone = batch(model, bodies, asked.seconds / 2, rate)
            served.send_signal(signal.SIGCONT)
            cores = os.cpu_count() or 1
            print(
                f"serve {rate:,.0f} tokens a second, generate --batch {alone:,.0f}, ratio {rate / alone:.2f};"
                f" of {cores} cores the server took {taken[0] / wall / cores:.0%}, the clients"
                f" {taken[1] / wall / cores:.0%}; memory {server.memory_info().rss / 2**20:,.0f} MiB; {dict(counts)}",
                flush=True,
            )
    finally:
        served.kill()
        served.wait()


if __name__ == "__main__":
    main()
