"""Reading datasets: own ones, nanoGPT's and llm.c's; what is damaged is refused in words."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptlab.errors import GptlabError
from gptlab.text.datasets import Dataset, Shard, Split, open_dataset
from gptlab.text.documents import documents_of
from gptlab.text.shards import append, prepare
from gptlab.text.tokenizers import GPT2Tokenizer, byte_tokenizer, char_tokenizer

TEXTS = [f"document {i} of some\n" * (1 + i % 3) for i in range(40)]


@pytest.fixture
def made(tmp_path: Path) -> Dataset:
    return prepare(documents_of("mine", TEXTS), byte_tokenizer(), tmp_path / "data", held_out=0.2, shard_tokens=300)


# --- reading ranges -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Split:
    """The ids 0 to 9 in shards of 4, 1, 3 and 2."""
    folder = tmp_path_factory.mktemp("shards")
    shards = []
    for i, ids in enumerate(np.split(np.arange(10, dtype="<u2"), [4, 5, 8])):
        ids.tofile(folder / f"{i}.bin")
        shards.append(Shard(folder / f"{i}.bin", len(ids)))
    return Split(shards, np.dtype("<u2"), 10)


@settings(max_examples=100, derandomize=True, deadline=None, database=None)
@given(a=st.integers(0, 10), b=st.integers(0, 10))
def test_any_range_across_shards(sharded: Split, a: int, b: int) -> None:
    start, stop = sorted((a, b))
    ids = sharded.read(start, stop)
    assert (ids.tolist(), ids.dtype) == (list(range(start, stop)), np.uint16)
    assert type(ids) is np.ndarray


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (3, 2), (0, 11), (11, 11)])
def test_no_range_beyond_the_ends(sharded: Split, start: int, stop: int) -> None:
    with pytest.raises(IndexError, match=f"tokens {start} to {stop} of a split of 10"):
        sharded.read(start, stop)


def test_a_range_in_one_shard_is_not_copied(sharded: Split) -> None:
    assert not sharded.read(0, 4).flags.owndata
    assert not sharded.read(0, 4).flags.writeable


# --- own format -----------------------------------------------------------------------------------------------


def test_what_was_prepared_is_found_again(made: Dataset) -> None:
    again = open_dataset(made.directory)
    assert (again.name, again.items, again.held_out, again.sha256) == ("mine", False, 0.2, made.sha256)
    assert again.tokenizer.files() == made.tokenizer.files()
    for split, other in ((again.training, made.training), (again.validation, made.validation)):
        assert np.array_equal(split.read(0, len(split)), other.read(0, len(other)))
        assert split.document_ends is not None
        assert (split.document_ends.dtype, split.document_ends.shape) == (np.int64, (split.n_documents,))
        assert np.array_equal(split.document_ends, np.asarray(other.document_ends))
    again.verify()


def write_first_version(folder: Path, parts: dict[str, list[str]]) -> Path:
    """A dataset as version 1 of the format had it: a mark after each document, none before the first."""
    folder.mkdir()
    tokenizer, splits = byte_tokenizer(), {}
    for name, content in tokenizer.files().items():
        (folder / name).write_bytes(content)
    for name, texts in parts.items():
        ids = [i for text in texts for i in [*text.encode(), 256]]
        contents = {
            f"{name}-00000.bin": np.array(ids, "<u2").tobytes(),
            f"{name}-ends-00000.bin": np.cumsum([len(text) + 1 for text in texts]).astype("<i8").tobytes(),
        }
        files = []
        for file, content in contents.items():
            (folder / file).write_bytes(content)
            files.append({"file": file, "sha256": hashlib.sha256(content).hexdigest()})
        splits[name] = {"tokens": len(ids), "documents": len(texts), "bytes": len(ids) - len(texts)}
        splits[name] |= {"shards": [files[0] | {"tokens": len(ids)}], "ends": files[1]}
    index = {"format": "gptlab-tokens", "version": 1, "name": "old", "items": False, "held_out": 0.5, "forced": None}
    index |= {"tokenizer": {"sha256": tokenizer.sha256, "vocab_size": 257}, "dtype": "uint16", "splits": splits}
    (folder / "index.json").write_text(json.dumps(index))
    return folder


def test_the_first_version_of_the_format_is_read_and_added_to(tmp_path: Path) -> None:
    old = open_dataset(write_first_version(tmp_path / "old", {"training": ["one", "two "], "validation": ["three"]}))
    old.verify()
    assert [bytes(ids.tolist()) for ids in old.training.documents()] == [b"one", b"two "]
    assert old.training.read(0, 9).tolist() == [*b"one", 256, *b"two ", 256]
    # A mark opens the document after it, as in data of today.
    assert old.training.owners(np.arange(9)).tolist() == [0, 0, 0, 1, 1, 1, 1, 1, 2]
    texts = [f"more {i}" for i in range(20)]
    new = append(documents_of("more", texts), tmp_path / "old")
    new.verify()
    documents = [
        [bytes(ids.tolist()).decode() for ids in split.documents()] for split in (new.training, new.validation)
    ]
    assert (documents[0][:2], documents[1][:1]) == (["one", "two "], ["three"])
    # The rule of that version: by the hash of the text as it is.
    held = [t for t in texts if int.from_bytes(hashlib.sha256(t.encode()).digest()[:8], "big") / 2**64 < 0.5]
    assert documents[1][1:] == held
    assert sorted(documents[0][2:] + held) == sorted(texts)


def test_a_path_may_be_a_string(made: Dataset) -> None:
    assert open_dataset(str(made.directory)).sha256 == made.sha256
    with pytest.raises(GptlabError, match=r"is not a dataset: it has no index\.json"):
        open_dataset(str(made.directory.parent))


def test_the_identity_depends_on_texts_split_and_tokenizer(tmp_path: Path, made: Dataset) -> None:
    def sha256(i: int, texts: list[str], tokenizer: Any, held_out: float = 0.2, **more: Any) -> str:
        return prepare(documents_of("x", texts), tokenizer, tmp_path / str(i), held_out=held_out, **more).sha256

    assert sha256(0, TEXTS, byte_tokenizer(), shard_tokens=300) == made.sha256
    others = [
        sha256(1, TEXTS[::-1], byte_tokenizer(), shard_tokens=300),
        sha256(2, TEXTS, byte_tokenizer(), held_out=0.5, shard_tokens=300),
        sha256(3, TEXTS, char_tokenizer(TEXTS), shard_tokens=300),
    ]
    assert len({made.sha256, *others}) == 4


def shards_of(dataset: Dataset) -> list[Path]:
    return sorted(path for path in dataset.directory.glob("*.bin"))


def test_each_truncated_shard_is_refused_at_once(made: Dataset) -> None:
    paths = shards_of(made)
    assert len(paths) >= 6
    for path in paths:
        content = path.read_bytes()
        for damaged in (content[:-1], content[:-2], b"", content + b"\0\0"):
            path.write_bytes(damaged)
            with pytest.raises(GptlabError, match=rf"{path.name} has [\d,]+ bytes instead of [\d,]+; restore it"):
                open_dataset(made.directory)
        path.unlink()
        with pytest.raises(GptlabError, match=f"{path.name} is missing; restore it"):
            open_dataset(made.directory)
        path.write_bytes(content)
    open_dataset(made.directory).verify()


def test_each_changed_shard_fails_its_checksum(made: Dataset) -> None:
    for path in shards_of(made):
        content = path.read_bytes()
        path.write_bytes(bytes([content[0] ^ 1]) + content[1:])
        dataset = open_dataset(made.directory)
        with pytest.raises(GptlabError, match=f"{path.name} fails its checksum; restore it, or prepare the data again"):
            dataset.verify()
        path.write_bytes(content)


def test_another_tokenizer_beside_the_ids(made: Dataset) -> None:
    (made.directory / "tokenizer.json").write_bytes(char_tokenizer(["abc"]).files()["tokenizer.json"])
    with pytest.raises(GptlabError, match=r"tokenizer.json is not the one that made the ids"):
        open_dataset(made.directory)
    (made.directory / "tokenizer.json").unlink()
    with pytest.raises(GptlabError, match=r"has lost its tokenizer\.json"):
        open_dataset(made.directory)


def change(**values: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda index: index.update(values)


@pytest.mark.parametrize(
    ("edit", "complaint"),
    [
        (change(version=4), "version 4; this program reads versions"),
        (change(format="parquet"), "format 'parquet'"),
        (lambda index: index.pop("format"), "is damaged"),
        (lambda index: index.pop("dtype"), "is damaged"),
        (change(dtype="many"), "is damaged"),
        (lambda index: index["splits"].pop("validation"), "is damaged"),
        (lambda index: index["splits"]["training"].update(documents="many"), "is damaged"),
        (lambda index: index["splits"]["training"].update(shards=3), "is damaged"),
        (lambda index: index["splits"]["training"]["shards"][0].update(tokens=-5), "bytes instead of"),
    ],
)
def test_a_damaged_index(made: Dataset, edit: Callable[[dict[str, Any]], Any], complaint: str) -> None:
    path = made.directory / "index.json"
    index = json.loads(path.read_text())
    edit(index)
    path.write_text(json.dumps(index))
    with pytest.raises(GptlabError, match=complaint) as caught:
        open_dataset(made.directory)
    assert str(made.directory) in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff"])
def test_an_index_that_is_no_json_object(made: Dataset, content: bytes) -> None:
    (made.directory / "index.json").write_bytes(content)
    with pytest.raises(GptlabError, match=r"index\.json is damaged"):
        open_dataset(made.directory)


def test_places_without_data(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text")
    for name in ("", "nowhere", "file"):
        with pytest.raises(GptlabError, match=r"is not a dataset: it has no index\.json; make one with gptlab prepare"):
            open_dataset(tmp_path / name)


# --- nanoGPT's ------------------------------------------------------------------------------------------------


def test_nanogpts_files(tmp_path: Path, gpt2_tokenizer: GPT2Tokenizer) -> None:
    # As nanoGPT's data/*/prepare.py writes them.
    ids = {"train": gpt2_tokenizer.encode("Hello, my name is\n") * 7, "val": [*gpt2_tokenizer.encode("The dog"), 50256]}
    for name, values in ids.items():
        np.array(values, dtype=np.uint16).tofile(tmp_path / f"{name}.bin")
    dataset = open_dataset(tmp_path)
    assert isinstance(dataset.tokenizer, GPT2Tokenizer)
    assert (dataset.name, dataset.items, dataset.held_out) == (tmp_path.name, False, None)
    for split, values in ((dataset.training, ids["train"]), (dataset.validation, ids["val"])):
        assert split.read(0, len(split)).tolist() == values
        assert (split.n_documents, split.n_bytes, split.document_ends) == (0, None, None)
    dataset.verify()
    first = dataset.sha256
    np.array([1, 2], dtype=np.uint16).tofile(tmp_path / "val.bin")
    assert open_dataset(tmp_path).sha256 != first


def test_nanogpts_files_with_a_tokenizer_beside_them(tmp_path: Path) -> None:
    tokenizer = char_tokenizer(["hello\n"])
    for name, content in tokenizer.files().items():
        (tmp_path / name).write_bytes(content)
    for name in ("train.bin", "val.bin"):
        np.array(tokenizer.encode("hello\nhell"), dtype=np.uint16).tofile(tmp_path / name)
    (tmp_path / "meta.pkl").write_bytes(b"not read")
    dataset = open_dataset(tmp_path)
    dataset.verify()
    assert dataset.tokenizer.sha256 == tokenizer.sha256
    assert dataset.tokenizer.decode(dataset.validation.read(0, 5)) == "hello"


def test_a_pickled_alphabet_is_never_read(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "code-has-run"),)

    import pickle

    for name in ("train.bin", "val.bin"):
        np.zeros(4, dtype=np.uint16).tofile(tmp_path / name)
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(Payload()))
    with pytest.raises(GptlabError, match=r"meta\.pkl, a pickle") as caught:
        open_dataset(tmp_path)
    assert f"gptlab prepare {tmp_path / 'input.txt'} --tokenizer chars" in str(caught.value)
    assert not (tmp_path / "code-has-run").exists()


def test_nanogpts_files_damaged(tmp_path: Path) -> None:
    (tmp_path / "train.bin").write_bytes(b"\1\0\2\0")
    with pytest.raises(GptlabError, match=r"has no val\.bin"):
        open_dataset(tmp_path)
    for content in (b"", b"\1\0\2"):
        (tmp_path / "val.bin").write_bytes(content)
        with pytest.raises(GptlabError, match=r"val\.bin is truncated"):
            open_dataset(tmp_path)
    (tmp_path / "val.bin").write_bytes(b"\xff\xff")
    dataset = open_dataset(tmp_path)
    with pytest.raises(GptlabError, match=r"val\.bin holds the id 65535, but its tokenizer has 50,257"):
        dataset.verify()


# --- llm.c's --------------------------------------------------------------------------------------------------


def write_llmc(path: Path, ids: list[int], magic: int = 20240520, version: int = 1, count: int | None = None) -> None:
    """As llm.c's dev/data/data_common.py writes it."""
    header = np.zeros(256, dtype=np.int32)
    header[:3] = magic, version, len(ids) if count is None else count
    path.write_bytes(header.tobytes() + np.array(ids, dtype=np.uint16).tobytes())


