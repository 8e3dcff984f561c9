"""`prepare`: the ids are the tokenizer's, and whatever happens there is a whole dataset or none."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptlab.errors import GptlabError
from gptlab.text import shards
from gptlab.text.datasets import Dataset, Split, open_dataset
from gptlab.text.documents import Documents, documents_of, open_documents
from gptlab.text.shards import NewTokenizer, append, prepare
from gptlab.text.splits import divide, survey
from gptlab.text.tokenizers import (
    FileTokenizer,
    GPT2Tokenizer,
    Tokenizer,
    byte_tokenizer,
    char_tokenizer,
    read_tokenizer,
    train_bpe,
)
from gptlab.training.data import Items

TEXTS = [f"document {i}: naïve café 東京 🙂 <|endoftext|> they'll\n\n  sit {i * i}\n" * (1 + i % 4) for i in range(60)]


def texts_of(dataset: Dataset, split: Split) -> list[str]:
    """The documents that the ids and the ends stand for."""
    assert split.document_ends is not None
    mark = dataset.tokenizer.end_of_text
    last = int(mark is not None)
    ends = split.document_ends.tolist()
    starts = [last, *ends[:-1]]
    if last:
        assert all(split.read(place - 1, place).tolist() == [mark] for place in [1, *ends])
    assert ends[-1] == len(split)
    texts = [dataset.tokenizer.decode(split.read(start, end - last)) for start, end in zip(starts, ends, strict=True)]
    assert texts == [dataset.tokenizer.decode(ids) for ids in split.documents()]
    return texts


def ids_of(tokenizer: Tokenizer, texts: Sequence[str]) -> list[int]:
    """One stream: the mark before each document, and after the last."""
    mark = [] if tokenizer.end_of_text is None else [tokenizer.end_of_text]
    return [i for ids in tokenizer.encode_batch(texts) for i in mark + ids] + mark


def rank(text: str) -> float:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def split_of(documents: Documents, held_out: float) -> tuple[list[str], list[str]]:
    division = divide(documents, survey(documents), held_out)
    parts: tuple[list[str], list[str]] = ([], [])
    for text, ends, side in division.parted():
        assert ends
        parts[side].append(text)
    return parts


def check_complete(dataset: Dataset, texts: Sequence[str]) -> None:
    """Each text is on one side, or its beginning is trained on and its end held out."""
    parts = [texts_of(dataset, split) for split in (dataset.training, dataset.validation)]
    for text in texts:
        side = next((part for part in parts if text in part), None)
        if side is not None:
            side.remove(text)
        else:
            head, tail = next((a, b) for a in parts[0] for b in parts[1] if a + b == text)
            parts[0].remove(head)
            parts[1].remove(tail)
    assert parts == [[], []]


def everything(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


# --- ids ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gpt2", "bytes", "chars", "bpe"])
def test_the_ids_are_those_of_the_tokenizer(tmp_path: Path, kind: str) -> None:
    documents = documents_of("mine", TEXTS)
    training, validation = split_of(documents, 0.2)
    dataset = prepare(documents, NewTokenizer(kind, 300), tmp_path / "data", held_out=0.2, shard_tokens=1000)
    expected: Tokenizer = {
        "gpt2": GPT2Tokenizer,
        "bytes": byte_tokenizer,
        "chars": lambda: char_tokenizer(TEXTS),  # an alphabet must hold the characters of both parts
        "bpe": lambda: train_bpe(training, 300),  # merges are learned from the training part alone
    }[kind]()
    assert dataset.tokenizer.files() == expected.files()
    assert {path.name for path in (tmp_path / "data").glob("*.*")} >= set(expected.files())
    for split, texts in ((dataset.training, training), (dataset.validation, validation)):
        ids = ids_of(expected, texts)
        assert split.read(0, len(split)).tolist() == ids
        assert len(split.shards) == -(-len(ids) // 1000)
        assert texts_of(dataset, split) == texts
        assert (split.n_documents, split.n_bytes) == (len(texts), sum(len(text.encode()) for text in texts))
    dataset.verify()


def test_the_ids_are_tiktokens(tmp_path: Path, gpt2_tokenizer: GPT2Tokenizer, shared: Path) -> None:
    path = shared / "data" / "enwiki.txt"
    if not path.exists():
        pytest.skip("shared/data is absent")
    (tmp_path / "enwiki.txt").write_text(path.open(encoding="utf-8").read(2_500_000), encoding="utf-8")
    documents = open_documents([str(tmp_path / "enwiki.txt")])
    dataset = prepare(documents, gpt2_tokenizer, tmp_path / "data", held_out=0.1)
    training, validation = split_of(documents, 0.1)
    for split, texts in ((dataset.training, training), (dataset.validation, validation)):
        batch = gpt2_tokenizer._encoding.encode_ordinary_batch(texts, num_threads=1)
        assert split.read(0, len(split)).tolist() == [i for ids in batch for i in [50256, *ids]] + [50256]


def test_one_document_longer_than_several_pieces(tmp_path: Path, gpt2_tokenizer: GPT2Tokenizer) -> None:
    rows = (f"{i} it's the {i * i}th line, naïve café...{' ' * (i % 5)}\n" for i in range(60_000))
    text = "".join(rows)
    assert len(text) > 2 * 2**20
    dataset = prepare(documents_of("long", [text]), gpt2_tokenizer, tmp_path / "data", held_out=0.01)
    cut = text.rfind("\n", 0, int(len(text) * 0.99)) + 1
    for split, part in ((dataset.training, text[:cut]), (dataset.validation, text[cut:])):
        assert split.read(0, len(split)).tolist() == [50256, *gpt2_tokenizer._encoding.encode_ordinary(part), 50256]
        assert (split.n_documents, split.n_bytes) == (1, len(part.encode()))


def test_a_vocabulary_trained_on_pieces_is_that_of_the_whole(tmp_path: Path) -> None:
    text = "".join(f"{i} it's the {i * i}th line, naïve café...{' ' * (i % 5)}\n" for i in range(6000))
    assert len(text) > 3 * 2**16
    dataset = prepare(documents_of("long", [text]), NewTokenizer("bpe", 600), tmp_path / "data", held_out=0.1)
    training = text[: text.rfind("\n", 0, int(len(text) * 0.9)) + 1]
    assert dataset.tokenizer.files() == train_bpe([training], 600).files()


def test_lines_are_items(tmp_path: Path) -> None:
    names = [f"{a}{b}" for a in ("em", "ol", "av", "is", "so") for b in ("ma", "ivia", "a", "abella", "phia")]
    (tmp_path / "names.txt").write_text("\n".join(names))
    documents = open_documents([str(tmp_path / "names.txt")], per_line=True)
    dataset = prepare(documents, NewTokenizer("chars"), tmp_path / "data", held_out=0.2)
    assert dataset.items
    assert open_dataset(tmp_path / "data").items
    assert sorted(texts_of(dataset, dataset.training) + texts_of(dataset, dataset.validation)) == sorted(names)
    assert dataset.tokenizer.vocab_size == len(set("".join(names))) + 1  # no line end among them


@pytest.mark.slow
def test_large_vocabularies_take_four_bytes(tmp_path: Path) -> None:
    alphabet = [chr(i) for i in range(0x20, 0x20000) if not 0xD800 <= i < 0xE000]
    texts = ["".join(alphabet), "\n".join(alphabet[::-1])]
    dataset = prepare(documents_of("many", texts), NewTokenizer("chars"), tmp_path / "data")
    assert dataset.training.read(0, 1).dtype == np.uint32
    [held_out] = texts_of(dataset, dataset.validation)  # the end of one of the two
    trained_on = texts_of(dataset, dataset.training)
    assert [text if text in texts else text + held_out for text in trained_on] == texts


def test_a_tokenizer_that_may_not_be_cut_gets_whole_documents(tmp_path: Path) -> None:
    from tokenizers import Tokenizer as Engine
    from tokenizers import decoders, models, pre_tokenizers

    values = json.loads(byte_tokenizer().files()["tokenizer.json"])
    engine = Engine(models.BPE(vocab={**values["model"]["vocab"], "dĠ": 256}, merges=[("d", "Ġ")]))
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=False)
    engine.decoder = decoders.ByteLevel()
    tokenizer = FileTokenizer(engine)
    assert not tokenizer.splits_as_gpt2
    text = "word " * 300_000
    dataset = prepare(
        documents_of("long", [text]), tokenizer, tmp_path / "data", validation=documents_of("other", ["short"])
    )
    # One space was put before the document, not one before every piece, and no merge was cut.
    assert len(dataset.training) == 1 + 4 * 300_000
    assert dataset.training.read(0, len(dataset.training)).tolist() == tokenizer.encode(text)


unicode_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


@settings(max_examples=150, derandomize=True, deadline=None, database=None)
@given(texts=st.lists(st.one_of(unicode_text, st.sampled_from(["<|endoftext|>", "  ", "\x1c", ""])), max_size=5))
def test_arrays_hold_what_encode_returns(gpt2_tokenizer: GPT2Tokenizer, texts: list[str]) -> None:
    tokenizers: list[Tokenizer] = [gpt2_tokenizer, byte_tokenizer(), train_bpe(TEXTS[:3], 280)]
    if "".join(texts):
        tokenizers.append(char_tokenizer(texts))
    for tokenizer in tokenizers:
        arrays = tokenizer.encode_arrays(texts)
        assert [array.tolist() for array in arrays] == [tokenizer.encode(text) for text in texts]
        assert all(array.dtype == np.uint32 for array in arrays)


def test_arrays_refuse_what_encode_refuses(gpt2_tokenizer: GPT2Tokenizer) -> None:
    with pytest.raises(GptlabError, match="lone surrogate"):
        gpt2_tokenizer.encode_arrays(["\ud800"])
    for text in ("abQ", "ab\U0001f642", "ab\0"):
        with pytest.raises(GptlabError, match="is not among the 2 that this model knows"):
            char_tokenizer(["ab"]).encode_arrays([text])


def test_long_white_space_in_arrays(gpt2_tokenizer: GPT2Tokenizer) -> None:
    for text in (" " * 20_000, "a" + "\n " * 10_000 + "b", "\u3000" * 1_000_000 + "word"):
        assert gpt2_tokenizer.encode_arrays([text])[0].tolist() == gpt2_tokenizer.encode(text)


# --- refusals -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("texts", "complaint"),
    [
        ([], "there is no text in tale"),
        (["a"], "the corpus tale is too short to hold a part of it out; add text"),
        (["no line ends here"], "is too short"),
        (["same\n", "same\n"], "is too short"),
        (["a\ud800\n", "b"], "lone surrogate"),
    ],
)
def test_too_little_text(tmp_path: Path, texts: list[str], complaint: str) -> None:
    with pytest.raises(GptlabError, match=complaint):
        prepare(documents_of("tale", texts), byte_tokenizer(), tmp_path / "data", held_out=0.5)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("held_out", [0, 1, -0.1, 1.5, float("nan")])
def test_impossible_shares(tmp_path: Path, held_out: float) -> None:
    with pytest.raises(GptlabError, match="must be between 0 and 1"):
        prepare(documents_of("c", TEXTS), byte_tokenizer(), tmp_path / "data", held_out=held_out)


def test_unknown_tokenizers(tmp_path: Path) -> None:
    with pytest.raises(GptlabError, match=r"unknown tokenizer 'byte'.*did you mean 'bytes'"):
        prepare(documents_of("c", TEXTS), NewTokenizer("byte"), tmp_path / "data")
    with pytest.raises(GptlabError, match="at least 257 entries"):
        prepare(documents_of("c", TEXTS), NewTokenizer("bpe", 100), tmp_path / "data")
    assert not list(tmp_path.iterdir())


def test_a_tokenizer_that_lacks_a_character(tmp_path: Path) -> None:
    with pytest.raises(GptlabError, match="is not among the 2 that this model knows"):
        prepare(documents_of("c", TEXTS), char_tokenizer(["ab"]), tmp_path / "data")
    assert not list(tmp_path.iterdir())


def test_what_is_there_is_never_overwritten(tmp_path: Path) -> None:
    documents = documents_of("c", TEXTS)
    (tmp_path / "empty").mkdir()
    prepare(documents, byte_tokenizer(), tmp_path / "empty").verify()  # an empty directory may be filled
    (tmp_path / "failed").mkdir()
    with pytest.raises(GptlabError, match="too short"):
        prepare(documents_of("c", ["a"]), byte_tokenizer(), tmp_path / "failed")
    assert (tmp_path / "failed").is_dir()
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    for name in ("empty", "file", "full"):
        with pytest.raises(GptlabError, match=f"{name} exists already; choose another place, remove it, or add"):
            prepare(documents, byte_tokenizer(), tmp_path / name)
    assert (tmp_path / "file").read_text() == (tmp_path / "full" / "file").read_text() == "mine"
    with pytest.raises(GptlabError, match="cannot write to"):
        prepare(documents, byte_tokenizer(), tmp_path / "file" / "data")


# --- adding ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_first", [2, 20, 59])
def test_added_documents_join_their_sides(tmp_path: Path, n_first: int) -> None:
    first, second = documents_of("c", TEXTS[:n_first]), documents_of("d", TEXTS[n_first:])
    old = prepare(first, byte_tokenizer(), tmp_path / "data", held_out=0.2, shard_tokens=1000)
    before = [texts_of(old, old.training), texts_of(old, old.validation)]
    new = append(second, tmp_path / "data", shard_tokens=1000)
    after = [texts_of(new, new.training), texts_of(new, new.validation)]
    for texts, fewer in zip(after, before, strict=True):
        assert texts[: len(fewer)] == fewer
    check_complete(new, TEXTS)
    for texts, fewer, side in zip(after, before, (False, True), strict=True):
        assert texts[len(fewer) :] == [text for text in TEXTS[n_first:] if (rank(text) < 0.2) == side]
    assert new.training.n_bytes == sum(len(text.encode()) for text in after[0])
    assert new.sha256 != old.sha256
    new.verify()
    assert not list(tmp_path.rglob("*.partial"))
    # Nothing is left that the index does not name.
    index = (tmp_path / "data" / "index.json").read_text()
    assert all(path.name in index for path in (tmp_path / "data").glob("*.bin"))
    assert len(texts_of(old, old.training)) == len(before[0]), "a reader that was open reads on"


def test_added_again_and_again(tmp_path: Path) -> None:
    prepare(documents_of("c", TEXTS[:10]), byte_tokenizer(), tmp_path / "data", held_out=0.3)
    for i in range(10, 60):
        append(documents_of("c", TEXTS[i : i + 1]), tmp_path / "data")
    dataset = open_dataset(tmp_path / "data")
    dataset.verify()
    check_complete(dataset, TEXTS)


def test_tokenizers_are_not_mixed(tmp_path: Path, gpt2_tokenizer: GPT2Tokenizer) -> None:
    documents = documents_of("c", TEXTS)
    prepare(documents, byte_tokenizer(), tmp_path / "data")
    before = everything(tmp_path / "data")
    for tokenizer in (gpt2_tokenizer, char_tokenizer(TEXTS), train_bpe(TEXTS, 300)):
        with pytest.raises(GptlabError, match="holds the ids of another tokenizer"):
            append(documents, tmp_path / "data", tokenizer=tokenizer)
    assert everything(tmp_path / "data") == before
    append(documents, tmp_path / "data", tokenizer=byte_tokenizer())


def test_gpt2s_tokenizer_from_any_place_is_one(tmp_path: Path, gpt2_tokenizer: GPT2Tokenizer) -> None:
    for name, content in gpt2_tokenizer.files().items():
        (tmp_path / name).write_bytes(content)
    prepare(documents_of("c", TEXTS), gpt2_tokenizer, tmp_path / "data")
    append(documents_of("c", ["more\n"]), tmp_path / "data", tokenizer=read_tokenizer(tmp_path)).verify()


def test_what_cannot_be_added(tmp_path: Path) -> None:
    prepare(documents_of("c", ["abc\n", "cba\n"]), NewTokenizer("chars"), tmp_path / "data")
    before = everything(tmp_path / "data")
    for documents, complaint in (
        (documents_of("d", ["abx"]), "the character 'x' is not among the 4"),
        (documents_of("d", []), "there is no text in d"),
        (documents_of("d", ["abc"], items=True), "holds documents, these are lines"),
    ):
        with pytest.raises(GptlabError, match=complaint):
            append(documents, tmp_path / "data")
        assert everything(tmp_path / "data") == before
        assert not list(tmp_path.glob(".*"))
    with pytest.raises(GptlabError, match="is not a dataset"):
        append(documents_of("d", ["abc"]), tmp_path / "other")
    (tmp_path / "nano").mkdir()
    for name in ("train.bin", "val.bin"):
        (tmp_path / "nano" / name).write_bytes(b"\1\0")
    with pytest.raises(GptlabError, match="was made by another program"):
        append(documents_of("d", ["abc"]), tmp_path / "nano")


def test_two_additions_at_a_time(tmp_path: Path) -> None:
    prepare(documents_of("c", TEXTS[:20]), byte_tokenizer(), tmp_path / "data")

    def meanwhile(row: dict[str, Any]) -> None:
        if row["event"] == "tokenize":
            code = (
                "import sys; from pathlib import Path; from gptlab.text.shards import append\n"
                "from gptlab.text.documents import documents_of\n"
                "append(documents_of('e', ['another one\\n']), Path(sys.argv[1]))"
            )
            subprocess.run([sys.executable, "-c", code, str(tmp_path / "data")], check=True)

    with pytest.raises(GptlabError, match="was changed meanwhile; run the same command again"):
        append(documents_of("d", TEXTS[20:]), tmp_path / "data", report=meanwhile)
    dataset = open_dataset(tmp_path / "data")
    dataset.verify()
    check_complete(dataset, [*TEXTS[:20], "another one\n"])


# --- full disks and killed processes --------------------------------------------------------------------------


def test_a_full_disk_leaves_nothing(small_disk: Path) -> None:
    texts = ["some text\n" * 1000] * 50 + TEXTS  # about 500 kB, twice as many bytes of ids
    prepare(documents_of("c", texts), byte_tokenizer(), small_disk / "small").verify()
    before = everything(small_disk / "small")
    with pytest.raises(GptlabError, match=r"cannot write to .*: the disk is full; nothing was left there"):
        prepare(documents_of("c", texts * 5), byte_tokenizer(), small_disk / "large")
    assert [path.name for path in small_disk.iterdir()] == ["small"]
    with pytest.raises(GptlabError, match="the disk is full; what was there before is unchanged"):
        append(documents_of("c", texts * 5), small_disk / "small")
    assert [path.name for path in small_disk.iterdir()] == ["small"]
    assert everything(small_disk / "small") == before


def test_a_disk_that_is_full_at_the_end(small_disk: Path) -> None:
    free = os.statvfs(small_disk)
    (small_disk / "filler").write_bytes(b"x" * (free.f_bavail * free.f_bsize - 60_000))
    # The first files still fit into the 60 kB, the buffers of the last do not.
    with pytest.raises(GptlabError, match="the disk is full"):
        prepare(documents_of("c", ["some text\n" * 2500, *TEXTS]), byte_tokenizer(), small_disk / "data")
    assert [path.name for path in small_disk.iterdir()] == ["filler"]


# Runs in a process of its own, which forks its victims: each would need a second to start by itself.
KILLER = """
import json, os, random, shutil, signal, sys, time
from pathlib import Path
from gptlab.text.documents import documents_of
from gptlab.text.shards import append, open_dataset, prepare
from gptlab.text.tokenizers import byte_tokenizer

