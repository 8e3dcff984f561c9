"""Whatever a user gets wrong: one sentence on standard error, exit code 2, and never a traceback."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import tiny_lm
from helpers.refusals import Payload
from safetensors.torch import load_file, save_file

import gptlab
from gptlab.cli import main


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tiny") / "model"
    gptlab.save(tiny_lm(), directory)
    return directory


@pytest.fixture
def copy(tiny: Path, tmp_path: Path) -> Path:
    """The tiny model, to be damaged."""
    return Path(shutil.copytree(tiny, tmp_path / "model"))


Refused = Callable[..., str]


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Refused:
    """Run the command in this process, demand a proper refusal, and return its sentence."""

    def run(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["gptlab", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            main()
        out, err = capfd.readouterr()
        assert caught.value.code == 2
        assert out == ""
        return sentence(err)

    return run


def sentence(err: str) -> str:
    assert err.startswith("gptlab: "), err
    assert err.endswith("\n")
    assert err.count("\n") == 1, err
    assert "Traceback" not in err
    return err.removeprefix("gptlab: ").rstrip("\n")


def in_a_new_process(*arguments: object, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "gptlab", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **env}, timeout=300, check=False)


# --- which model ----------------------------------------------------------------------------------------------


def test_no_such_directory_from_a_real_shell(tmp_path: Path) -> None:
    done = in_a_new_process("generate", "--model", tmp_path / "nowhere", "Hello")
    assert (done.returncode, done.stdout) == (2, "")
    assert sentence(done.stderr) == f"no file or directory {tmp_path / 'nowhere'}; check the path"


def test_an_unreachable_hub_from_a_real_shell(tmp_path: Path) -> None:
    done = in_a_new_process("generate", "--model", "gpt2", "Hello", HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))
    assert (done.returncode, done.stdout) == (2, "")
    said = sentence(done.stderr)
    for part in ("config.json", "model.safetensors", "vocab.json", "merges.txt", "folder gpt2", "./gpt2", "'pocket'"):
        assert part in said


@pytest.mark.parametrize(
    ("name", "hint"), [("gpt2-meduim", "did you mean 'gpt2-medium'?"), ("gpt3", "did you mean 'gpt2'?")]
)
@pytest.mark.parametrize("command", [["inspect"], ["generate", "Hello", "--model"]])
def test_an_unknown_name_gets_a_suggestion(refused: Refused, command: list[str], name: str, hint: str) -> None:
    said = refused(*command, name)
    assert said.startswith(f"no model {name!r}")
    assert hint in said


def test_a_directory_that_is_no_model(refused: Refused, tmp_path: Path) -> None:
    assert "is not a model directory: it has no config.json" in refused("inspect", tmp_path)
    assert "is not a model directory" in refused("generate", "Hello", "--model", tmp_path)


def test_an_empty_name(refused: Refused) -> None:
    assert "name of the model is empty" in refused("inspect", "")


# --- damaged checkpoints --------------------------------------------------------------------------------------


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flip_one_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[random.Random(0).randrange(len(content) // 2, len(content))] ^= 1
    path.write_bytes(content)


def flip_in_the_header(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[2] ^= 0x40  # the header now claims to be four megabytes longer
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (truncate, "is not an intact safetensors file"),
        (empty, "the file is empty"),
        (flip_one_bit, "fails its checksum; restore the file"),
        (flip_in_the_header, "is not an intact safetensors file"),
        (Path.unlink, "is not an intact safetensors file"),
    ],
)
def test_damaged_weights(refused: Refused, copy: Path, damage: Callable[[Path], None], complaint: str) -> None:
    damage(copy / "model.safetensors")
    said = refused("generate", "Hello", "--model", copy)
    assert complaint in said
    assert str(copy / "model.safetensors") in said


def test_a_pickle_that_would_run_code(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    torch.save({"wte.weight": Payload(tmp_path / "code-has-run")}, tmp_path / "pytorch_model.bin", pickle_protocol=4)
    assert "loading it could run code" in refused("generate", "Hello", "--model", tmp_path)
    assert not (tmp_path / "code-has-run").exists()


def to_foreign_layout(directory: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Rewrite the tiny model in Hugging Face's layout with changed tensors."""
    tensors = load_file(directory / "model.safetensors")
    turned = re.compile(r"(c_attn|c_proj|c_fc)\.weight$")
    tensors = {name: t.t().contiguous() if turned.search(name) else t for name, t in tensors.items()}
    change(tensors)
    save_file(tensors, directory / "model.safetensors")
    config = {"model_type": "gpt2", "vocab_size": 257, "n_positions": 64, "n_layer": 2, "n_head": 4, "n_embd": 32}
    (directory / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda t: t.pop("h.0.ln_1.bias"), "lacks h.0.ln_1.bias"),
        (lambda t: t.update(extra=torch.ones(3)), "holds extra"),
        (lambda t: t.update({"wpe.weight": torch.ones(32, 32)}), "has wpe.weight of shape (32, 32)"),
    ],
)
def test_missing_extra_and_wrongly_shaped_tensors(
    refused: Refused, copy: Path, change: Callable[[dict[str, torch.Tensor]], Any], complaint: str
) -> None:
    to_foreign_layout(copy, change)
    assert complaint in refused("generate", "Hello", "--model", copy)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n_head", 3),
        ("n_head", 0),
        ("n_embd", -1),
        ("n_layer", 1.5),
        ("vocab_size", "many"),
        ("context_length", 10**30),
        ("norm_eps", float("nan")),
        ("dropout", 1.0),
        ("tie_embeddings", "yes"),
        ("n_heads", 4),
        ("position", "blended"),
    ],
)
@pytest.mark.parametrize("command", [["inspect"], ["generate", "Hello", "--model"]])
def test_impossible_numbers_in_a_config(
    refused: Refused, copy: Path, command: list[str], field: str, value: Any
) -> None:
    values = json.loads((copy / "config.json").read_text())
    values["model"][field] = value
    (copy / "config.json").write_text(json.dumps(values))
    said = refused(*command, copy)
    assert field in said
    assert str(copy / "config.json") in said