@pytest.mark.parametrize(
    ("training", "validation"),
    [
        (["fineweb_train_000001.bin", "fineweb_train_000002.bin"], "fineweb_val_000000.bin"),
        (["tiny_shakespeare_train.bin"], "tiny_shakespeare_val.bin"),
    ],
)
def test_llmcs_files(tmp_path: Path, training: list[str], validation: str) -> None:
    for i, name in enumerate(training):
        write_llmc(tmp_path / name, [50256, i, i + 1])
    write_llmc(tmp_path / validation, [50256, 9])
    dataset = open_dataset(tmp_path)
    expected = [value for i in range(len(training)) for value in (50256, i, i + 1)]
    assert dataset.training.read(0, len(dataset.training)).tolist() == expected
    assert dataset.training.read(1, 3).tolist() == [0, 1]
    assert dataset.validation.read(0, 2).tolist() == [50256, 9]
    assert isinstance(dataset.tokenizer, GPT2Tokenizer)
    dataset.verify()


@pytest.mark.parametrize(
    ("more", "complaint"),
    [
        ({"magic": 20240801, "version": 7}, "is not one of llm.c's files of GPT-2 ids"),
        ({"version": 2}, "is not one of llm.c's files of GPT-2 ids"),
        ({"count": 3}, r"val\.bin has 1,028 bytes instead of 1,030"),
        ({"count": -3}, r"val\.bin has 1,028 bytes instead of"),
    ],
)
def test_llmcs_files_damaged(tmp_path: Path, more: dict[str, int], complaint: str) -> None:
    write_llmc(tmp_path / "x_train.bin", [1, 2])
    with pytest.raises(GptlabError, match=r"has no file \*_val\*\.bin"):
        open_dataset(tmp_path)
    write_llmc(tmp_path / "x_val.bin", [1, 2], **more)
    with pytest.raises(GptlabError, match=complaint):
        open_dataset(tmp_path)
    (tmp_path / "x_val.bin").write_bytes(b"short")
    with pytest.raises(GptlabError, match=r"is not one of llm\.c's files"):
        open_dataset(tmp_path)
