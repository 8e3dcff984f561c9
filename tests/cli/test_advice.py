"""What messages advise: every option, command, setting and extra that one names exists, and following it works."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import typer.main

import gptlab
from gptlab.cli import app
from gptlab.config import ModelConfig
from gptlab.text.tokenizers import GPT2Tokenizer, byte_tokenizer
from gptlab.training import loop
from gptlab.training.recipe import Recipe, recipe_names

Run = Callable[..., tuple[int, str, str]]
ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "src/gptlab"
COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]


def options_of(command: Any) -> set[str]:
    """The options of a command and of those below it."""
    below = getattr(command, "commands", {}).values()
    own = {text for parameter in command.params for text in (*parameter.opts, *parameter.secondary_opts)}
    return own.union({"--help"}, *map(options_of, below))


OPTIONS = {name: options_of(command) for name, command in COMMANDS.items()}
EVERY = {"--version"}.union(*OPTIONS.values())
# Modules of gptlab.cli that are not named as their command; bench holds two.
HOMES = {"import_model": "import", "study_tables": "study", "bench": ""}
PROSE = {
    "a",
    "and",
    "as",
    "can",
    "cannot",
    "computes",
    "converted",
    "does",
    "for",
    "has",
    "ignores",
    "in",
    "is",
    "itself",
    "knows",
    "made",
    "needs",
    "or",
    "package",
    "project",
    "reads",
    "rotates",
    "saved",
    "serve",
    "settings",
    "study",
    "takes",
    "timings",
    "training",
    "wrote",
}
"""Words that follow the program's name where a sentence tells of it; any other must be a command."""
FILES = {"bin", "chat_template", "ckpt", "ggml", "json", "layers", "model", "onnx", "safetensors", "toml"}
"""What stands after a dot where a file or a tensor is named, not a setting."""


# --- what they name --------------------------------------------------------------------------------------------


def sentences() -> Iterator[tuple[str, str, str]]:
    """Every text in the source that is not a docstring: module, line, and itself, with {} for what is filled in."""
    for path in sorted(SOURCE.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        passed = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        whole = [node for node in ast.walk(tree) if isinstance(node, ast.JoinedStr)]
        passed |= {id(part) for node in whole for part in ast.walk(node) if part is not node}
        for node in ast.walk(tree):
            if id(node) not in passed and (said := _text(node)):
                yield str(path.relative_to(SOURCE).with_suffix("")), str(node.lineno), said  # type: ignore[attr-defined]


def _text(node: ast.AST) -> str:
    match node:
        case ast.JoinedStr():
            return "".join(map(_text, node.values))
        case ast.FormattedValue(value=ast.IfExp(body=ast.Constant(value=str() as text))):
            return text  # one of two wordings
        case ast.FormattedValue():
            return "{}"
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


SENTENCES = list(sentences())
OPTION = re.compile(r"(?<![\w/-])--[a-z][a-z_-]*[a-z](?![\w/]*\.)")
CALLED = re.compile(r"\bgptlab ([a-z]\w*)((?:(?!\bgptlab\b|[;,)]| and | or ).)*)", re.DOTALL)


def check(module: str, said: str) -> list[str]:
    """What a sentence names that is not there."""
    wrong = []
    home = module.removeprefix("cli/")
    home = HOMES.get(home, home) if module.startswith("cli/") else ""
    rest = re.sub(r"pip install [^;,)]*", "", said)
    for call in CALLED.finditer(said):
        command, arguments = call.groups()
        if command in OPTIONS:
            wrong += [f"{command} {name}" for name in OPTION.findall(arguments) if name not in OPTIONS[command]]
            rest = rest.replace(arguments, "")
        elif command not in PROSE:
            wrong.append(f"gptlab {command}")
        recipe = re.match(r" ([a-z][a-z-]*)", arguments)
        if command == "train" and recipe and recipe[1] not in recipe_names():
            wrong.append(f"recipe {recipe[1]}")
    if module != "harness/adapter":  # whose options are the harness's
        # A sentence that names other commands may name their options too, and so may a piece of a command line.
        others = CALLED.search(said) or re.fullmatch(r"--[a-z-]+ \{\}", said)
        known = EVERY if others else OPTIONS.get(home, EVERY)
        wrong += [name for name in OPTION.findall(rest) if name not in known]
    for section, key in re.findall(r"(?<![\w.])([a-z_]+)\.([a-z_]+)\b(?!\()", said):
        if section in Recipe.model_fields and key not in settings(section) | FILES:
            wrong.append(f"{section}.{key}")
    wrong += [f"extra {name}" for name in re.findall(r"pip install '?gptlab\[(\w+)\]", said) if name not in extras()]
    for function, keyword in re.findall(r"gptlab\.(\w+)\(\.\.\., (\w+)=", said):
        if keyword not in inspect.signature(getattr(gptlab, function)).parameters:
            wrong.append(f"{function}({keyword}=)")
    return wrong


def settings(section: str) -> set[str]:
    """The settings of a section of recipes."""
    if section == "model":
        return {field.name for field in fields(ModelConfig)} | {"preset"}
    kinds = [Recipe.model_fields[section].annotation]
    while kinds:
        kind: Any = kinds.pop()
        if hasattr(kind, "model_fields"):
            return set(kind.model_fields)
        kinds += getattr(kind, "__args__", ())
    return set()


def extras() -> set[str]:
    return set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])


