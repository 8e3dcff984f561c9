"""Files as other programs leave them, each written by the format's own library: read as what they are, or refused."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptlab.errors import GptlabError
from gptlab.text.decoding import CHUNK
from gptlab.text.documents import open_documents

TEXTS = ["one\nline", 'naïve, "quoted"; 東京 🌹', "three"]
WINDOWS = "\r\n".join(["é one", "two 🌹", ""])


def read(*sources: Path, field: str = "text") -> list[str]:
    documents = open_documents([str(source) for source in sources], text_field=field)
    first = list(documents)
    assert list(documents) == first
    return first


def as_csv(texts: list[str], mark: str = ",", field: str = "text") -> bytes:
    file = io.StringIO(newline="")
    writer = csv.writer(file, delimiter=mark)
    writer.writerows([["id", field], *([i, text] for i, text in enumerate(texts))])
    return file.getvalue().encode()


def as_parquet(texts: list[str | None], field: str = "text") -> bytes:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    file = io.BytesIO()
    parquet.write_table(pyarrow.table({"id": range(len(texts)), field: texts}), file)
    return file.getvalue()


def as_zip(files: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return file.getvalue()


def as_tar(files: dict[str, bytes], mode: str) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode) as archive:  # type: ignore[call-overload]
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return file.getvalue()


JSON_LINES = "".join(json.dumps({"id": 1, "text": text}) + "\n" for text in TEXTS).encode()


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_encodings_and_their_marks(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "a.txt").write_bytes(WINDOWS.encode(encoding))
    (tmp_path / "a.jsonl").write_bytes(JSON_LINES.decode().encode(encoding))
    assert read(tmp_path / "a.txt") == ["é one\ntwo 🌹\n"]
    assert read(tmp_path / "a.jsonl") == TEXTS


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.JSONL", JSON_LINES),
        ("a.ndjson", JSON_LINES.replace(b"\n", b"\r\n")),
        ("a.json", JSON_LINES),
        ("a.json", json.dumps([{"text": text} for text in TEXTS], indent=1).encode()),
        ("a.json", json.dumps(TEXTS).encode("utf-8-sig")),
        ("a.json", json.dumps([{"text": text, "n": None} for text in TEXTS], ensure_ascii=False).encode()),
        ("a.csv", as_csv(TEXTS)),
        ("a.CSV", as_csv(TEXTS, ";")),
        ("a.csv", b"\xef\xbb\xbf" + as_csv(TEXTS)),
        ("a.tsv", as_csv(TEXTS, "\t")),
        ("a.csv.gz", gzip.compress(as_csv(TEXTS))),
        ("a.jsonl.bz2", bz2.compress(JSON_LINES)),
        ("a.JSONL.XZ", lzma.compress(JSON_LINES)),
        ("a.zip", as_zip({"b.jsonl": JSON_LINES})),
        ("a.tar.gz", as_tar({"b.jsonl": JSON_LINES}, "w:gz")),
        ("a.tgz", as_tar({"b.jsonl": JSON_LINES}, "w:gz")),
        ("a.tar.xz", as_tar({"b.jsonl": JSON_LINES}, "w:xz")),
        ("a.tar", as_tar({"b.csv": as_csv(TEXTS)}, "w")),
        ("no-suffix", JSON_LINES),
        ("no-suffix-either", gzip.compress(JSON_LINES)),
    ],
)
def test_records(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    assert read(tmp_path / name) == TEXTS


def test_parquet(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(as_parquet([*TEXTS, None, ""]))
    (tmp_path / "b.PARQUET.gz").write_bytes(gzip.compress(as_parquet([*TEXTS], "body")))
    assert read(tmp_path / "a.parquet") == TEXTS
    assert read(tmp_path / "b.PARQUET.gz", field="body") == TEXTS
    with pytest.raises(GptlabError, match=r"has no column 'text'; it has 'id', 'body'"):
        read(tmp_path / "b.PARQUET.gz")


def test_zstandard(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    frames = [pyarrow.Codec("zstd").compress(part, asbytes=True) for part in (JSON_LINES[:30], JSON_LINES[30:])]
    (tmp_path / "a.jsonl.zst").write_bytes(b"".join(frames))
    assert read(tmp_path / "a.jsonl.zst") == TEXTS


def test_another_field(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(JSON_LINES.replace(b'"text"', b'"content"'))
    (tmp_path / "a.csv").write_bytes(as_csv(TEXTS, field="content"))
    assert read(tmp_path / "a.jsonl", field="content") == read(tmp_path / "a.csv", field="content") == TEXTS
    with pytest.raises(GptlabError, match="it has 'content': name the one to read with --text-field"):
        read(tmp_path / "a.jsonl")
    with pytest.raises(GptlabError, match="has no column 'text'; its first row has 'id', 'content'"):
        read(tmp_path / "a.csv")


@settings(max_examples=60, derandomize=True, deadline=None, database=None)
@given(
    texts=st.lists(st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1).filter(str.strip), min_size=1),
    indent=st.sampled_from([None, 2]),
    chunk=st.sampled_from([1, 7, 2**20]),
)
def test_any_array(tmp_path_factory: pytest.TempPathFactory, texts: list[str], indent: int | None, chunk: int) -> None:
    path = tmp_path_factory.mktemp("arrays") / "a.json"
    path.write_text(json.dumps([{"text": text} for text in texts], indent=indent), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gptlab.text.decoding.CHUNK", chunk)
        assert read(path) == texts


def test_a_mixed_directory_says_what_it_left_out(tmp_path: Path) -> None:
    files = {
        "A.TXT": b"a",
        "b.csv": as_csv(["b"]),
        "c.html": b"<html>c</html>",
        "config.json": b'{"n": 1}',
        "d.json": b'["d"]',
        "empty.txt": b"",
        "x.zip": as_zip({"x.txt": b"x"}),
        "y.bin": b"\0",
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    documents = open_documents([str(tmp_path)])
    assert list(documents) == ["a", "b", "d"]
    left = {Path(name).name: reason for name, reason in documents.left_out.items()}
    assert left == {
        "c.html": "no text",
        "config.json": "no records with 'text'",
        "x.zip": "an archive, read when it is named",
        "y.bin": "no text",
    }


def test_archives_of_several_files(tmp_path: Path) -> None:
    files = {
        "d/b.txt": b"b",
        "a.md": b"a",
        "c.png": b"\x89PNG",
        "__MACOSX/._a.md": b"\0",
        "e.txt.gz": gzip.compress(b"e"),
    }
    (tmp_path / "all.zip").write_bytes(as_zip(files))
    documents = open_documents([str(tmp_path / "all.zip")])
    assert (documents.name, list(documents)) == ("all", ["a", "b", "e"])
    assert list(documents.left_out) == [f"{tmp_path / 'all.zip'}/c.png"]
    (tmp_path / "text8.zip").write_bytes(as_zip({"text8": b" anarchism originated"}))
    assert read(tmp_path / "text8.zip") == [" anarchism originated"]


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"a" * 64 + b"\nsize 123\n"
POINTED = (".txt", ".jsonl", ".json", ".csv", ".parquet", ".txt.gz", ".zip", ".tar")


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("a.html", b"<p>", "is an HTML page"),
        *((f"a{end}", POINTER, "is a git-lfs pointer, not the file itself") for end in POINTED),
        ("a.txt", b"\n<!DOCTYPE html><p>", "is an HTML page, whose markup is not text"),
        ("a.txt", b"\xef\xbb\xbf<?xml version='1.0'?>", "is an XML file"),
        ("a.txt", b"%PDF-1.4\n\xe2\xe3", "is a PDF file, not text"),
        ("a.pdf", b"%PDF-1.4", "is a formatted document"),
        ("a.txt", b"\0\1\2\xff" * 100, "is not text: it holds binary data"),
        ("a.txt", b"one\ntwo\0three\n", r"a\.txt holds a NUL \(byte 7 is 0\): it looks like binary data, or UTF-16"),
        ("a.txt", b"\xef\xbb\xbfone\0", r"holds a NUL \(byte 6 is 0\)"),
        ("a.txt", b"x" * CHUNK + b"\0", rf"holds a NUL \(byte {CHUNK} is 0\)"),
        ("a.txt", "東京\n".encode("utf-16-le") * 9, r"is not (UTF-8 )?text|holds a NUL"),
        ("a.txt", "one\n".encode("utf-32-le"), "holds a NUL"),
        ("a.jsonl", b'{"text": "a\0"}\n', r"a\.jsonl holds a NUL"),
        ("a.ipynb", b"{}", "is a notebook"),
        ("a.json", b'{"data": 3}', "record 1 of .* is not a JSON object with a text"),
        ("a.json", b'[{"text": "a"}, ', "ends within its array"),
        ("a.json", b'[{"text": "a"}, {]', "is not JSON after record 1"),
        ("a.csv", b"id,text\n1,a,b\n", "line 2 of .* has 3 fields, its first row 2"),
        ("a.csv", b'id,text\n1,"a\n', "is not valid CSV"),
        ("a.parquet", b"PAR1 and no more", "is not an intact parquet file"),
        ("a.zip", b"PK\x03\x04 and no more", "is not an intact zip archive"),
        ("a.tar", b"no tar", "is not an intact tar archive"),
        ("a.txt.bz2", b"no bzip2", "is not an intact bzip2 file"),
        ("a.txt.xz", lzma.compress(b"a" * 999)[:-9], "is not an intact xz file"),
        ("a.txt.zst", b"no zstd", "is not an intact Zstandard file"),
        ("a.zip", as_zip({"a.png": b"1", "b.png": b"2"}), "there is no text in a .left out: .*a.png"),
    ],
)
def test_what_is_no_text_is_refused_by_its_name(tmp_path: Path, name: str, content: bytes, complaint: str) -> None:
    if "parquet" in name or "zst" in name:
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(GptlabError, match=complaint) as caught:
        read(tmp_path / name)
    assert "\n" not in str(caught.value)
    assert name in str(caught.value) or "no text in" in str(caught.value)


@pytest.mark.parametrize("name", ["a.parquet", "a.txt.zst"])
def test_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    import builtins

    usual: Callable[..., object] = builtins.__import__

    def without(name: str, *more: object, **others: object) -> object:
        if name.split(".")[0] in ("pyarrow", "zstandard", "compression"):
            raise ImportError(name)
        return usual(name, *more, **others)

    monkeypatch.setattr(builtins, "__import__", without)
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(GptlabError, match=r"pip install ('gptlab\[parquet\]'|zstandard)"):
        read(tmp_path / name)
