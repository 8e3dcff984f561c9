"""A model all the way by the commands alone: converted, exported, run in transformers, and imported again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from torch.nn import functional as F

import gptlab
from gptlab.verification import known_text

Run = Callable[..., tuple[int, str, str]]


@pytest.mark.slow  # the fits of the conversion
@torch.no_grad()
def test_pocket_with_all_three_changes(run: Run, tmp_path: Path) -> None:
    native, exported, again = tmp_path / "native", tmp_path / "hf", tmp_path / "again"
    changes = ("--position", "rope", "--n-kv-head", 2, "--window", 128)
    code, out, _ = run("convert", "pocket", *changes, "--out", native)
    assert code == 0
    assert "fit" in out
    assert "svd" in out
    code, out, _ = run("export", native, "--format", "hf", "--out", exported)
    assert code == 0
    assert out.startswith(f"{native} as starcoder2: {exported}\n")
    assert "lost:" not in out
    code, _, _ = run("import", exported, "--out", again)
    assert code == 0

    ours, back = gptlab.load(native), gptlab.load(again)
    assert back.config == ours.config
    state, state_back = ours.model.tensors(), back.model.tensors()
    assert state.keys() == state_back.keys()
    assert all(torch.equal(tensor, state_back[name]) for name, tensor in state.items())

    theirs = transformers.AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32).eval()
    ids = transformers.AutoTokenizer.from_pretrained(exported)(known_text(), return_tensors="pt")["input_ids"]
    assert ids[0].tolist() == ours.needs_tokenizer().encode(known_text())
    assert ids.shape[1] > 2 * 128  # the window hides something
    losses = [
        F.cross_entropy(logits[0, :-1], ids[0, 1:]).item()
        for logits in (ours.model(ids), theirs(ids, attention_mask=torch.ones_like(ids)).logits)
    ]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert losses[0] < 6  # it still is a model of English: by chance it is ln 4096 = 8.3