def test_what_messages_name_is_there() -> None:
    wrong = {f"{module}:{line}": found for module, line, said in SENTENCES if (found := check(module, said))}
    assert not wrong
    # The test sees what it is about.
    assert sum(bool(OPTION.search(said)) for _, _, said in SENTENCES) > 100
    assert {"train", "prepare", "study", "generate"} <= {
        m[1] for _, _, said in SENTENCES for m in CALLED.finditer(said)
    }


@pytest.mark.parametrize(
    ("module", "said", "wrong"),
    [
        ("cli/train", "leave --held-out out", ["--held-out"]),
        ("cli/prepare", "leave --held-out out", []),
        ("text/shards", "give --held-outs", ["--held-outs"]),
        ("text/shards", "go on with gptlab train --resume {} --out {}", []),
        ("text/shards", "go on with gptlab train --resume {} --held-out 1", ["train --held-out"]),
        ("text/shards", "gptlab trian {}", ["gptlab trian"]),
        ("text/shards", "gptlab train finetun --data {}", ["recipe finetun"]),
        ("training/loop", "lower batch.sizes, or data.items", ["batch.sizes"]),
        ("hub", "pip install 'gptlab[hubs]'", ["extra hubs"]),
        ("hub", "gptlab.load(..., tokeniser='gpt2')", ["load(tokeniser=)"]),
    ],
)
def test_the_check_finds_what_is_wrong(module: str, said: str, wrong: list[str]) -> None:
    assert check(module, said) == wrong


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="the harness is not installed")
def test_what_the_harness_is_told_it_takes() -> None:
    named = {name for module, _, said in SENTENCES if module == "harness/adapter" for name in OPTION.findall(said)}
    help_ = subprocess.run(
        [sys.executable, "-m", "lm_eval", "run", "--help"], capture_output=True, text=True, check=True
    )
    assert named
    assert named <= set(OPTION.findall(help_.stdout))


# --- followed to the letter -------------------------------------------------------------------------------------

RECIPE = """
[model]
preset = "tiny"
context_length = 32
[tokenizer]
kind = "bytes"
[data]
held_out = 0.1
[batch]
size = 4
[schedule]
warmup_steps = 0
[budget]
steps = 2
[train]
dtype = "float32"
compile = false
"""
SHORT = ("--set", "budget.steps=1", "--set", "batch.size=2", "--set", "train.compile=false")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with a recipe, a text, and a model of bytes with a window, in which commands run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loop, "peak_flops", lambda device, dtype: (1e9, "not measured"))  # takes a second
    Path("small.toml").write_text(RECIPE)
    Path("a.txt").write_text("the cat sees the dog.\n" * 200)
    model = gptlab.GPT(ModelConfig.preset("tiny", vocab_size=257, context_length=32, window=8, sinks=2))
    gptlab.save(gptlab.LanguageModel(model, byte_tokenizer()), "windowed")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tmp_path
    torch.set_num_threads(threads)