out = Path(sys.argv[1]) / "data"
texts = [f"document {i}\\n" * 1000 for i in range(100)]  # 1.2 MB in all
first, second = documents_of("c", texts[:50]), documents_of("d", texts[50:])

def make():
    prepare(first, byte_tokenizer(), out, held_out=0.3, shard_tokens=100_000)

def add():
    append(second, out, shard_tokens=100_000)

def victim(act):
    pid = os.fork()
    if pid == 0:
        try:
            act()
        finally:
            os._exit(0)
    return pid

def what_is_there():
    if not out.exists():
        return "nothing"
    dataset = open_dataset(out)
    dataset.verify()
    return dataset.training.n_documents + dataset.validation.n_documents

def killed_after(calls, name, act):
    real, done = getattr(os, name), 0
    def counted(*args):
        nonlocal done
        if done == calls:
            os.kill(os.getpid(), signal.SIGKILL)
        real(*args)
        done += 1
    setattr(os, name, counted)
    act()

draw = random.Random(0)
found = {"make": [], "add": [], "rename": [], "replace": []}
rounds = int(sys.argv[2])
make()
shutil.rmtree(out)
start = time.perf_counter()
make()
usual = time.perf_counter() - start
for _ in range(rounds):
    shutil.rmtree(out, ignore_errors=True)
    pid = victim(make)
    time.sleep(draw.uniform(0, usual))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    found["make"].append(what_is_there())
