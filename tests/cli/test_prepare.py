"""`gptlab prepare`: what it prints, where, and what it refuses."""

from __future__ import annotations

import gzip
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import gptlab
from gptlab.checkpoints import Checkpoint, gguf
from gptlab.text.shards import open_dataset
from gptlab.text.tokenizers import GPT2Tokenizer, byte_tokenizer

Run = Callable[..., tuple[int, str, str]]
COMMAND = ("prepare",)


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text("\n<|endoftext|>\n".join(f"document {i}: some text" for i in range(200)))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(b'{"text": "naive"}\n{"text": "caf\\u00e9"}\n'))
    return folder


@pytest.mark.parametrize("kind", ["gpt2", "bytes", "chars", "bpe"])
def test_the_summary_tells_what_is_there(run: Run, texts: Path, tmp_path: Path, kind: str) -> None:
    size = ["--vocab-size", 300] if kind == "bpe" else []
    code, out, err = run(texts, "--tokenizer", kind, *size, "--out", tmp_path / "data", "--held-out", 0.2)
    assert (code, err) == (0, f"making the {kind} tokenizer\n" if kind in ("chars", "bpe") else "")
    dataset = open_dataset(tmp_path / "data")
    dataset.verify()
    training, validation = dataset.training, dataset.validation
    assert training.n_documents + validation.n_documents == 202
    n_bytes, n_tokens = training.n_bytes + validation.n_bytes, len(training) + len(validation)
    assert f"{dataset.tokenizer.vocab_size:,} ids in the vocabulary, {n_bytes / n_tokens:.2f} bytes per token" in out
    for name, split in (("training", training), ("validation", validation)):
        assert re.search(rf"{name} +{len(split):,} tokens, {split.n_documents:,} documents\n", out)
    assert out.endswith(f"train on it: gptlab train pocket --data {tmp_path / 'data'} --out runs/data\n")


def test_gpt2_is_the_default(run: Run, texts: Path, tmp_path: Path) -> None:
    assert run(texts, "--out", tmp_path / "data")[0] == 0
    assert isinstance(open_dataset(tmp_path / "data").tokenizer, GPT2Tokenizer)


