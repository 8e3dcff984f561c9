"""`gptlab generate --batch`: thousands of prompts, interrupted and gone on with."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import lively

import gptlab
from gptlab.cli import batch
from gptlab.cli.answers import Answers
from gptlab.text.tokenizers import byte_tokenizer

Run = Callable[..., tuple[int, str, str]]
COMMAND = ("generate", "--batch")
N = 40
SHORT = ("--max-new-tokens", 12, "--seed", 5)
STOP = list("`*7dVsO")
STOPS = tuple(part for word in STOP for part in ("--stop", word))


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tiny") / "model"
    gptlab.save(gptlab.LanguageModel(lively(vocab_size=257, position="rope"), byte_tokenizer()), directory)
    return directory


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny: Path) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").symlink_to(tiny)
    (tmp_path / "p.txt").write_text("".join(f"{'a' * (i * 7 % 31)} prompt {i}\n" for i in range(N)))
    return tmp_path


def rows(path: str) -> list[dict[str, Any]]:
    content = Path(path).read_text()
    assert content.endswith("\n")
    return [json.loads(line) for line in content.splitlines()]


def lines(path: str) -> list[str]:
    return sorted(Path(path).read_text().splitlines())


def ask(run: Run, *arguments: object, prompts: str = "p.txt", out: str = "a.jsonl") -> str:
    code, printed, err = run(prompts, "--out", out, "--model", "model", *arguments)
    assert (code, printed) == (0, ""), err
    return err


def refusal(run: Run, *arguments: object, prompts: str = "p.txt", out: str = "a.jsonl") -> str:
    code, printed, err = run(prompts, "--out", out, "--model", "model", *arguments)
    assert (code, printed, err.count("\n")) == (2, "", 1), err
    return err


@pytest.mark.parametrize("step", ["1", "0"], ids=["compiled", "plain"])
def test_the_lines_are_the_rows_of_generate(run: Run, here: Path, step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if step == "0":
        monkeypatch.setattr(batch, "serves", lambda *_: False)
    err = ask(run, *SHORT, *STOPS)
    assert f"{N} prompts; 32 texts at a time, with caches of at most " in err
    assert err.splitlines()[-1].startswith(f"[{N} of {N} prompts, ")
    found = sorted(rows("a.jsonl"), key=lambda row: row["index"])
    prompts = Path("p.txt").read_text().splitlines()
    lm = gptlab.load("model")
    texts = lm.generate(prompts, max_new_tokens=12, temperature=0.8, top_k=40, seed=5, stop=STOP)
    assert [(row["index"], row["prompt"], row["text"]) for row in found] == list(
        zip(range(N), prompts, texts, strict=True)
    )
    assert all(set(row) == {"index", "prompt", "text", "tokens", "finish"} for row in found)
    assert {row["finish"] for row in found} == {"stop", "length"}
    if step == "0":
        assert json.loads(Path("a.jsonl.json").read_text())["compiled"] is False


def test_records_of_json_and_lines_that_are_none(run: Run, here: Path) -> None:
    records = [
        {"prompt": "Hello", "id": "a"},
        {"ids": list(b"Hello"), "id": 7, "more": 1},
        {"text": "x"},
        {"ids": [300]},
        {"prompt": "\ud800"},
        {"prompt": ""},
        {"prompt": "x", "ids": [1]},
        {"ids": "abc"},
        "Hello",
    ]
    Path("p.jsonl").write_text("\n".join(map(json.dumps, records)) + "\n\n{oops\n")
    err = ask(run, "--greedy", "--max-new-tokens", 4, prompts="p.jsonl")
    assert "10 prompts; 3 texts at a time" in err
    assert '; 7 without an answer, their "error" says why]' in err
    found = {row["index"]: row for row in rows("a.jsonl")}
    assert found[0]["tokens"] == found[1]["tokens"] == found[8]["tokens"]
    assert (found[0]["id"], found[1]["id"], found[1]["prompt"]) == ("a", 7, "Hello")
    for index, said in ((2, '"prompt" or "ids"'), (3, "id 300"), (4, "surrogate"), (5, "empty"), (9, "not JSON")):
        assert said in found[index]["error"]
    assert all("error" in found[index] for index in range(2, 8))


def test_a_prompt_that_is_too_long_stops_nothing(run: Run, here: Path) -> None:
    gptlab.save(gptlab.LanguageModel(lively(vocab_size=257), byte_tokenizer()), "short")
    Path("p.txt").write_text(f"one\n\n{'x' * 65}\n{'x' * 64}")
    ask(run, "--model", "short", "--max-new-tokens", 3)
    found = {row["index"]: row.get("error") or row["finish"] for row in rows("a.jsonl")}
    assert found == {
        0: "length",
        1: "the prompt is empty; give it some text",
        2: "the prompt has 65 tokens, the model's context holds 64; shorten the prompt",
        3: "context",
    }


@pytest.mark.parametrize("step", ["1", "0"], ids=["compiled", "plain"])
def test_an_interruption_loses_unfinished_texts_only(
    run: Run, here: Path, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if step == "0":
        monkeypatch.setattr(batch, "serves", lambda *_: False)
    ask(run, *SHORT, *STOPS, "--batch-size", 6, out="whole.jsonl")
    written = Answers.write

    def interrupted(self: Answers, row: dict[str, Any]) -> None:
        written(self, row)
        if len(self.done) == 17:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Answers, "write", interrupted)
        code, _, err = run("p.txt", "--out", "a.jsonl", "--model", "model", *SHORT, *STOPS, "--batch-size", 6)
    assert code == 130
    assert f"[17 of {N} prompts, " in err
    assert err.strip().endswith("; the same command goes on]")
    half = Path("a.jsonl").read_bytes()
    Path("a.jsonl").write_bytes(half[:-9])  # cut in the middle of a line
    again = ask(run, *SHORT, *STOPS, *(("--batch-size", 3) if step == "1" else ()))
    assert f"{N} prompts, 16 of them done already; " in again
    assert Path("a.jsonl").read_bytes().startswith(half[: half[:-1].rindex(b"\n") + 1])
    assert lines("a.jsonl") == lines("whole.jsonl")
    assert f"{N} of them done already" in ask(run, *SHORT, *STOPS)
    assert lines("a.jsonl") == lines("whole.jsonl")


@pytest.mark.skipif(sys.platform == "win32", reason="signals differ there")
def test_a_killed_process_is_gone_on_with(run: Run, here: Path) -> None:
    options = ("--max-new-tokens", 400, "--seed", 5, "--batch-size", 4)
    arguments = ["p.txt", "--out", "a.jsonl", "--model", "model", *map(str, options)]
    process = subprocess.Popen([sys.executable, "-m", "gptlab", *COMMAND, *arguments], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 200
    while not Path("a.jsonl").exists() or Path("a.jsonl").read_bytes().count(b"\n") < 5:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    n = Path("a.jsonl").read_bytes().count(b"\n")
    assert 5 <= n < N
    assert f"{n} of them done already" in ask(run, *options)
    ask(run, *options, out="whole.jsonl")
    assert lines("a.jsonl") == lines("whole.jsonl")


def test_the_seed_of_what_is_there_is_taken_again(run: Run, here: Path) -> None:
    ask(run, "--max-new-tokens", 6)
    whole = lines("a.jsonl")
    Path("a.jsonl").write_text("\n".join(whole[:9]) + "\n")
    ask(run, "--max-new-tokens", 6)
    assert lines("a.jsonl") == whole


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (("--seed", 6), "with --seed 5, not 6"),
        (("--temperature", 0.5), "with --temperature 0.8, not 0.5"),
        (("--top-p", 0.5), "with --top-p none, not 0.5"),
        (("--max-new-tokens", 13), "with --max-new-tokens 12, not 13"),
        (("--stop", "f"), 'with --stop none, not ["f"]'),
        (("--special",), "without --special"),
        (("--model", "other"), "with another model, or another --dtype"),
        (("--dtype", "bfloat16"), "with another model, or another --dtype"),
        (("--tokenizer", "gpt2"), "with another tokenizer"),
    ],
    ids=str,
)
def test_other_settings_are_refused(run: Run, here: Path, changed: tuple[object, ...], said: str) -> None:
    gptlab.save(gptlab.LanguageModel(lively(1, vocab_size=257, position="rope"), byte_tokenizer()), "other")
    Path("p.txt").write_text("a\n!\n")
    ask(run, *SHORT)
    before = Path("a.jsonl").read_bytes()
    assert f"a.jsonl was begun {said}; to go on with it give the same as then, or give another --out" in refusal(
        run, *SHORT, *changed
    )
    assert Path("a.jsonl").read_bytes() == before


def test_without_the_step_that_it_was_begun_with(run: Run, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ask(run, *SHORT)
    if not json.loads(Path("a.jsonl.json").read_text())["compiled"]:
        pytest.skip("there is no compiled step here")
    monkeypatch.setattr(batch, "serves", lambda *_: False)
    assert "with the compiled step, which is not to be had now" in refusal(run, *SHORT)
    assert "with --max-new-tokens 12, not 13" in refusal(run, "--max-new-tokens", 13, "--seed", 5)


def test_files_that_are_not_what_they_should_be(run: Run, here: Path) -> None:
    ask(run, *SHORT)
    good = Path("a.jsonl").read_text()
    Path("p.txt").write_text("something else\n")
    assert "was begun with another file of prompts" in refusal(run, *SHORT)
    Path("b.jsonl").write_text("mine\n")
    assert "b.jsonl is there, but not b.jsonl.json" in refusal(run, out="b.jsonl")
    assert Path("b.jsonl").read_text() == "mine\n"
    assert "--out is the file of prompts" in refusal(run, out="p.txt")
    assert "--out must be a file, and . is something else" in refusal(run, out=".")
    assert "cannot write to no/a.jsonl: No such file or directory" in refusal(run, out="no/a.jsonl")
    assert "--batch none.txt cannot be read: No such file" in refusal(run, prompts="none.txt", out="c.jsonl")
    Path("e.txt").touch()
    assert "--batch e.txt is empty; put a prompt on each line" in refusal(run, prompts="e.txt", out="c.jsonl")
    Path("e.txt").write_bytes(b"caf\xe9")
    assert "e.txt is not UTF-8 text" in refusal(run, prompts="e.txt", out="c.jsonl")
    Path("e.json").write_text("[]")
    assert "--batch takes JSON lines" in refusal(run, prompts="e.json", out="c.jsonl")
    Path("e.jsonl").write_text('{"text": "a"}\n')
    said = refusal(run, prompts="e.jsonl", out="c.jsonl")
    assert 'no line of e.jsonl can be continued; of prompt 1: the line is not an object with either "prompt"' in said
    assert not Path("c.jsonl").exists()
    Path("p.txt").write_text("".join(f"{'a' * (i * 7 % 31)} prompt {i}\n" for i in range(N)))
    Path("a.jsonl").write_text("mine\n" + good)
    assert "line 1 of a.jsonl is not an answer of this command" in refusal(run, *SHORT)
    Path("a.jsonl").write_text(good)
    Path("a.jsonl.json").write_text("{}")
    assert "a.jsonl.json is damaged (prompts)" in refusal(run, *SHORT)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("Hello",), "leave the prompt out"),
        (("--prompt-file", "p.txt"), "leave --prompt-file out"),
        (("--prompt-ids", "1"), "leave --prompt-ids out"),
        (("--num-samples", 2), "leave --num-samples out"),
        (("--json",), "leave --json out"),
        (("--batch-size", 0), "the batch size must be at least 1, got 0"),
        (("--max-new-tokens", 0), "max_new_tokens must be at least 1, got 0"),
        (("--max-new-tokens", 10**12), "1 text at a time takes"),
        (("--chat", "--special"), "--chat takes a message; leave out either it or --special"),
        (("--chat",), "this model has no chat template"),
        (("--top-p", 2), "top_p must be above 0"),
        (("--stop", ""), "a stop string is empty; leave it out"),
    ],
    ids=str,
)
def test_options_that_make_no_sense(run: Run, here: Path, arguments: tuple[object, ...], said: str) -> None:
    assert said in refusal(run, *arguments)
    assert not Path("a.jsonl").exists()
    assert not Path("a.jsonl.json").exists()


def test_options_of_a_batch_need_one(run: Run, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, _, err = run("p.txt")
    assert (code, err) == (2, "gptlab: --batch needs a file for the answers; name one with --out answers.jsonl\n")
    for option, value in (("--out", "a.jsonl"), ("--batch-size", "3")):
        monkeypatch.setattr(sys, "argv", ["gptlab", "generate", "Hello", option, value])
        with pytest.raises(SystemExit):
            gptlab.cli.main()


def test_two_processes_do_not_write_to_one_file(run: Run, here: Path) -> None:
    with Answers(Path("a.jsonl")):
        assert "another process is writing to a.jsonl; wait for its end" in refusal(run)


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs Linux")
def test_a_full_disk_loses_nothing(run: Run, here: Path, small_disk: Path) -> None:
    out = str(small_disk / "a.jsonl")
    ask(run, *SHORT, out="whole.jsonl")
    (small_disk / "filler").write_bytes(b"x" * (2 * 2**20 - 4 * 4096 - 1000))
    Path("long.txt").write_text("".join(f"{'a' * 900} {i}\n" for i in range(N)))
    said = run("long.txt", "--out", out, "--model", "model", *SHORT)
    assert said[0] == 2
    assert "No space left on device; make room, then the same command goes on from there" in said[2]
    (small_disk / "filler").unlink()
    ask(run, *SHORT, prompts="long.txt", out=out)
    ask(run, *SHORT, prompts="long.txt", out="whole.jsonl.2")
    assert lines(out) == lines("whole.jsonl.2")


def test_progress_on_a_pipe_is_a_line_now_and_then(capfd: pytest.CaptureFixture[str]) -> None:
    now, done = [0.0], set(range(20))
    progress = batch.BatchProgress(100, done, clock=lambda: now[0])
    with progress:
        for second in range(0, 60, 2):
            now[0] = second
            progress({"event": "step", "tokens": second * 10})
            done.add(20 + second)
    said = capfd.readouterr().err.splitlines()
    assert len(said) == 5
    assert said[1] == "30 of 100 prompts, 200 tokens, 10.0 tokens a second, 0:02:20 left"
    assert "\x1b" not in "".join(said)