@pytest.fixture
def ask(run: Run) -> Callable[[str], str]:
    """Run a command line that must be refused; return its sentence."""

    def refused(line: str) -> str:
        code, _, err = run(*shlex.split(line))
        assert code == 2, err
        return err.splitlines()[-1].removeprefix("gptlab: ")

    return refused


@pytest.fixture
def follow(run: Run) -> Callable[[str], str]:
    """Run a command line that must work; return what it says."""

    def works(line: str) -> str:
        code, out, err = run(*shlex.split(line.removeprefix("gptlab ")))
        assert code == 0, err
        return out + err

    return works


Ask = Follow = Callable[[str], str]
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def test_the_tokenizer_of_a_run(here: Path, ask: Ask, follow: Follow) -> None:
    """Data of another tokenizer are prepared again with that of the base, which may be a run."""
    follow("train small.toml --corpus a.txt --out base")
    follow("prepare a.txt --tokenizer chars --held-out 0.1 --out chars")
    said = ask("train finetune --from base --data chars --out b")
    assert said.endswith("; prepare it again with --tokenizer base")
    follow(f"prepare a.txt --held-out 0.1 --out again {said[said.index('--tokenizer') :]}")
    follow(f"train finetune --from base --data again --out b {shlex.join(SHORT)}")
    assert "holds no tokenizer;" in ask("prepare a.txt --out c --tokenizer chars/tokenizer.json")
    assert "did you mean 'bytes'" in ask("prepare a.txt --out c --tokenizer byte")


def test_a_run_without_a_checkpoint(here: Path, ask: Ask, follow: Follow) -> None:
    follow("train small.toml --corpus a.txt --out r")
    shutil.rmtree("r/checkpoints")
    said = ask("generate --model r a")
    follow(said.partition("or go on with it: ")[2])
    follow("generate --model r --max-new-tokens 1 a")


def test_data_that_are_texts(here: Path, ask: Ask, follow: Follow) -> None:
    Path("texts").mkdir()
    shutil.copy("a.txt", "texts")
    said = ask("train small.toml --data texts --out r")
    assert "make one with gptlab prepare TEXTS --out DIR" in said
    follow("prepare texts --out dir --tokenizer bytes --held-out 0.1")
    said = ask("prepare texts --out dir")
    assert "choose another place, remove it, or add to the data there with --append" in said
    follow("prepare texts --out dir --append")
    follow("train small.toml --data dir --out r")


def test_a_model_that_is_to_change_comes_from_convert(here: Path, ask: Ask, follow: Follow) -> None:
    follow("prepare a.txt --tokenizer bytes --held-out 0.1 --out data")
    rest = f"--data data {shlex.join(SHORT)}"
    said = ask(f"train finetune --from windowed --window 4 --out r {rest}")
    assert said.endswith("leave that out, or change the model first with gptlab convert windowed")
    follow(f"train finetune --from windowed --out r {rest}")
    follow("convert windowed --window 4 --no-calibration --out narrow")
    follow(f"train finetune --from narrow --out s {rest}")
    assert "such as finetune, or" in ask(f"train small.toml --from windowed --out t {rest}")


def test_full_attention_for_llama_cpp(here: Path, ask: Ask, follow: Follow) -> None:
    pytest.importorskip("gguf")
    model = gptlab.GPT(ModelConfig.preset("tiny", vocab_size=50257, n_embd=32, window=8, sinks=2))
    gptlab.save(gptlab.LanguageModel(model, GPT2Tokenizer()), "model")
    said = ask("export model --format gguf --no-verify --out m.gguf")
    cap = re.search(r"with (--context \d+),", said)
    assert cap
    follow(f"export model --format gguf --no-verify --out capped.gguf {cap[1]}")
    command = said.partition("full attention: ")[2].replace("MODEL", "model")
    follow(f"{command} --no-calibration --out full")
    follow("export full --format gguf --no-verify --out full.gguf")


