"""The command as people call it: pipes, files, terminals that cannot show every character."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.models import tiny_lm

import gptlab
from gptlab.cli.prompts import read_prompt, repair, unescape
from gptlab.errors import GptlabError
from gptlab.text.tokenizers import byte_tokenizer

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tiny") / "model"
    gptlab.save(tiny_lm(position="rope"), directory)
    return directory


def shell(*arguments: object, stdin: bytes | int = b"", **env: str) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "gptlab", *map(str, arguments)]
    source = {"input": stdin} if isinstance(stdin, bytes) else {"stdin": stdin}
    environment = {**os.environ, **env}
    return subprocess.run(command, capture_output=True, timeout=300, check=False, env=environment, **source)  # type: ignore[call-overload, no-any-return]


# --- characters that cannot be shown --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("env", "shown"),
    [
        ({"PYTHONIOENCODING": "ascii"}, b"na\\xefve \\U0001f999"),
        ({"PYTHONIOENCODING": "cp1252"}, b"na\xefve \\U0001f999"),
        ({"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, b"na\\xefve \\U0001f999"),
        ({"LC_ALL": "C"}, "naïve 🦙".encode()),
    ],
)
def test_what_a_terminal_cannot_show_is_escaped(tiny: Path, env: dict[str, str], shown: bytes) -> None:
    done = shell("generate", "naïve 🦙", "--model", tiny, "--max-new-tokens", 3, "--seed", 1, **env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(shown)
    assert b"Traceback" not in done.stderr


def test_json_is_json_whatever_the_terminal_knows(tiny: Path, tmp_path: Path) -> None:
    text = tmp_path / "ünder.txt"
    text.write_text("naïve 🦙 " * 9, encoding="utf-8")
    for arguments in (
        ("generate", "naïve 🦙", "--max-new-tokens", 3, "--model", tiny),
        ("evaluate", tiny, "--task", f"text:{text}"),
    ):
        done = shell(*arguments, "--json", PYTHONIOENCODING="ascii")
        assert done.returncode == 0, done.stderr
        values = json.loads(done.stdout.decode("ascii"))
        assert values.get("prompt", "naïve 🦙") == "naïve 🦙"


# --- tables in pipes ------------------------------------------------------------------------------------------


def test_a_table_in_a_pipe_is_not_cut(run: Run, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    name = str(tiny.parent / ("x" * 60) / ".." / "model")
    (tiny.parent / ("x" * 60)).mkdir(exist_ok=True)
    code, out, _ = run("inspect", name, "--window", "8")
    assert code == 0
    row = next(line for line in out.splitlines() if name in line)
    assert f"{name} changed" in row


# --- where a prompt comes from --------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [b"The dog", b"The dog\n", b"The dog\r\n", b"\xef\xbb\xbfThe dog\n"])
def test_a_piped_prompt_is_read(tiny: Path, data: bytes) -> None:
    flags = ("--model", tiny, "--max-new-tokens", 5, "--greedy")
    expected = shell("generate", "The dog", *flags).stdout
    assert expected.startswith(b"The dog")
    for extra in ((), ("-",), ("--prompt-file", "-")):
        done = shell("generate", *extra, *flags, stdin=data)
        assert (done.returncode, done.stdout) == (0, expected)


def test_without_anything_piped_a_new_document_begins(tiny: Path) -> None:
    flags = ("generate", "--model", str(tiny), "--max-new-tokens", "5", "--greedy", "--json")
    runs = [shell(*flags, stdin=b""), shell(*flags, stdin=b"\n"), shell(*flags, stdin=subprocess.DEVNULL)]
    if sys.platform != "win32":
        command = 'exec "$0" -m gptlab "$@" <&-'
        runs.append(subprocess.run(["sh", "-c", command, sys.executable, *flags], capture_output=True, check=False))
    for done in runs:
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["prompt"] is None
    refused = shell("generate", "-", "--model", tiny)
    assert (refused.returncode, refused.stdout) == (2, b"")
    assert refused.stderr == b"gptlab: standard input is empty; pipe some text to the command\n"


def test_a_prompt_file(run: Run, tiny: Path, tmp_path: Path) -> None:
    long = tmp_path / "long.txt"
    long.write_text("word " * 40_000, encoding="utf-8")  # more than Linux lets an argument have
    assert read_prompt(None, str(long)) == "word " * 40_000
    for encoding in ("utf-8-sig", "utf-16"):
        long.write_text("naïve 🦙\n\n", encoding=encoding)
        assert read_prompt(None, str(long)) == "naïve 🦙\n"
    code, out, _ = run("generate", "--prompt-file", long, "--model", tiny, "--max-new-tokens", 2, "--json")
    assert code == 0
    assert json.loads(out)["prompt"] == "naïve 🦙\n"


@pytest.mark.parametrize(
    ("prompt", "content", "said"),
    [
        ("Hello", b"x", "a prompt and --prompt-file are two prompts"),
        (None, b"\n", "is empty; put some text into it"),
        (None, b"caf\xe9", "is not UTF-8 text: byte 4 does not fit; convert it"),
        (None, None, "cannot be read: No such file"),
    ],
)
def test_prompt_files_that_are_refused(tmp_path: Path, prompt: str | None, content: bytes | None, said: str) -> None:
    if content is not None:
        (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(GptlabError, match=said):
        read_prompt(prompt, str(tmp_path / "a.txt"))
    with pytest.raises(GptlabError, match="cannot be read"):
        read_prompt(None, str(tmp_path))


def test_arguments_that_python_took_for_something_else_are_repaired() -> None:
    assert repair("naïve") == "naïve"
    assert repair(os.fsdecode("naïve".encode()) if sys.getfilesystemencoding() != "utf-8" else "naïve") == "naïve"
    assert repair("na\udcc3\udcafve") == "naïve"
    assert repair("caf\udce9") == "caf\udce9"  # refused later, in words


# --- the rest of the options ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "meant"),
    [(r"\n", "\n"), (r"a\tb\r", "a\tb\r"), (r"\\n", r"\n"), (r"\section", r"\section"), ("é\\", "é\\"), ("\n", "\n")],
)
def test_escapes_in_stop_strings(written: str, meant: str) -> None:
    assert unescape(written) == meant


def test_options_reach_the_sampler(run: Run, tiny: Path) -> None:
    def text(*flags: object) -> list[int]:
        arguments = ("generate", "Hello", "--model", tiny, "--max-new-tokens", 30, "--seed", 1, "--json", *flags)
        code, out, err = run(*arguments)
        assert code == 0, err
        return json.loads(out)["continuations"][0]["tokens"]  # type: ignore[no-any-return]

    greedy = text("--greedy")
    assert text("--min-p", 1) == text("--top-k", 1) == greedy
    assert len({tuple(text("--temperature", 5, *flags)) for flags in ((), ("--top-k", 0), ("--top-k", 3))}) == 3
    repeated = text("--greedy", "--repetition-penalty", 50)
    assert len(set(repeated)) > len(set(greedy))
    assert text("--device", "cpu") == text()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["generate", "Hello", "--device", "cuda:99"], "no device 'cuda:99' here"),
        (["generate", "--prompt-ids", "9" * 5000], "--prompt-ids takes token ids"),
        (["generate", "Hello", "--min-p", 2], "min_p must be 0 to 1"),
        (["generate", "Hello", "--repetition-penalty", "nan"], "repetition_penalty must be above 0"),
        (["generate", "Hello", "--num-samples", 10**12], "1,000,000,000,000 texts at once"),
        (["evaluate", "pocket", "--task", "text:{}", "--device", "gpu"], "no device 'gpu' here"),
    ],
)
def test_one_sentence(run: Run, tmp_path: Path, arguments: list[object], said: str) -> None:
    (tmp_path / "text").write_text("some text")
    code, out, err = run(*(str(part).format(tmp_path / "text") for part in arguments))
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert said in err


def test_a_billion_tokens_may_be_asked_for(run: Run, tiny: Path) -> None:
    arguments = ("generate", "Hello", "--model", tiny, "--max-new-tokens", 10**9, "--seed", 1)
    code, out, _ = run(*arguments, *(x for i in range(256) for x in ("--stop", chr(i) if i else "\ufffd")))
    assert code == 0
    assert out.startswith("Hello")


@pytest.mark.skipif(sys.platform == "win32", reason="signals differ there")
def test_an_interruption_loses_no_text(tmp_path: Path) -> None:
    # Without a row for the end of a text, none ends before the signal comes.
    model = gptlab.GPT(gptlab.ModelConfig.preset("tiny", vocab_size=256, position="rope"))
    gptlab.save(gptlab.LanguageModel(model, byte_tokenizer()), tmp_path / "endless")
    command = [
        sys.executable,
        "-m",
        "gptlab",
        "generate",
        "Hello",
        "--model",
        str(tmp_path / "endless"),
        "--max-new-tokens",
        "100000000",
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL)
    assert process.stdout is not None
    assert process.stdout.read(8).startswith(b"Hello")
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=100)
    assert process.returncode == 130
    assert out.endswith(b"\n")
    assert b"interrupted; --seed" in err
    assert b"Traceback" not in err


def test_the_help_says_every_default(run: Run) -> None:
    code, out, _ = run("generate", "--help")
    assert code == 0
    words = " ".join(out.split())
    for default in ("[default: 40]", "[default: 0.8]", "(default: from all)", "(default: a new one)", "[default: cpu]"):
        assert default in words
