# `gptlab evaluate`: tables, JSON, and what it says when something is wrong.
from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import gptlab
from gptlab.evaluation.tasks import evaluate
from gptlab.text.tokenizers import byte_tokenizer

Run = Callable[..., tuple[int, str, str]]
COMMAND = ("evaluate",)


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")


ITEMS = Path(__file__).parent.parent / "evaluation" / "hellaswag_items.jsonl"


def model(folder: Path, seed: int, **overrides: Any) -> Path:
    torch.manual_seed(seed)
    gpt = gptlab.GPT(gptlab.ModelConfig.preset("tiny", **{"vocab_size": 257, **overrides}))
    with torch.no_grad():
        for parameter in gpt.parameters():
            parameter.add_(torch.randn_like(parameter) / 10)
    tokenizer = byte_tokenizer() if gpt.config.vocab_size == 257 else None
    gptlab.save(gptlab.LanguageModel(gpt, tokenizer), folder)
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model(tmp_path_factory.mktemp("models") / "tiny", 1)


@pytest.fixture(scope="module")
def rope(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model(tmp_path_factory.mktemp("models") / "rope", 2, position="rope")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "novel.txt"
    path.write_text("".join(f"Chapter {i}. It was the best of times.\n<|endoftext|>\n" for i in range(30)) + "x" * 300)
    return path


@pytest.fixture(scope="module")
def lambada(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "lambada.jsonl"
    path.write_text("".join(json.dumps({"text": f"one two three {i}"}) + "\n" for i in range(12)))
    return path


# --- what it prints -------------------------------------------------------------------------------------------


def test_a_table_with_its_protocol(run: Run, tiny: Path, text: Path) -> None:
    code, out, err = run(tiny, "--task", f"text:{text}", "--stride", 32)
    lm = gptlab.load(tiny)
    expected = evaluate(lm.model, lm.needs_tokenizer(), f"text:{text}", stride=32)
    assert (code, err) == (0, "")
    assert f"{expected.metrics['nats_per_token']:.4f}" in out
    assert f"{expected.metrics['bits_per_byte']:.4f}" in out
    tokens = sum(score.tokens for score in expected.scores)
    scored = f"{tokens:,} tokens scored, each document from <|endoftext|>; data {expected.data['sha256'][:12]}."
    assert f"stride 32, context 64, float32; {scored}" in out


def test_two_protocols_never_share_a_table(run: Run, tiny: Path, lambada: Path) -> None:
    tasks = ["lambada:last-word", "lambada:last-token", "hellaswag:lm-eval"]
    flags = [word for task in tasks for word in ("--task", task)]
    code, out, _ = run(tiny, *flags, "--data", f"lambada={lambada}", "--data", f"hellaswag={ITEMS}", "--limit", 10)
    assert code == 0
    sections = out.strip().split("\n\n")
    assert [section.split("\n")[0] for section in sections] == tasks
    assert "lambada.jsonl is not the official file; the first 10 only." in sections[0]
    assert "OpenAI's 124M" in sections[0]
    assert "accuracy 0.3256, perplexity 40.06 (EleutherAI/lm-evaluation-harness issue 2159)" in sections[0]
    assert " ± " in sections[2]


def test_json_and_the_file(run: Run, tiny: Path, text: Path, lambada: Path, tmp_path: Path) -> None:
    out = tmp_path / "results" / "all.json"
    tasks = ["--task", f"text:{text}", "--task", "lambada:last-word", "--data", f"lambada={lambada}"]
    code, printed, _ = run(tiny, *tasks, "--json", "--out", out)
    shown, kept = json.loads(printed), json.loads(out.read_text())
    assert code == 0
    assert [result["protocol"] for result in shown["results"]] == [f"text:{text}", "lambada:last-word"]
    for result in shown["results"]:
        assert set(result) == {"protocol", "settings", "model", "data", "metrics", "seconds"}
        assert result["model"]["name"] == str(tiny)
        assert len(result["model"]["sha256"]) == len(result["data"]["sha256"]) == 64
        assert result["seconds"] > 0
    scores = kept["results"][1].pop("scores")
    assert kept["results"][1] == shown["results"][1]
    assert {name: len(column) for name, column in scores.items()} == dict.fromkeys(
        ("nats", "tokens", "words", "bytes", "correct"), 12
    )


def test_several_models_are_compared_in_pairs(run: Run, tiny: Path, rope: Path, text: Path) -> None:
    code, out, _ = run(tiny, rope, "--task", f"text:{text}")
    assert code == 0
    lm, other = gptlab.load(tiny), gptlab.load(rope)
    task = f"text:{text}"
    first, second = (evaluate(one.model, one.needs_tokenizer(), task) for one in (lm, other))
    difference = second.metrics["nats_per_token"] - first.metrics["nats_per_token"]
    assert f"{rope} - {tiny}: {difference:+.4f} nats per token (95% interval" in out
    assert "31 documents" in out
    _, printed, _ = run(tiny, rope, "--task", f"text:{text}", "--json")
    row = json.loads(printed)["differences"][0]
    assert (row["of"], row["minus"], row["protocol"]) == (str(rope), str(tiny), f"text:{text}")
    assert row["low"] < row["mean"] < row["high"]
    assert row["mean"] == pytest.approx(difference)


def test_models_that_do_not_compare_say_why(run: Run, tiny: Path, text: Path) -> None:
    code, out, _ = run(tiny, "pocket", "--task", f"text:{text}")
    assert code == 0
    assert f"pocket - {tiny}: no difference: " in out


def test_answers_are_compared_by_accuracy(run: Run, tiny: Path, rope: Path) -> None:
    _, printed, _ = run(tiny, rope, "--task", "hellaswag:completion", "--data", f"hellaswag={ITEMS}", "--json")
    values = json.loads(printed)
    one, other = (result["metrics"]["accuracy_norm"] for result in values["results"])
    assert values["differences"][0]["measure"] == "accuracy"
    assert values["differences"][0]["mean"] == pytest.approx(other - one)


def test_by_position(run: Run, tiny: Path, rope: Path, tmp_path: Path) -> None:
    path = tmp_path / "long.txt"
    path.write_text("abcdefgh " * 120)
    code, out, _ = run(tiny, rope, "--task", f"text:{path}", "--by-position")
    assert code == 0
    table = out[out.index("loss by position") :]
    assert [line.split("│")[1].strip() for line in table.splitlines() if " to " in line] == [
        *("1 to 16", "17 to 32", "33 to 64", "65 to 128", "129 to 256", "257 to 512", "513 to 1,024")
    ]
    assert f"{tiny}: 16 pieces of 64 tokens." in out
    assert f"{rope}: 1 pieces of 1,024 tokens." in out
    _, printed, _ = run(tiny, rope, "--task", f"text:{path}", "--by-position", "--json")
    rows = json.loads(printed)["positions"]
    assert [(row["model"], row["positions"][-1]["last"]) for row in rows] == [(str(tiny), 64), (str(rope), 1024)]
    assert rows[1]["positions"][0]["error"] is None  # of one piece there is none


def test_the_papers_table(run: Run, tiny: Path, lambada: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from gptlab.evaluation import data

    monkeypatch.setenv("GPTLAB_CACHE", str(tmp_path))
    nowhere = data.SOURCES["wikitext"].__class__("WikiText-2", "http://127.0.0.1:9/x", "x", "")
    monkeypatch.setitem(data.SOURCES, "wikitext", nowhere)
    code, out, _ = run(tiny, "--paper-table", "--data", f"lambada={lambada}")
    lm = gptlab.load(tiny)
    result = evaluate(lm.model, lm.needs_tokenizer(), "lambada:last-token", data={"lambada": lambada})
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if "│" in line]
    assert code == 0
    assert [row[:3] for row in rows] == [
        ["LAMBADA", "perplexity", "35.13"],
        ["LAMBADA", "accuracy, %", "45.99"],
        ["CBT-CN", "accuracy, %", "87.65"],
        ["CBT-NE", "accuracy, %", "83.40"],
        ["WikiText-2", "perplexity", "29.41"],
        ["PTB", "perplexity", "65.85"],
        ["enwik8", "bits per byte", "1.16"],
        ["text8", "bits per character", "1.17"],
        ["WikiText-103", "perplexity", "37.50"],
        ["1BW", "perplexity", "75.20"],
    ]
    assert rows[0][3:] == ["lambada:last-token", f"{result.metrics['perplexity']:.2f}"]
    assert rows[1][3:] == ["lambada:last-token", f"{100 * result.metrics['accuracy']:.2f}"]
    assert rows[4][3:] == ["wikitext:token", "-"]
    assert "WikiText-2: WikiText-2 is not here and cannot be downloaded" in out
    for name in ("CBT-CN", "CBT-NE", "PTB", "enwik8", "text8", "1BW"):
        assert f"{name}: no protocol here" in out


def test_help_does_not_wait_for_torch() -> None:
    code = (
        "import sys; from gptlab.cli import main\n"
        "sys.argv = ['gptlab', 'evaluate', '--help']\n"
        "try: main()\n"
        "except SystemExit as stop: assert not stop.code\n"
        "heavy = {'torch', 'numpy', 'tokenizers', 'tiktoken'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# --- what it refuses ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "nothing to measure; name a --task"),
        (["--task", "lambada"], "measured by several protocols; name one"),
        (["--task", "lambda:last-word"], "did you mean 'lambada:last-word'"),
        (["--task", "text:nowhere.txt"], "nowhere.txt"),
        (["--task", "lambada:last-word", "--data", "lambada=nowhere"], "nowhere cannot be read: No such file"),
        (["--task", "lambada:last-word", "--data", "lambada"], "--data takes name=file"),
        (["--task", "lambada:last-word", "--data", "lamda=x"], "did you mean 'lambada'"),
        (["--task", "lambada:last-word", "--stride", "4"], "--stride has no effect on lambada:last-word"),
        (["--task", "lambada:last-word", "--by-position"], "--by-position needs a text"),
        (["--task", "TEXT", "--stride", "65"], "stride must be 1 to 64"),
        (["--task", "TEXT", "--stride", "0"], "stride must be 1 to 64"),
        (["--task", "TEXT", "--context", "65"], "learned positions"),
        (["--task", "TEXT", "--limit", "0"], "limit must be at least 1"),
        (["--task", "TEXT", "--dtype", "float16"], "--dtype must be one of float32, bfloat16"),
        (["--task", "TEXT", "--tokenizer", "gpt2"], "they do not fit"),
    ],
)
def test_one_sentence_and_exit_code_2(run: Run, tiny: Path, text: Path, arguments: list[str], words: str) -> None:
    code, out, err = run(tiny, *(argument.replace("TEXT", f"text:{text}") for argument in arguments))
    assert (code, out) == (2, "")
    assert words in err
    assert err.startswith("gptlab: ")
    assert err.count("\n") == 1


def test_an_empty_file_and_a_model_without_a_tokenizer(run: Run, tiny: Path, text: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    assert "there is no text in" in run(tiny, "--task", f"text:{empty}")[2]
    bare = model(tmp_path / "bare", 3, vocab_size=300)
    assert "without a tokenizer" in run(bare, "--task", f"text:{text}")[2]


def test_a_place_that_cannot_be_written_is_refused_first(run: Run, tiny: Path, text: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for out, words in ((tmp_path, "is a directory"), (tmp_path / "file" / "all.json", "cannot write to")):
        code, printed, err = run(tiny, "--task", f"text:{text}", "--out", out)
        assert (code, printed) == (2, "")
        assert words in err


def test_a_short_text_warns_of_its_stride(run: Run, tiny: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("short")
    with pytest.warns(UserWarning, match="stride 8 has no effect: every text fits into one window"):
        code, out, _ = run(tiny, "--task", f"text:{short}", "--stride", 8)
    assert code == 0
    assert "stride 8, context 64" in out


def test_records_whose_text_has_another_name(run: Run, rope: Path, tmp_path: Path) -> None:
    """The advice of the refusal, followed to the letter, scores what a file with the usual name does."""
    texts = [f"Chapter {i}. It was the best of times." for i in range(9)]
    for name in ("text", "content"):
        lines = (json.dumps({name: text}) + "\n" for text in texts)
        (tmp_path / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8-sig")
    measured = []
    for name, advice in (("text", []), ("content", ["--text-field", "content"])):
        arguments = [rope, "--task", f"text:{tmp_path / name}.jsonl", "--by-position", "--json"]
        if advice:
            code, _, err = run(*arguments)
            assert code == 2
            assert "name the one to read with " + " ".join(advice) in err
        code, out, err = run(*arguments, *advice)
        assert code == 0, err
        values = json.loads(out)
        measured.append((values["results"][0]["metrics"], values["results"][0]["data"]["sha256"]))
    assert measured[0] == measured[1]
    code, _, err = run(rope, "--task", "lambada:last-word", "--text-field", "content")
    assert code == 2
    assert "--text-field applies to the records of a text" in err