@pytest.mark.parametrize(
    ("line", "advice"),
    [
        ("--position rope --rotary fit --no-calibration", "take --rotary abrupt"),
        ("--n-kv-head 1 --refit --no-calibration", "leave --no-calibration out, or --refit"),
        ("--n-kv-head 4 --method mean", "give --n-kv-head, or leave them"),
        ("--rope-scaling yarn --rope-factor 2", "give --position rope, or leave --rope-scaling and --rope-factor out"),
        ("--position rope --rope-factor 2 --no-calibration", "--rope-scaling and --rope-factor go together"),
    ],
)
def test_conversions_are_told_the_flags_of_the_command(here: Path, ask: Ask, line: str, advice: str) -> None:
    assert advice in ask(f"convert windowed --out o {line}")
    assert not Path("o").exists()


def test_a_converted_model_is_trained_as_it_says(here: Path, ask: Ask, follow: Follow) -> None:
    follow("prepare a.txt --tokenizer bytes --held-out 0.1 --out data")
    for i, change in enumerate(("--window none", "--context 64", "--position blend --no-calibration")):
        said = follow(
            f"convert windowed {change} --calibration a.txt --out new{i}"
            if "no-c" not in change
            else f"convert windowed {change} --out new{i}"
        )
        line = said.partition("continue its training: ")[2].splitlines()[0]
        assert ("distill.teacher=windowed" in line) == (change != "--context 64")
        line = line.replace("DATA", "data").replace("TOKENS", "20000")
        follow(f"{line} --out run{i} --set train.compile=false --set train.evaluate_every=5")
    assert "nothing is written" in follow("convert run2 --position rope --out end")
    said = ask("convert new2 --position rope --out end")
    line = said.partition("train it to there: ")[2].replace("MODEL", "new2").replace("DATA", "data")
    follow(f"{line} --out run3 --set budget.tokens=1000 --set train.compile=false")
    assert gptlab.load("run3").config.position == "rope"


def test_a_share_of_what_nobody_wrote_down(here: Path, ask: Ask, follow: Follow) -> None:
    follow("prepare a.txt --tokenizer bytes --held-out 0.1 --out data")
    line = "train uptrain --from windowed --data data --set train.compile=false"
    said = ask(f"{line} --out r")
    assert "with --set budget.of=..., or give budget.tokens instead" in said
    follow(f"{line} --out r --set budget.of=5000")
    follow(f"{line} --out s --set budget.tokens=500")


def test_weights_without_a_tokenizer(here: Path, ask: Ask, follow: Follow) -> None:
    config = ModelConfig.preset("tiny", vocab_size=257)
    gptlab.save(gptlab.LanguageModel(gptlab.GPT(config)), "bare")
    said = ask("generate --model bare --max-new-tokens 1 a")
    assert said.endswith("or --tokenizer gpt2 of gptlab generate and gptlab evaluate")
    follow("generate --model bare --tokenizer bytes --max-new-tokens 1 a")
    follow("evaluate bare --tokenizer bytes --task text:a.txt")
    shutil.copy("windowed/tokenizer.json", "bare")
    follow("generate --model bare --max-new-tokens 1 a")


def test_nanogpts_characters(here: Path, ask: Ask, follow: Follow) -> None:
    folder = here / "char"
    folder.mkdir()
    shutil.copy("a.txt", folder / "input.txt")
    for name in ("train.bin", "val.bin"):
        (folder / name).write_bytes(bytes(100))
    (folder / "meta.pkl").write_bytes(b"")
    said = ask("train small.toml --data char --out r")
    command = said.partition("the same data with ")[2].replace("DIR", "data")
    follow(command)
    follow("train small.toml --data data --out r")


def test_a_study_that_is_damaged_names_its_directory(here: Path, ask: Ask) -> None:
    Path("s").mkdir()
    for content in ("{", "{}", json.dumps({"format": "gptlab study results", "version": 1})):
        Path("s/results.json").write_text(content)
        assert ask("report s").endswith("; make it again: gptlab study --resume --out s")