for _ in range(rounds):
    shutil.rmtree(out, ignore_errors=True)
    make()
    pid = victim(add)
    time.sleep(draw.uniform(0, usual))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    found["add"].append(what_is_there())
# And between any two of the moves, where a random kill hardly ever hits.
shutil.rmtree(out, ignore_errors=True)
os.waitpid(victim(lambda: killed_after(0, "rename", make)), 0)
found["rename"].append(what_is_there())
make()
moves = 0
while what_is_there() == 50:
    os.waitpid(victim(lambda: killed_after(moves, "replace", add)), 0)
    found["replace"].append(what_is_there())
    moves += 1
shutil.rmtree(out)
make()
add()  # whatever was left is not a hindrance, and is gone
found["after"] = what_is_there()
found["left"] = sorted(path.name for path in out.parent.iterdir())
index = (out / "index.json").read_text()
found["unused"] = [path.name for path in out.glob("*.bin") if path.name not in index]
print(json.dumps(found))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
@pytest.mark.parametrize("rounds", [4, pytest.param(40, marks=pytest.mark.slow)])
def test_a_killed_process_leaves_a_whole_dataset_or_none(tmp_path: Path, rounds: int) -> None:
    command = [sys.executable, "-W", "ignore", "-c", KILLER, str(tmp_path), str(rounds)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    outcomes = json.loads(done.stdout)
    assert set(outcomes["make"]) <= {"nothing", 50}
    assert set(outcomes["add"]) <= {50, 100}
    assert "nothing" in outcomes["make"] or 50 in outcomes["add"], "no kill came in time: nothing was tested"
    assert outcomes["rename"] == ["nothing"]
    # Until the last move, the index, it is the old dataset; then the new one.
    assert len(outcomes["replace"]) >= 6
    assert outcomes["replace"] == [50] * (len(outcomes["replace"]) - 1) + [100]
    assert (outcomes["after"], outcomes["left"], outcomes["unused"]) == (100, ["data"], [])


# --- memory ---------------------------------------------------------------------------------------------------

PEAK = """
import sys
from pathlib import Path
from gptlab.text.documents import open_documents
from gptlab.text.shards import NewTokenizer, prepare
prepare(open_documents([sys.argv[1]]), NewTokenizer(sys.argv[2]), Path(sys.argv[3]))
status = Path("/proc/self/status").read_text().split()
print(status[status.index("VmHWM:") + 1])  # not ru_maxrss, which a new process inherits from the one that started it
"""


def peak_megabytes(tmp_path: Path, kind: str) -> float:
    command = [sys.executable, "-c", PEAK, str(tmp_path / "large.txt"), kind, str(tmp_path / "data")]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout) / 1024


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("kind", "megabytes"), [("gpt2", 200), ("chars", 200), ("bpe", 40)])
def test_memory_does_not_grow_with_a_document(tmp_path: Path, kind: str, megabytes: int) -> None:
    line = "The quick brown fox, it's said, jumps over 13 lazy dogs; naïve café 東京.\n"
    (tmp_path / "large.txt").write_text(line * (megabytes * 10**6 // len(line.encode())), encoding="utf-8")
    assert peak_megabytes(tmp_path, kind) < 600


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("unit", "megabytes"), [("a", 100), ("=", 20), ("漢", 20), (" ", 20), ("0aB+/", 100)])
def test_a_long_line_without_white_space_between_words(tmp_path: Path, unit: str, megabytes: int) -> None:
    with (tmp_path / "large.txt").open("w", encoding="utf-8") as file:
        file.write("begin\n")
        for _ in range(megabytes):
            file.write(unit * (1_000_000 // len(unit.encode())))
        file.write("\nend\n")
    assert peak_megabytes(tmp_path, "gpt2") < 900
    dataset = open_dataset(tmp_path / "data")
    [beginning], [end] = texts_of(dataset, dataset.training), texts_of(dataset, dataset.validation)
    # Not compared by an assertion of its own: pytest would take minutes to describe how such lines differ.
    same = beginning + end == (tmp_path / "large.txt").read_text(encoding="utf-8")
    assert same


def test_shards_hands_out_the_reading_side_too() -> None:
    assert shards.open_dataset is open_dataset
    assert (shards.Dataset, shards.Split) == (Dataset, Split)


@pytest.mark.parametrize("items", [False, True])
def test_a_document_that_begins_otherwise_than_it_ends(tmp_path: Path, items: bool) -> None:
    bos, eos = 1, 256
    tokenizer = byte_tokenizer()
    tokenizer.set_borders(end_of_text=eos, start=bos, ends=[eos])
    texts = [f"document {i}" for i in range(60)]
    out = tmp_path / "data"
    prepare(documents_of("d", texts[:40], items=items), tokenizer, out, held_out=0.3)
    data = append(documents_of("e", texts[40:], items=items), out)
    assert json.loads((out / "index.json").read_text())["version"] == 3
    found: list[str] = []
    for split in (data.training, data.validation):
        documents = [ids.tolist() for ids in split.documents()]
        stream = [bos, *(token for ids in documents for token in (*ids, eos, bos))]
        assert split.read(0, len(split)).tolist() == stream
        owners = [i for i, ids in enumerate(documents) for _ in range(len(ids) + 2)]
        assert split.owners(np.arange(len(owners))).tolist() == owners  # the one that ends a text is part of it
        rows = Items(split, 16, bos)
        batch = rows.take(np.arange(len(rows)))
        for ids, targets, document in zip(batch.ids.tolist(), batch.targets.tolist(), documents, strict=True):
            n = len(document) + 1
            assert (ids[:n], targets[:n]) == ([bos, *document], [*document, eos])
        assert batch.n_targets == rows.n_targets
        found += map(data.tokenizer.decode, documents)
    assert sorted(found) == sorted(texts)


def test_data_of_before_there_were_two_marks(tmp_path: Path) -> None:
    """A tokenizer with a beginning of its own, in data that were prepared with one mark: they go on with one."""
    out = tmp_path / "data"
    prepare(documents_of("d", TEXTS[:30]), byte_tokenizer(), out, held_out=0.3)
    (out / "generation_config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": 256}))
    data = append(documents_of("e", TEXTS[30:]), out)
    assert data.tokenizer.between == (256, 1)
    assert sorted(text for split in (data.training, data.validation) for text in texts_of(data, split)) == sorted(TEXTS)
