# Small runs: a language that a tiny model learns in seconds, and `gptlab` commands that need not wait for torch.
from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from gptlab.text.documents import documents_of
from gptlab.text.shards import Dataset, NewTokenizer, prepare
from gptlab.training.recipe import Recipe, read_recipe

RECIPE = """
[model]
preset = "tiny"
context_length = 32

[tokenizer]
kind = "bytes"

[batch]
size = 4

[optimizer]
learning_rate = 1e-2

[schedule]
warmup_steps = 5

[budget]
steps = 20

[train]
dtype = "float32"
compile = false
evaluate_every = 5
"""
TIMINGS = {"seconds", "tokens_per_second", "memory_bytes"}


def sentences(n: int, seed: int = 0) -> str:
    """Lines of a grammar that leaves 0.16 nats per byte; the frequencies of its letters alone leave 2.3."""
    draw = random.Random(seed)
    pets, verbs, things = ["cat", "dog", "rat"], ["sees", "eats"], ["fish", "bread", "cheese"]
    return "".join(f"the {draw.choice(pets)} {draw.choice(verbs)} the {draw.choice(things)}.\n" for _ in range(n))


def make_dataset(out: Path, texts: Sequence[str], kind: str = "bytes", *, items: bool = False) -> Dataset:
    return prepare(documents_of("grammar", texts, items=items), NewTokenizer(kind, 280), out, held_out=0.1)


def small(*settings: str, text: str = RECIPE) -> Recipe:
    """The small recipe with ``section.key=value`` settings on top."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "small.toml"
        path.write_text(text)
        return read_recipe(str(path), list(settings))


# --- what runs leave ------------------------------------------------------------------------------------------


def curve(run: Path) -> list[dict[str, Any]]:
    """The steps and evaluations of `metrics.jsonl`, without what depends on the machine's mood."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kept = [row for row in rows if row["event"] in ("step", "evaluate")]
    return [{key: value for key, value in row.items() if key not in TIMINGS} for row in kept]


def checkpoints(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def assert_same_run(actual: Path, expected: Path) -> None:
    """The same curve, and bit for bit the same weights and optimizer state at the end."""
    assert curve(actual) == curve(expected)
    last = checkpoints(expected)[-1]
    assert checkpoints(actual)[-1] == last
    for name in ("model.safetensors", "training.safetensors"):
        ours, theirs = (load_file(run / "checkpoints" / last / name) for run in (actual, expected))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours), name


# --- commands in processes of their own -----------------------------------------------------------------------

# Loads torch once, then forks for every command: starting Python and torch anew takes seconds each time.
SERVER = """
import json, os, signal, sys, time, traceback
import torch
torch.set_num_threads(1)
import torch._dynamo, torch.distributed.device_mesh, torch.distributed.fsdp
import gptlab.cli.progress, gptlab.cli.prepare, gptlab.text.shards, gptlab.training.loop
from gptlab.cli import main
gptlab.training.loop.peak_flops = lambda device, dtype: (1e9, "not measured")

def run(order):
    os.environ.update(order["env"])
    for fd, path in enumerate((os.devnull, order["out"], order["err"])):
        os.dup2(os.open(path, os.O_RDWR), fd)
    sys.argv = ["gptlab", *order["start"]]
    code = 1
    try:
        main()
        code = 0
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)

def wait(pid):
    for _ in range(120_000):
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.001)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return "two minutes, and still running"

for line in sys.stdin:
    order = json.loads(line)
    if "wait" in order:
        print(wait(order["wait"]), flush=True)
        continue
    pid = os.fork()
    if pid == 0:
        run(order)
    print(pid, flush=True)
"""


@dataclass
class Command:
    """A `gptlab` command that runs in a process of its own."""

    server: subprocess.Popen[str]
    pid: int
    out: Path
    err: Path

    def send(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def wait(self) -> int:
        """Its exit code; minus the signal that it died of."""
        return int(_ask(self.server, {"wait": self.pid}))


@dataclass
class Commands:
    """Starts `gptlab` commands."""

    server: subprocess.Popen[str]
    folder: Path

    def start(self, *arguments: object, **env: str) -> Command:
        out, err = (Path(tempfile.mkstemp(dir=self.folder)[1]) for _ in range(2))
        order = {"start": [str(a) for a in arguments], "env": env, "out": str(out), "err": str(err)}
        return Command(self.server, int(_ask(self.server, order)), out, err)

    def run(self, *arguments: object, **env: str) -> Command:
        """Run a command that must go well."""
        command = self.start(*arguments, **env)
        assert command.wait() == 0, command.err.read_text()
        return command


@contextmanager
def serve(folder: Path) -> Iterator[Commands]:
    command = [sys.executable, "-W", "ignore", "-c", SERVER]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env) as server:
        yield Commands(server, folder)
        assert server.stdin is not None
        server.stdin.close()


def _ask(server: subprocess.Popen[str], order: dict[str, Any]) -> str:
    assert server.stdin is not None
    assert server.stdout is not None
    server.stdin.write(json.dumps(order) + "\n")
    server.stdin.flush()
    return server.stdout.readline()
