"""How much memory training and generating take: the peak of a process that does nothing else.

``python -m gptlab.study.memory`` reads what to do as JSON from standard input and writes the bytes as JSON.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import torch

from gptlab.config import ModelConfig
from gptlab.errors import GptlabError
from gptlab.model.gpt import GPT
from gptlab.study.timing import decoding_step, training_step
from gptlab.training.recipe import make_recipe


def peak_memory(asked: dict[str, Any]) -> dict[str, Any]:
    """Return ``training`` and ``decoding``: bytes at the peak beyond a process that has loaded PyTorch.

    Args:
        asked: ``config`` and ``trained`` (configurations to generate and to train with), ``recipe``, ``rows`` (windows
            of a training step), ``batch`` and ``context`` (of the cache), ``device``.

    Raises:
        GptlabError: the process failed, for instance for want of memory.
    """
    what = json.dumps({**asked, "threads": torch.get_num_threads()})
    done = subprocess.run([sys.executable, "-m", __name__], input=what, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise GptlabError(f"memory could not be measured: {last}")
    return cast(dict[str, Any], json.loads(done.stdout))


def _main() -> None:
    asked = json.loads(sys.stdin.read())
    torch.set_num_threads(asked["threads"])
    device, recipe = torch.device(asked["device"]), make_recipe(asked["recipe"])
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    start = _peak(device)
    model = GPT(ModelConfig.from_dict(asked["config"])).to(device, dtype).eval()
    step = decoding_step(model, asked["batch"], asked["context"])
    for _ in range(3):
        step()
    decoding = _peak(device)
    del model, step
    _reset(device)
    train = training_step(GPT(ModelConfig.from_dict(asked["trained"])).to(device), asked["rows"], recipe)
    for _ in range(2):
        train()
    print(json.dumps({"decoding": decoding - start, "training": _peak(device) - start}))


def _peak(device: torch.device) -> int:
    """Return the most bytes that this process has held since its start, or since `_reset`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():
        # Not ru_maxrss: on Linux a child inherits its parent's.
        lines = status.read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM:"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _reset(device: torch.device) -> None:
    """Let the peak count anew where the system can do that; elsewhere the first may count for the second as well."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif (path := Path("/proc/self/clear_refs")).exists():
        path.write_text("5", encoding="ascii")


if __name__ == "__main__":
    _main()
