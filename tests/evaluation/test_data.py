# Data sets: by path, in the cache, downloaded (from a file:// address), damaged, absent.
from __future__ import annotations

import dataclasses
import hashlib
import json
import zipfile
from pathlib import Path

import pytest

from gptlab import GptlabError
from gptlab.evaluation import data
from gptlab.evaluation.data import SOURCES, Source, parse_paths, read

CONTENT = b'{"text": "a b c"}\n'


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GPTLAB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Source:
    """LAMBADA, if it were this small and lay on this disk."""
    served = tmp_path / "served.jsonl"
    served.write_bytes(CONTENT)
    source = Source("LAMBADA", served.as_uri(), "lambada_test.jsonl", hashlib.sha256(CONTENT).hexdigest())
    monkeypatch.setitem(SOURCES, "lambada", source)
    return source


def test_downloaded_once_and_then_from_the_cache(cache: Path, source: Source, tmp_path: Path) -> None:
    first = read("lambada")
    (tmp_path / "served.jsonl").unlink()
    second = read("lambada")
    assert first == second
    assert first.official
    assert first.items({"text": str}) == [{"text": "a b c"}]
    assert [path.name for path in cache.iterdir()] == ["lambada_test.jsonl"]  # and nothing half-written


def test_a_download_that_is_something_else_is_not_kept(cache: Path, source: Source, tmp_path: Path) -> None:
    (tmp_path / "served.jsonl").write_bytes(CONTENT + b"more")
    with pytest.raises(GptlabError, match=r"sha256 differs.*--data lambada=FILE"):
        read("lambada")
    assert not cache.exists()


def test_a_damaged_archive_in_the_cache(cache: Path) -> None:
    cache.mkdir()
    (cache / SOURCES["wikitext"].file).write_bytes(b"PK half a download")
    with pytest.raises(GptlabError, match="sha256 differs; delete it"):
        read("wikitext")


def test_a_damaged_cache_is_refused(cache: Path, source: Source) -> None:
    read("lambada")
    (cache / "lambada_test.jsonl").write_bytes(CONTENT[:-5])
    with pytest.raises(GptlabError, match="sha256 differs; delete it"):
        read("lambada")


def test_a_file_out_of_an_archive(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = tmp_path / "served.zip"
    with zipfile.ZipFile(archive, "w") as files:
        files.writestr("folder/wiki.test.raw", CONTENT)
        files.writestr("folder/other", b"other")
    sha256 = hashlib.sha256(CONTENT).hexdigest()
    source = Source("WikiText", archive.as_uri(), "raw.zip", sha256, "folder/wiki.test.raw")
    monkeypatch.setitem(SOURCES, "wikitext", source)
    assert read("wikitext", {"wikitext": archive}).content == CONTENT
    assert not cache.exists()
    assert read("wikitext").content == CONTENT
    assert (cache / "raw.zip").read_bytes() == archive.read_bytes()
    archive.unlink()
    assert read("wikitext").content == CONTENT
    archive.write_bytes((cache / "raw.zip").read_bytes())
    monkeypatch.setitem(SOURCES, "wikitext", dataclasses.replace(source, member="folder/absent"))
    with pytest.raises(GptlabError, match="not an intact archive with folder/absent"):
        read("wikitext", {"wikitext": archive})


def test_absent_and_offline_says_what_to_do(cache: Path, source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    nowhere = "http://127.0.0.1:9/lambada_test.jsonl"
    monkeypatch.setitem(SOURCES, "lambada", dataclasses.replace(source, url=nowhere))
    with pytest.raises(GptlabError) as caught:
        read("lambada")
    words = str(caught.value)
    assert "cannot be downloaded" in words
    assert f"get {nowhere} elsewhere" in words
    assert "--data lambada=FILE" in words
    assert str(cache / "lambada_test.jsonl") in words


def test_a_cache_that_cannot_be_written(tmp_path: Path, source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GPTLAB_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(GptlabError, match="set GPTLAB_CACHE"):
        read("lambada")


def test_by_path_other_files_are_taken_and_known(cache: Path, tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_bytes(CONTENT)
    source = read("lambada", {"lambada": path})
    assert not source.official
    assert source.identity() == {
        "name": "lambada",
        "file": "mine.jsonl",
        "sha256": hashlib.sha256(CONTENT).hexdigest(),
        "official": False,
    }
    assert not cache.exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "there is no text in mine.jsonl"),
        (b" \n\n", "there is no text in mine.jsonl"),
        (b"\xff\xfa", "is not UTF-8 text"),
        (b"plain text\n", "line 1, is not a JSON object"),
        (CONTENT + b"[1]\n", "line 2, is not a JSON object"),
        (CONTENT + b"\n" + json.dumps({"texts": "a"}).encode(), "line 3, has no 'text'"),
        (b'{"text": 3}', "line 1, has no 'text'"),
    ],
)
def test_files_that_hold_something_else(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_bytes(content)
    with pytest.raises(GptlabError, match=words):
        read("lambada", {"lambada": path}).items({"text": str})


def test_a_path_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(GptlabError, match=r"absent\.jsonl cannot be read: No such file"):
        read("lambada", {"lambada": tmp_path / "absent.jsonl"})


def test_paths_by_name() -> None:
    assert parse_paths(["lambada=a=b.jsonl", "wikitext=c"]) == {"lambada": Path("a=b.jsonl"), "wikitext": Path("c")}
    for wrong, words in [("lambada", "name=file"), ("lambada=", "name=file"), ("lambda=x", "did you mean 'lambada'")]:
        with pytest.raises(GptlabError, match=words):
            parse_paths([wrong])


def test_the_cache_is_in_the_home_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GPTLAB_CACHE", raising=False)
    assert data.cache_directory() == Path.home() / ".cache" / "gptlab"
