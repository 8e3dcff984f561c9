"""Data sets of the protocols: by path, from the cache, or downloaded there and checked."""

from __future__ import annotations

import hashlib
import http.client
import io
import json
import os
import tempfile
import urllib.request
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptlab.errors import GptlabError, nearest
from gptlab.text.decoding import decode


@dataclass(frozen=True)
class Source:
    """Where a data set comes from.

    Attributes:
        title: what it is.
        url: where to download it.
        file: what the download is called in the cache.
        sha256: of the data, taken out of the archive where the download is one.
        member: its name in that archive.
    """

    title: str
    url: str
    file: str
    sha256: str
    member: str = ""


SOURCES = {
    "wikitext": Source(
        "WikiText-2, raw, test (Merity et al. 2016)",
        "https://huggingface.co/datasets/ggml-org/ci/resolve/main/wikitext-2-raw-v1.zip",
        "wikitext-2-raw-v1.zip",
        "173c87a53759e0201f33e0ccf978e510c2042d7f2cb78229d9a50d79b9e7dd08",
        "wikitext-2-raw/wiki.test.raw",
    ),
    "lambada": Source(
        "LAMBADA, test, as OpenAI processed it (Paperno et al. 2016; Radford et al. 2019)",
        "https://openaipublic.blob.core.windows.net/gpt-2/data/lambada_test.jsonl",
        "lambada_test.jsonl",
        "4aa8d02cd17c719165fc8a7887fddd641f43fcafa4b1c806ca8abc31fabdb226",
    ),
    "hellaswag": Source(
        "HellaSwag, validation (Zellers et al. 2019)",
        "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl",
        "hellaswag_val.jsonl",
        "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588",
    ),
}


@dataclass(frozen=True)
class Data:
    """The bytes of a data set and what to say about them.

    Attributes:
        name: a key of `SOURCES`.
        file: the file's name.
        content: its bytes.
    """

    name: str
    file: str
    content: bytes

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def official(self) -> bool:
        """Is this the very file that published scores are measured on?"""
        return self.sha256 == SOURCES[self.name].sha256

    def identity(self) -> dict[str, Any]:
        """Return what a result says about its data."""
        return {"name": self.name, "file": self.file, "sha256": self.sha256, "official": self.official}

    def text(self) -> str:
        """Return the contents as text, line ends as they are.

        Raises:
            GptlabError: no UTF-8 text, or none at all.
        """
        text = decode(self.content, self.file)
        if not text.strip():
            raise GptlabError(f"there is no text in {self.file}; give another file")
        return text

    def items(self, fields: Mapping[str, type | tuple[type, ...]]) -> list[dict[str, Any]]:
        """Return the objects of a file with one JSON object a line.

        Args:
            fields: what every object must have, and of which type.

        Raises:
            GptlabError: a line that is not such an object.
        """
        items = []
        for number, line in enumerate(self.text().split("\n"), 1):
            if not line.strip():
                continue
            try:
                item = json.loads(line)
            except ValueError:
                item = None
            if not isinstance(item, dict):
                raise GptlabError(
                    f"{self.file}, line {number}, is not a JSON object; is this the data for {self.name}?"
                )
            for field, kind in fields.items():
                if not isinstance(item.get(field), kind):
                    raise GptlabError(
                        f"{self.file}, line {number}, has no {field!r}; is this the data for {self.name}?"
                    )
            items.append(item)
        return items


def cache_directory() -> Path:
    """Return where downloads are kept: ``$GPTLAB_CACHE``, else ``~/.cache/gptlab``."""
    given = os.environ.get("GPTLAB_CACHE")
    return Path(given) if given else Path.home() / ".cache" / "gptlab"


def parse_paths(pairs: list[str]) -> dict[str, Path]:
    """Turn ``name=file`` into paths by name.

    Raises:
        GptlabError: another form, or a name that is not a data set's.
    """
    paths = {}
    for pair in pairs:
        name, equals, path = pair.partition("=")
        if not equals or not path:
            raise GptlabError(f"--data takes name=file, as in lambada=lambada_test.jsonl, got {pair!r}")
        if name not in SOURCES:
            raise GptlabError(f"no data set {name!r}{nearest(name, SOURCES)}; there are {', '.join(SOURCES)}")
        paths[name] = Path(path)
    return paths


def read(name: str, paths: Mapping[str, Path] | None = None) -> Data:
    """Return a data set: from the path given, from the cache, or from the network (then it is in the cache).

    Args:
        name: a key of `SOURCES`.
        paths: files by name, of data sets that need not be looked for. A file that is not the official one is taken
            as well; `Data.official` says so. The archive that the download would be is unpacked.

    Raises:
        GptlabError: the file cannot be read, or is not there and cannot be downloaded.
    """
    source = SOURCES[name]
    if paths and name in paths:
        content = _read_file(paths[name])
        return Data(name, paths[name].name, _unpack(content, source, str(paths[name])))
    cached = cache_directory() / source.file
    if cached.is_file():
        data = Data(name, source.member or source.file, _unpack(_read_file(cached), source, str(cached)))
        if not data.official:
            raise GptlabError(
                f"{cached} is not {source.title}: its sha256 differs; delete it, or give it with --data {name}={cached}"
            )
        return data
    archive = _download(name, source, cached)
    data = Data(name, source.member or source.file, _unpack(archive, source, source.url))
    if not data.official:
        raise GptlabError(
            f"{source.url} holds something other than {source.title}: its sha256 differs; {_by_hand(name, cached)}"
        )
    _keep(cached, archive)
    return data


def _read_file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise GptlabError(f"{path} cannot be read: {error.strerror}") from None


def _download(name: str, source: Source, cached: Path) -> bytes:
    try:
        with urllib.request.urlopen(source.url, timeout=60) as response:
            content: bytes = response.read()
    except (OSError, http.client.HTTPException) as error:  # URLError is an OSError
        reason = getattr(error, "reason", None) or error
        raise GptlabError(
            f"{source.title} is not here and cannot be downloaded ({reason}); {_by_hand(name, cached)}"
        ) from None
    return content


def _by_hand(name: str, cached: Path) -> str:
    return f"get {SOURCES[name].url} elsewhere and give it with --data {name}=FILE, or put it at {cached}"


def _unpack(content: bytes, source: Source, where: str) -> bytes:
    """Return the data itself; where ``content`` is not an archive, it is that already."""
    if not zipfile.is_zipfile(io.BytesIO(content)):
        return content
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as files:
            return files.read(source.member)
    except (KeyError, zipfile.BadZipFile):
        wanted = source.member or f"anything to do with {source.title}"
        raise GptlabError(f"{where} is not an intact archive with {wanted} in it; download it again") from None


def _keep(path: Path, content: bytes) -> None:
    """Write a file under a temporary name and move it into place, so that no half of one is ever found."""
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".partial")
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.replace(temporary, path)
    except OSError as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        raise GptlabError(
            f"cannot write to {path.parent}: {error.strerror}; set GPTLAB_CACHE to another place"
        ) from None
