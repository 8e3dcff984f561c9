"""Loading must not need the model's size twice."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import gptlab

# A process of its own, so that what other tests allocated does not count. Memory that a memory-mapped file
# occupies (RssFile) can be dropped at any time; anonymous memory (RssAnon) cannot, so that is what is measured.
MEASURE = """
import sys, threading
import torch
import gptlab
from gptlab import language_model  # imported before the measurement, with all that it imports

def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))

torch.ones(8, 8) @ torch.ones(8, 8)  # thread pools
before = peak = anonymous()
done = threading.Event()

def watch():
    global peak
    while not done.is_set():
        peak = max(peak, anonymous())
        done.wait(0.0005)

watcher = threading.Thread(target=watch)
watcher.start()
lm = gptlab.load(sys.argv[1], dtype=getattr(torch, sys.argv[2]))
peak = max(peak, anonymous())
done.set()
watcher.join()
print(sum(p.numel() for p in lm.model.parameters()), peak - before, anonymous() - before)
"""


@pytest.fixture(scope="module")
def gpt2_sized(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Random weights of GPT-2's shapes: in Hugging Face's layout, and in gptlab's own."""
    lm = gptlab.LanguageModel(gptlab.GPT(gptlab.ModelConfig.preset("gpt2")))
    root = tmp_path_factory.mktemp("gpt2")
    gptlab.save(lm, root / "native")
    foreign = root / "huggingface"
    foreign.mkdir()
    (foreign / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    turned = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in lm.model.named_parameters():
        tensors[name] = (parameter.detach().t() if name.endswith(turned) else parameter.detach()).contiguous()
    save_file(tensors, foreign / "model.safetensors")
    return {"native": root / "native", "huggingface": foreign}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
@pytest.mark.parametrize(
    ("layout", "dtype"), [("huggingface", "float32"), ("native", "float32"), ("native", "bfloat16")]
)
def test_loading_124m_takes_the_weights_memory_once(gpt2_sized: dict[str, Path], layout: str, dtype: str) -> None:
    directory = gpt2_sized[layout]
    size = (directory / "model.safetensors").stat().st_size * (1.0 if dtype == "float32" else 0.5)
    command = [sys.executable, "-c", MEASURE, str(directory), dtype]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    count, peak, after = map(int, done.stdout.split())
    assert count == 124_439_808
    assert 0.98 * size < peak <= 1.2 * size, f"{peak / size:.2f} times the file's size at the peak"
    assert after <= 1.05 * size