@pytest.mark.parametrize("content", ["{", "[1]", '{"format": "gptlab", "version": 1}', '{"format": "gptlab"}'])
def test_a_damaged_config(refused: Refused, copy: Path, content: str) -> None:
    (copy / "config.json").write_text(content)
    assert str(copy) in refused("inspect", copy)


def test_a_damaged_tokenizer(refused: Refused, copy: Path) -> None:
    (copy / "tokenizer.json").write_text('{"model": {"type": "BPE"}}')
    assert "the tokenizer in" in refused("generate", "Hello", "--model", copy)


# --- prompts and sampling -------------------------------------------------------------------------------------


def test_a_prompt_longer_than_the_context(refused: Refused, tiny: Path) -> None:
    assert "65 tokens, the model's context holds 64" in refused("generate", "a" * 65, "--model", tiny)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([""], "the prompt is empty"),
        (["Hello", "--temperature", -1], "temperature must be"),
        (["Hello", "--temperature", "nan"], "temperature must be"),
        (["Hello", "--temperature", "inf"], "temperature must be"),
        (["Hello", "--top-k", -5], "top_k must be a whole number, 0 to allow every token"),
        (["Hello", "--top-p", 0], "top_p must be above 0"),
        (["Hello", "--top-p", 2], "top_p must be above 0 and at most 1"),
        (["Hello", "--top-p", "nan"], "top_p must be"),
        (["Hello", "--seed", -1], "seed must be"),
        (["Hello", "--seed", 2**63], "seed must be"),
        (["Hello", "--max-new-tokens", 0], "max_new_tokens must be at least 1"),
        (["Hello", "--num-samples", 0], "--num-samples must be at least 1"),
        (["Hello", "--stop", ""], "a stop string is empty"),
        (["Hello", "--dtype", "float23"], "did you mean 'float32'?"),
        (["Hello", "--tokenizer", "gtp2"], "did you mean 'gpt2'?"),
        (["Hello", "--tokenizer", "gpt2"], "they do not fit"),
    ],
)
def test_absurd_values(refused: Refused, tiny: Path, arguments: list[object], complaint: str) -> None:
    assert complaint in refused("generate", *arguments, "--model", tiny)


def test_a_prompt_that_is_no_unicode(tiny: Path) -> None:
    # An argument of invalid UTF-8 reaches Python as a lone surrogate.
    command = [sys.executable, "-m", "gptlab", "generate", "--model", os.fsencode(tiny), b"caf\xe9"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "lone surrogate" in sentence(done.stderr)


def test_weights_without_a_tokenizer(refused: Refused, tmp_path: Path) -> None:
    gptlab.save(gptlab.LanguageModel(gptlab.GPT(gptlab.ModelConfig.preset("tiny"))), tmp_path)
    assert "came without a tokenizer" in refused("generate", "Hello", "--model", tmp_path)


# --- verify ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["pocket"], "only the original models can be verified"),
        (["gtp2"], "only the original models can be verified"),
        (["--path", "x"], "name the model too: gptlab verify gpt2 --path DIR"),
        (["gpt2", "--path", "./nowhere"], "no file or directory nowhere; check --path"),
        (
            ["gpt2", "--path", "owner/name"],
            "no file or directory owner/name; check --path",
        ),  # never looked up on the hub
    ],
)
def test_verify(refused: Refused, arguments: list[str], complaint: str) -> None:
    assert complaint in refused("verify", *arguments)


def test_verify_of_another_architecture_says_so_before_any_weight_is_read(refused: Refused, tmp_path: Path) -> None:
    config = gptlab.ModelConfig.preset("gpt2", n_layer=2, n_embd=24, window=64)
    gptlab.save(gptlab.LanguageModel(gptlab.GPT(config)), tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"")
    said = refused("verify", "gpt2", "--path", tmp_path / "model")
    assert "holds a model other than gpt2: n_layer is 2, not 12; n_embd is 24, not 768; n_inner is 96, not" in said


# --- pipes ----------------------------------------------------------------------------------------------------

posix_pipes = pytest.mark.skipif(sys.platform == "win32", reason="pipes break differently there")


@posix_pipes
def test_head_takes_five_bytes_and_nobody_complains(tiny: Path) -> None:
    arguments = ["generate", "Hello", "--max-new-tokens", "50", "--seed", "1", "--model", str(tiny)]
    command = [sys.executable, "-m", "gptlab", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.read(5) == b"Hello"
    process.stdout.close()  # as `head -c 5` does
    killer = threading.Timer(300, process.kill)
    killer.start()
    err = process.stderr.read().decode()
    process.wait()
    killer.cancel()
    assert "Traceback" not in err
    assert "BrokenPipe" not in err


@posix_pipes
@pytest.mark.parametrize("arguments", [["inspect", "gpt2"], ["inspect", "gpt2", "--json"], ["--version"]])
def test_a_pipe_that_nobody_reads(arguments: list[str]) -> None:
    # Short output is still in Python's buffer when the command is done, and breaks the pipe even later.
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "gptlab", *arguments]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_output_onto_a_full_disk() -> None:
    command = [sys.executable, "-m", "gptlab", "inspect", "gpt2", "--json"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 2
    assert sentence(done.stderr) == "the output cannot be used: No space left on device"