def test_lines(run: Run, tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("emma\nolivia\nava\n")
    code, out, _ = run(tmp_path / "names.txt", "--per-line", "--tokenizer", "chars", "--out", tmp_path / "data")
    assert code == 0
    assert re.search(r"training +\d+ tokens, 2 lines\n", out)
    assert re.search(r"held out +\d bytes, \d+\.\d+% of the text; 1\.000% was asked for\n", out)
    assert "gptlab train names --data" in out
    assert open_dataset(tmp_path / "data").items


@pytest.mark.parametrize(("text", "noted"), [("a<|endoftext|>b\nc\n", True), ("a<|endoftext|>\nb<|endoftext|>", False)])
def test_a_mark_inside_a_line_gets_one_note(run: Run, tmp_path: Path, text: str, noted: bool) -> None:
    (tmp_path / "a.txt").write_text(text * 5)
    code, out, _ = run(tmp_path / "a.txt", "--tokenizer", "bytes", "--held-out", 0.3, "--out", tmp_path / "data")
    assert code == 0
    assert out.count("note: <|endoftext|> inside a line is text and ends no document, as in 'a<|endoftext|>b") == noted
    (tmp_path / "b.txt").write_text(text.replace("<|endoftext|>", "<|endoftext|>\n"))  # as the note says
    assert "note:" not in run(tmp_path / "b.txt", "--append", "--out", tmp_path / "data")[1]


def test_a_validation_text_of_ones_own(run: Run, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n<|endoftext|>\ntwo\n")
    (tmp_path / "held.csv").write_text("body\ntwo\nthree\n")
    arguments = (tmp_path / "a.txt", "--validation", tmp_path / "held.csv", "--text-field", "body")
    code, out, err = run(*arguments, "--tokenizer", "bytes", "--out", tmp_path / "data")
    assert (code, err) == (0, "")
    assert "held out    8 bytes, 50.000% of the text: the validation text given\n" in out
    assert "note: 1 of the documents to train on are in the validation text too\n" in out
    dataset = open_dataset(tmp_path / "data")
    texts = [[dataset.tokenizer.decode(i) for i in part.documents()] for part in (dataset.training, dataset.validation)]
    assert texts == [["one\n", "two\n"], ["two", "three"]]
    more = ("--out", tmp_path / "data", "--append")
    assert run(tmp_path / "a.txt", *more)[0] == 0
    assert open_dataset(tmp_path / "data").validation.n_documents == 2
    assert run(tmp_path / "a.txt", *more, "--validation", tmp_path / "a.txt")[0] == 2
    assert run(*arguments, "--held-out", 0.1, "--out", tmp_path / "other")[0] == 2


def test_adding(run: Run, texts: Path, tmp_path: Path) -> None:
    run(texts / "a.txt", "--tokenizer", "bytes", "--out", tmp_path / "data", "--held-out", 0.3)
    for more in ([], ["--tokenizer", "bytes"]):
        code, out, err = run(texts / "b.jsonl.gz", "--out", tmp_path / "data", "--append", *more)
        assert (code, err) == (0, "")
    dataset = open_dataset(tmp_path / "data")
    dataset.verify()
    assert dataset.training.n_documents + dataset.validation.n_documents == 204
    assert f"training {len(dataset.training):>17,} tokens" in out


@pytest.mark.parametrize("where", ["directory", "pocket", "gguf"])
def test_the_tokenizer_of_a_model(run: Run, texts: Path, tmp_path: Path, where: str) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "tokenizer.json").write_bytes(byte_tokenizer().files()["tokenizer.json"])
    if where == "gguf":
        pocket = gptlab.load("pocket")
        gguf.write(tmp_path / "pocket.gguf", Checkpoint(pocket.config, pocket.model.tensors(), pocket.tokenizer))
    name = {"directory": model, "pocket": "pocket", "gguf": tmp_path / "pocket.gguf"}[where]
    assert run(texts, "--tokenizer", name, "--out", tmp_path / "data")[0] == 0
    tokenizer = open_dataset(tmp_path / "data").tokenizer
    assert tokenizer.vocab_size == (257 if where == "directory" else 4096)


def test_standard_input(tmp_path: Path) -> None:
    arguments = ["prepare", "-", "--tokenizer", "bytes", "--out", str(tmp_path / "data")]
    done = subprocess.run(
        [sys.executable, "-m", "gptlab", *arguments],
        input='{"text": "one"}\n{"text": "two"}\n',
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert f"{tmp_path / 'data'}: stdin, 0.0 MB" in done.stdout
    assert open_dataset(tmp_path / "data").training.n_documents == 1


def test_torch_is_not_needed(texts: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from gptlab.cli import main\n"
        f"sys.argv = ['gptlab', 'prepare', {str(texts)!r}, '--out', {str(tmp_path / 'data')!r}]\n"
        "try: main()\n"
        "except SystemExit as stop: assert not stop.code\n"
        "sys.exit('imported torch' if 'torch' in sys.modules else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_plain_lines_where_there_is_no_terminal(
    run: Run, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["gptlab.cli.prepare"], "PLAIN_SECONDS", 0.0)
    (texts / "c.txt").write_text("a line of text\n" * 100_000)
    code, out, err = run(texts, "--tokenizer", "bytes", "--out", tmp_path / "data")
    assert code == 0
    assert "\x1b" not in out + err
    assert re.search(r"^reading: 1\.\d MB(, [\d.,]+ MB/s)?, \d+ documents$", err, re.MULTILINE)
    assert re.search(r"^encoding: 1\.\d MB(, [\d.,]+ MB/s)?, [\d,]+ tokens$", err, re.MULTILINE)


def read_all(terminal: int) -> Iterator[str]:
    while True:
        try:
            content = os.read(terminal, 2**16)
        except OSError:  # how Linux says that the other side is closed
            return
        if not content:
            return
        yield content.decode(errors="replace")


@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminals there")
def test_a_bar_on_a_terminal(texts: Path, tmp_path: Path) -> None:
    ours, theirs = os.openpty()
    arguments = ["prepare", str(texts), "--tokenizer", "chars", "--out", str(tmp_path / "data")]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    process = subprocess.Popen(
        [sys.executable, "-m", "gptlab", *arguments], stdout=subprocess.PIPE, stderr=theirs, text=True, env=environment
    )
    os.close(theirs)
    shown = "".join(read_all(ours))
    out = process.communicate(timeout=60)[0]
    os.close(ours)
    assert process.returncode == 0, shown
    assert "\x1b[" in shown
    assert any(word in shown for word in ("reading", "making the chars tokenizer", "encoding"))
    assert out.startswith(f"{tmp_path / 'data'}: texts")
    assert "\x1b" not in out


# --- refusals -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["TEXTS", "--tokenizer", "gtp2"], "unknown tokenizer 'gtp2' (did you mean 'gpt2'?)"),
        (["TEXTS", "--tokenizer", "TEXTS"], "holds no tokenizer;"),
        (["TEXTS", "--vocab-size", 300], "--vocab-size has an effect with --tokenizer bpe only"),
        (["TEXTS", "--tokenizer", "bpe", "--vocab-size", 256], "at least 257 entries, got 256"),
        (["TEXTS", "--held-out", 0], "the share to hold out must be between 0 and 1, got 0"),
        (["TEXTS", "--held-out", 2], "the share to hold out must be between 0 and 1, got 2"),
        (["TEXTS", "--append"], "is not a dataset"),
        (["TEXTS", "--append", "--held-out", 0.1], "--append takes the tokenizer and the share to hold out from"),
        (["TEXTS", "--append", "--tokenizer", "chars"], "--append takes the tokenizer and the share to hold out from"),
        (["stdlbi"], "no corpus at stdlbi (did you mean 'stdlib'?)"),
        (["EMPTY"], "there is no text in empty"),
        (["LATIN"], "latin.txt is not UTF-8 text (byte 3)"),
        (["SHORT"], "the corpus short is too short to hold a part of it out"),
    ],
)
def test_refusals(run: Run, texts: Path, tmp_path: Path, arguments: list[object], complaint: str) -> None:
    files = {"empty": b"", "latin": b"caf\xe9", "short": b"no line end"}
    for name, content in files.items():
        (tmp_path / f"{name}.txt").write_bytes(content)
    places = {"TEXTS": texts, **{name.upper(): tmp_path / f"{name}.txt" for name in files}}
    code, out, err = run(*(places.get(str(a), a) for a in arguments), "--out", tmp_path / "data")
    assert (code, out) == (2, "")
    line = err.removeprefix("making the bpe tokenizer\n")
    assert line.startswith("gptlab: ")
    assert complaint in line
    assert line.count("\n") == 1
    assert not (tmp_path / "data").exists()
    assert not list(tmp_path.glob(".data*"))


def test_what_is_there_stays(run: Run, texts: Path, tmp_path: Path) -> None:
    run(texts, "--tokenizer", "bytes", "--out", tmp_path / "data")
    before = {path: path.read_bytes() for path in (tmp_path / "data").iterdir()}
    for more, complaint in (([], "exists already"), (["--append", "--tokenizer", "gpt2"], "ids of another tokenizer")):
        code, out, err = run(texts, "--out", tmp_path / "data", *more)
        assert (code, out) == (2, "")
        assert complaint in err
    assert {path: path.read_bytes() for path in (tmp_path / "data").iterdir()} == before
