"""`gptlab export`: what it prints, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

import gptlab

Run = Callable[..., tuple[int, str, str]]
COMMAND = ("export",)


def test_what_is_printed(run: Run, tmp_path: Path) -> None:
    code, out, err = run("pocket-gqa", "--out", tmp_path / "m", "--dtype", "bfloat16")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == f"pocket-gqa as gpt2: {tmp_path / 'm'}"
    assert lines[1].startswith("   lost: the saving of")
    assert lines[2].startswith("read back and compared on 512 tokens: logits differ by at most")
    assert gptlab.load(tmp_path / "m").config.kv_heads == 6


def test_one_json_object(run: Run, tmp_path: Path) -> None:
    code, out, _ = run("pocket-swa", "--out", tmp_path / "m", "--custom-code", "--no-verify", "--json")
    assert code == 0
    facts = json.loads(out)
    assert (facts["family"], facts["difference"], facts["format"]) == ("gptlab", None, "hf")
    assert {path.name for path in (tmp_path / "m").iterdir()} >= {"modeling_gptlab.py", "configuration_gptlab.py"}


def test_code_that_is_not_needed_is_not_sent_along(run: Run, tmp_path: Path) -> None:
    code, out, _ = run("pocket-gqa", "--out", tmp_path / "m", "--custom-code", "--no-verify")
    assert code == 0
    assert "   --custom-code was not needed: gpt2 computes exactly this, so no code is sent along\n" in out
    assert not list((tmp_path / "m").glob("*.py"))


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["pocket-swa"], "in the way is window=128 with learned positions"),
        (["pocket", "--format", "onnx"], "unknown format 'onnx'; there are hf"),
        (["pocket", "--dtype", "int8"], "--dtype must be one of float32, bfloat16, float16, got 'int8'"),
        (["pocket", "--max-shard-size", "big"], "'big' is not a size of a file; write it as 500MB or 5GB"),
        (["pocket", "--format", "onnx", "--custom-code"], "--custom-code belongs to --format hf; drop it"),
        (["./nowhere"], "no file or directory ./nowhere"),
    ],
)
def test_what_is_refused(run: Run, tmp_path: Path, arguments: list[str], complaint: str) -> None:
    code, out, err = run(*arguments, "--out", tmp_path / "m")
    assert (code, out) == (2, "")
    assert complaint in err
    assert err.count("\n") == 1
    assert not (tmp_path / "m").exists()
