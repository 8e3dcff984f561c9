"""What the commands print, where, and how soon."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import gptlab
from gptlab.config import PRESETS
from gptlab.text.tokenizers import byte_tokenizer

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tiny") / "model"
    gptlab.save(gptlab.LanguageModel(peaked_model(), byte_tokenizer()), directory)
    return directory


def peaked_model() -> gptlab.GPT:
    """Random weights large enough that greedy text is not all ties."""
    model = gptlab.GPT(gptlab.ModelConfig.preset("tiny", vocab_size=257))
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)) / 10)
    return model


def shell(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "gptlab", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


# --- help and version -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [["--help"], ["generate", "--help"], ["train", "--help"], ["--version"]])
def test_help_and_version_do_not_wait_for_torch(arguments: list[str]) -> None:
    code = (
        "import sys; from gptlab.cli import main\n"
        f"sys.argv = ['gptlab', *{arguments!r}]\n"
        "try: main()\n"
        "except SystemExit as stop: assert not stop.code\n"
        "heavy = {'torch', 'numpy', 'tokenizers', 'tiktoken', 'huggingface_hub'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="no processor time of children there")
def test_help_takes_less_than_a_second() -> None:
    # Processor time, since a busy machine says nothing about the program.
    before = os.times()
    assert shell("--help").returncode == 0
    after = os.times()
    seconds = after.children_user - before.children_user + after.children_system - before.children_system
    assert 0 < seconds < 1


def test_python_m_gptlab_version() -> None:
    done = shell("--version")
    assert (done.returncode, done.stdout) == (0, f"gptlab {gptlab.__version__}\n")


def test_every_command_is_in_the_help(run: Run) -> None:
    code, out, _ = run("--help")
    assert code == 0
    assert all(command in out for command in ("generate", "inspect", "verify", "prepare", "train", "plot"))


# --- generate -------------------------------------------------------------------------------------------------


def test_text_on_stdout_and_the_closing_line_on_stderr(tiny: Path) -> None:
    done = shell("generate", "Hello", "--model", tiny, "--max-new-tokens", 10, "--greedy")
    expected = gptlab.load(tiny).generate("Hello", max_new_tokens=10, temperature=0)[0]
    assert done.returncode == 0
    assert done.stdout == f"Hello{expected}\n"
    assert done.stderr.startswith("[10 tokens, ")
    assert done.stderr.endswith(" a second; as many tokens as asked for]\n")


def test_the_seed_reproduces(run: Run, tiny: Path) -> None:
    def text(*seed: object) -> str:
        return run("generate", "Hello", "--model", tiny, "--max-new-tokens", 20, *seed)[1]

    assert text("--seed", 7) == text("--seed", 7)
    assert text("--seed", 7) != text("--seed", 8)
    assert text() != text()  # without a seed each time another one


def test_the_seed_that_was_taken_is_told(run: Run, tiny: Path) -> None:
    arguments = ["generate", "Hello", "--model", tiny, "--max-new-tokens", 20]
    _, first, err = run(*arguments)
    seed = err.rsplit("--seed ", 1)[1].removesuffix("]\n")
    assert run(*arguments, "--seed", seed)[1] == first


def test_json_is_one_valid_object(run: Run, tiny: Path) -> None:
    arguments = ["generate", "Hello", "--model", tiny, "--max-new-tokens", 5, "--num-samples", 3, "--seed", 1]
    code, out, err = run(*arguments, "--json")
    values = json.loads(out)
    assert (code, err) == (0, "")
    assert (values["model"], values["prompt"], values["seed"]) == (str(tiny), "Hello", 1)
    assert [len(row["tokens"]) for row in values["continuations"]] == [5, 5, 5]
    assert {row["finish"] for row in values["continuations"]} == {"length"}
    again = gptlab.load(tiny).generate(["Hello"] * 3, max_new_tokens=5, temperature=0.8, top_k=40, seed=1)
    assert [row["text"] for row in values["continuations"]] == again


def test_several_samples_are_numbered(run: Run, tiny: Path) -> None:
    _, out, err = run("generate", "Hello", "--model", tiny, "--max-new-tokens", 5, "--num-samples", 2, "--seed", 1)
    assert "--- 1 of 2\nHello" in out
    assert "--- 2 of 2\nHello" in out
    assert err.startswith("[10 tokens, ")


def test_a_stop_string_ends_the_text_before_it(run: Run, tiny: Path) -> None:
    arguments = ["generate", "Hello", "--model", tiny, "--max-new-tokens", 20, "--greedy"]
    text = run(*arguments)[1].removeprefix("Hello").removesuffix("\n")
    stop = text[8:10]
    _, out, err = run(*arguments, "--stop", stop)
    assert out == f"Hello{text[: text.index(stop)]}\n"
    assert "a stop string was reached" in err


def test_no_prompt_starts_a_document(run: Run, tiny: Path) -> None:
    code, out, err = run("generate", "--model", tiny, "--max-new-tokens", 5, "--greedy")
    assert code == 0
    assert out.endswith("\n")
    assert err.startswith("[5 tokens")


def test_a_full_context_is_told(run: Run, tiny: Path) -> None:
    _, _, err = run("generate", "a" * 60, "--model", tiny, "--max-new-tokens", 100, "--greedy")
    assert "the model's context is full" in err


def test_weights_without_tokenizer_with_one_by_name(run: Run, tmp_path: Path) -> None:
    gptlab.save(gptlab.LanguageModel(peaked_model()), tmp_path)
    code, out, _ = run("generate", "Hello", "--model", tmp_path, "--tokenizer", "bytes", "--max-new-tokens", 3)
    assert code == 0
    assert out.startswith("Hello")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dtypes(run: Run, tiny: Path, dtype: str) -> None:
    code, out, _ = run("generate", "Hello", "--model", tiny, "--max-new-tokens", 4, "--greedy", "--dtype", dtype)
    lm = gptlab.load(tiny, dtype=getattr(torch, dtype))
    assert (code, out) == (0, f"Hello{lm.generate('Hello', max_new_tokens=4, temperature=0)[0]}\n")


# --- inspect --------------------------------------------------------------------------------------------------


def count(config: gptlab.ModelConfig) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in gptlab.GPT(config).parameters())


@pytest.mark.parametrize("name", PRESETS)
def test_inspect_counts_as_a_real_module_does(run: Run, name: str) -> None:
    code, out, _ = run("inspect", name, "--json")
    values: dict[str, Any] = json.loads(out)
    parts = values["parameters"]
    total = parts.pop("total")
    assert code == 0
    assert total == sum(parts.values()) == count(gptlab.ModelConfig.preset(name))
    assert values["weight_bytes"] == {"float32": 4 * total, "bfloat16": 2 * total}


def test_the_cache_costs_what_a_real_cache_holds(run: Run) -> None:
    values = json.loads(run("inspect", "tiny", "--json")[1])
    model = gptlab.GPT(gptlab.ModelConfig.preset("tiny"))
    for dtype in ("float32", "bfloat16"):
        held = model.make_cache(1, 10, dtype=getattr(torch, dtype)).nbytes
        assert 10 * values["cache_bytes_per_token"][dtype] == held


@pytest.mark.parametrize("tie", [True, False])
def test_inspect_reads_a_directory_without_its_weights(run: Run, tmp_path: Path, tie: bool) -> None:
    config = gptlab.ModelConfig.preset("tiny", tie_embeddings=tie, n_inner=48)
    gptlab.save(gptlab.LanguageModel(gptlab.GPT(config)), tmp_path)
    (tmp_path / "model.safetensors").unlink()
    values = json.loads(run("inspect", tmp_path, "--json")[1])
    assert gptlab.ModelConfig.from_dict(values["config"]) == config
    assert values["parameters"]["total"] == count(config)
    code, table, _ = run("inspect", tmp_path)
    assert code == 0
    assert ("output head" in table.split("cache")[0]) == (not tie)


def test_the_table_shows_the_published_total(run: Run) -> None:
    code, out, _ = run("inspect", "gpt2")
    assert code == 0
    assert "124,439,808" in out
    assert "12 layers, 12 heads of 64 on 12 key/value heads, width 768" in out


def test_inspect_shows_changes_beside_the_plain_model(run: Run) -> None:
    flags = ["--position", "rope", "--n-kv-head", 4, "--window", 256, "--context", 16384]
    values = json.loads(run("inspect", "gpt2", *flags, "--json")[1])
    changed = gptlab.ModelConfig.preset("gpt2", position="rope", n_kv_head=4, window=256)
    assert gptlab.ModelConfig.from_dict(values["config"]) == gptlab.ModelConfig.preset("gpt2")
    assert gptlab.ModelConfig.from_dict(values["changed"]["config"]) == changed
    assert values["changed"]["parameters"]["total"] == count(changed)
    with torch.device("meta"):
        held = gptlab.GPT(changed).make_cache(1, 16384, chunk=1, dtype=torch.bfloat16).nbytes
    assert values["changed"]["cache_bytes"]["bfloat16"] == held
    code, out, _ = run("inspect", "gpt2", *flags)
    assert code == 0
    assert f"{count(changed):,}" in out
    assert "learned positions end at 1,024" in out


def test_inspect_goes_from_gpt2_to_llama(run: Run) -> None:
    flags = ["--norm", "rms", "--mlp", "swiglu", "--no-bias"]
    values = json.loads(run("inspect", "gpt2", *flags, "--json")[1])["changed"]
    changed = gptlab.ModelConfig.preset("gpt2", norm="rms", mlp="swiglu", bias=False)
    assert gptlab.ModelConfig.from_dict(values["config"]) == changed
    assert values["parameters"]["total"] == count(changed)
    assert "swiglu feed-forward 2048, rms norms, no biases" in run("inspect", "gpt2", *flags)[1]


def test_windows_may_differ_from_layer_to_layer(run: Run) -> None:
    flags = ["--position", "rope", "--window", "8,none", "--sinks", 2, "--dilation", "2,1"]
    values = json.loads(run("inspect", "tiny", *flags, "--json")[1])["changed"]["config"]
    assert (values["window"], values["sinks"], values["dilation"]) == ([8, None], 2, [2, 1])


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--n-kv-head", 5], "valid n_kv_head: 1, 2, 3, 4, 6, 12"),
        (["--window", "12,x"], "--window takes a number"),
        (["--window", "8,8"], "window lists 2 layers"),
        (["--sinks", 4], "without a window"),
        (["--norm", "rmsnorm"], "norm must be one of layer, rms, got 'rmsnorm' (did you mean 'rms'?)"),
        (["--mlp", "swigl"], "(did you mean 'swiglu'?)"),
        (["--context", 0], "--context must be at least 1"),
    ],
)
def test_impossible_changes_are_refused(run: Run, flags: list[object], said: str) -> None:
    code, out, err = run("inspect", "gpt2", *flags)
    assert (code, out) == (2, "")
    assert err.startswith("gptlab: ")
    assert said in err
    assert err.count("\n") == 1


def test_a_window_without_effect_is_one_line_of_warning() -> None:
    command = [sys.executable, "-m", "gptlab", "inspect", "gpt2", "--window", "2000"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr == "gptlab: window=2000 hides nothing within the context_length of 1024\n"


# --- verify ---------------------------------------------------------------------------------------------------


def test_verify_prints_rows_and_counts_them(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from gptlab import verification

    quick = (verification.parameter_counts, lambda: ("the moon", "cheese", "rock", False))
    monkeypatch.setattr(verification, "OFFLINE", quick)
    code, out, _ = run("verify")
    assert code == 1  # a script must notice
    assert [row[:4] for row in out.splitlines()] == ["PASS", "FAIL", "1 of"]
    code, out, _ = run("verify", "--json")
    values = json.loads(out)
    assert code == 1
    assert [row["passed"] for row in values["checks"]] == [True, False]
    assert values["torch"] == torch.__version__


def test_verify_of_weights_that_are_not_the_originals_fails_in_rows(
    run: Run, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gptlab import verification

    monkeypatch.setattr(verification, "known_text", lambda: "A short text will do for untrained weights.")
    monkeypatch.setitem(PRESETS, "gpt2", gptlab.load(tiny).config.to_dict())
    code, out, err = run("verify", "gpt2", "--path", tiny)
    assert (code, err) == (1, "")
    assert [row.split()[0] for row in out.splitlines()] == ["FAIL", "FAIL", "FAIL", "FAIL", "0"]


def test_special_tokens_and_ids_as_a_prompt(run: Run, tiny: Path) -> None:
    values = ("--model", tiny, "--greedy", "--max-new-tokens", 6, "--json")
    ids = " ".join(map(str, [*b"the", 256, *b"a"]))
    answers = [
        run("generate", *prompt, *values)
        for prompt in (["the<|endoftext|>a", "--special"], ["--prompt-ids", ids], ["the<|endoftext|>a"])
    ]
    special, by_ids, text = (json.loads(out) for _, out, _ in answers)
    assert special["continuations"] == by_ids["continuations"] != text["continuations"]
    assert special["prompt"] == by_ids["prompt"] == text["prompt"]
    hint = "note: <|endoftext|> in the prompt is read as text; --special reads it as the token\n"
    assert [err for _, _, err in answers] == ["", "", hint]


def test_a_message_is_answered(run: Run, tiny: Path, tmp_path: Path) -> None:
    lm = gptlab.load(tiny)
    lm.needs_tokenizer().chat_template = "<{{ messages[0].role }}>{{ messages[0].content }}<|endoftext|>"
    gptlab.save(lm, tmp_path / "m")
    ids = lm.chat_ids("Hello")
    assert ids == [*b"<user>Hello", 256]
    [answer] = lm.generate([ids], max_new_tokens=9, temperature=0)
    arguments = ["generate", "--model", tmp_path / "m", "--chat", "Hello", "--max-new-tokens", 9, "--greedy"]
    code, out, err = run(*arguments)
    assert (code, out) == (0, answer + "\n")
    assert err.startswith("[9 tokens")
    found = json.loads(run(*arguments, "--json")[1])
    assert (found["prompt"], found["continuations"][0]["text"]) == ("Hello", answer)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--prompt-ids", "1 x"], "--prompt-ids takes token ids"),
        (["--prompt-ids", ""], "--prompt-ids takes token ids"),
        (["--prompt-ids", "1 257"], "the prompt has the token id 257, the model's are 0 to 256"),
        (["--prompt-ids", "1", "text"], "leave out either it or a prompt"),
        (["--prompt-ids", "1", "--special"], "leave out either it or --special"),
        (["--chat", "hi"], "this model has no chat template"),
        (["--chat", "hi", "--special"], "--chat takes a message; leave out either it or --special"),
        (["--chat", "--prompt-ids", "1"], "--chat takes a message; leave out either it or --prompt-ids"),
    ],
)
def test_ids_that_are_no_prompt_are_refused(run: Run, tiny: Path, arguments: list[str], complaint: str) -> None:
    code, out, err = run("generate", "--model", tiny, *arguments)
    assert (code, out) == (2, "")
    assert complaint in err
