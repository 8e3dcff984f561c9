"""Corpora that are downloaded: what comes is checked, what does not come is told."""

from __future__ import annotations

import hashlib
import io
import zipfile
from pathlib import Path
from typing import Any

import pytest

from gptlab.errors import GptlabError
from gptlab.text import downloads
from gptlab.text.documents import open_documents
from gptlab.text.downloads import DOWNLOADS, Download

ARTICLES = [" = Title One = \n \n Text . \n = = Section = = \n More @-@ text . \n \n", " = Two = \n \n Text = 2 . \n"]


def wikitext() -> bytes:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("wikitext-2-raw/wiki.test.raw", " \n = Test = \n")
        file.writestr("wikitext-2-raw/wiki.train.raw", " \n" + "".join(ARTICLES))
    return archive.getvalue()


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stands in for the network: WikiText-2 is a file of ours, at a place of ours."""
    content = wikitext()
    file = tmp_path / "served" / "wikitext-2-raw-v1.zip"
    file.parent.mkdir()
    file.write_bytes(content)
    download = Download(file.as_uri(), file.name, len(content), hashlib.sha256(content).hexdigest())
    monkeypatch.setitem(DOWNLOADS, "wikitext-2", download)
    monkeypatch.setenv("GPTLAB_CACHE", str(tmp_path / "cache"))
    return file


def test_downloaded_once_and_told(served: Path, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = []
    documents = open_documents(["wikitext-2"], report=rows.append)
    assert [(row["event"], row["name"]) for row in rows] == [("download", "wikitext-2")]
    assert rows[-1]["bytes"] == rows[-1]["total_bytes"] == served.stat().st_size
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [served.name]
    served.unlink()
    assert documents.name == "wikitext-2"
    # The articles of the training part: a title begins one, a section does not, nor does a sentence with a sign.
    assert list(open_documents(["wikitext-2"])) == list(documents) == ARTICLES


@pytest.mark.parametrize("size", [1, 3, 20, 50])
def test_articles_do_not_depend_on_chunks(served: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr("gptlab.text.documents.PIECE", size)
    assert list(open_documents(["wikitext-2"])) == ARTICLES


@pytest.mark.parametrize("change", [lambda data: data[:-1], lambda data: data[:-1] + b"?", lambda data: b""])
def test_something_else_than_was_published(served: Path, tmp_path: Path, change: Any) -> None:
    served.write_bytes(change(served.read_bytes()))
    with pytest.raises(GptlabError, match="is not wikitext-2 as it was published") as caught:
        open_documents(["wikitext-2"])
    assert str(tmp_path / "cache") in str(caught.value)
    assert not list((tmp_path / "cache").iterdir())


def test_a_file_in_the_cache_that_is_another(served: Path, tmp_path: Path) -> None:
    open_documents(["wikitext-2"])
    (tmp_path / "cache" / served.name).write_bytes(b"other")
    with pytest.raises(GptlabError, match="is not wikitext-2 as it was published; delete it"):
        open_documents(["wikitext-2"])


def test_offline_it_says_which_file_goes_where(served: Path, tmp_path: Path) -> None:
    content = served.read_bytes()
    served.unlink()
    with pytest.raises(GptlabError, match="wikitext-2 cannot be downloaded") as caught:
        open_documents(["wikitext-2"])
    for part in (f"put {served.name} from {served.as_uri()}", f"into the folder {tmp_path / 'cache'}", "stdlib"):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)
    (tmp_path / "cache" / served.name).write_bytes(content)  # and so it works
    assert list(open_documents(["wikitext-2"])) == ARTICLES


def test_an_interrupted_download_leaves_nothing(served: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(io.BytesIO):
        def read(self, *_: Any) -> bytes:
            raise ConnectionResetError(104, "Connection reset by peer")

    monkeypatch.setattr(downloads.urllib.request, "urlopen", lambda *_, **__: Broken())
    with pytest.raises(GptlabError, match=r"cannot be downloaded .*Connection reset by peer"):
        open_documents(["wikitext-2"])
    assert not list((tmp_path / "cache").iterdir())


def test_the_cache_is_below_home_unless_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("GPTLAB_CACHE", raising=False)
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    assert downloads.cache() == tmp_path / ".cache" / "gptlab"


def test_the_checksum_of_tiny_shakespeare(shared: Path) -> None:
    path = shared / "data" / "tinyshakespeare.txt"
    if not path.exists():
        pytest.skip("shared/data is absent")
    download, content = DOWNLOADS["tiny-shakespeare"], path.read_bytes()
    assert (len(content), hashlib.sha256(content).hexdigest()) == (download.n_bytes, download.sha256)


def test_plain_text_from_the_cache(shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = shared / "data" / "tinyshakespeare.txt"
    if not path.exists():
        pytest.skip("shared/data is absent")
    monkeypatch.setenv("GPTLAB_CACHE", str(tmp_path))
    (tmp_path / DOWNLOADS["tiny-shakespeare"].file).write_bytes(path.read_bytes())
    documents = open_documents(["tiny-shakespeare"])
    assert (documents.name, list(documents)) == ("tiny-shakespeare", [path.read_text(encoding="utf-8")])
