"""`gptlab export --format gguf` and the way back."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import gptlab
from gptlab.text.tokenizers import train_bpe

pytest.importorskip("gguf")
COMMAND = ("export",)
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    tokenizer = train_bpe(["the cat sat on the mat " * 20], 280)
    config = gptlab.ModelConfig(
        vocab_size=tokenizer.vocab_size,
        context_length=64,
        n_layer=2,
        n_head=4,
        n_kv_head=2,
        n_embd=64,
        window=[None, 32],
    )
    gptlab.save(gptlab.LanguageModel(gptlab.GPT(config, seed=3), tokenizer), tmp_path / "m")
    return tmp_path / "m"


def test_there_and_back(model: Path, tmp_path: Path, run: Run) -> None:
    out = tmp_path / "model.gguf"
    code, stdout, _ = run(model, "--format", "gguf", "--context", 32, "--out", out, "--json")
    assert code == 0
    facts = json.loads(stdout)
    assert facts["family"] == "gpt2"
    assert facts["lost"] == ["texts of more than 32 tokens"]
    assert 0 <= facts["difference"] < 1e-5
    source, actual = gptlab.load(model), gptlab.load(out)
    assert torch.equal(source.model.h[1].attn.c_attn.weight, actual.model.h[1].attn.c_attn.weight)
    code, stdout, _ = run(model, "--format", "gguf", "--context", 32, "--type", "q8_0", "--out", tmp_path / "q.gguf")
    assert code == 0
    assert "read back and compared on 64 tokens: logits differ by at most" in stdout
    code, stdout, _ = run(model, "--format", "gguf", "--context", 32, "--no-verify", "--out", tmp_path / "n.gguf")
    assert code == 0
    assert "not compared" in stdout


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--format", "gguf"], "cap the context at the window with --context 32"),
        (["--format", "gguf", "--type", "q4_0"], "--type must be one of f32, f16, bf16, q8_0"),
        (["--format", "gguf", "--dtype", "float16"], "use --type instead of --dtype"),
        (["--format", "gguf", "--custom-code"], "--custom-code belongs to --format hf"),
        (["--type", "f16"], "--type belongs to --format gguf"),
        (["--context", "32"], "--context belongs to --format gguf"),
        (["--format", "ggfu"], "did you mean 'gguf'?"),
    ],
)
def test_refusals(model: Path, tmp_path: Path, run: Run, options: list[str], complaint: str) -> None:
    code, _, stderr = run(model, *options, "--out", tmp_path / "x")
    assert code == 2
    assert complaint in stderr
    assert not (tmp_path / "x").exists()
