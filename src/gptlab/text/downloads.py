"""Corpora that everyone uses: where they are, what they must hold, and where they are kept."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from gptlab.errors import GptlabError


class Download(NamedTuple):
    """A file that can be downloaded; ``sha256`` in hexadecimal."""

    url: str
    file: str
    n_bytes: int
    sha256: str


_HUB = "https://huggingface.co/datasets"
DOWNLOADS = {
    "tiny-shakespeare": Download(
        "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
        "tiny-shakespeare.txt",
        1_115_394,
        "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
    ),
    # The authors' archives (Merity et al. 2016), which are no longer where they first were.
    "wikitext-2": Download(
        f"{_HUB}/ggml-org/ci/resolve/main/wikitext-2-raw-v1.zip",
        "wikitext-2-raw-v1.zip",
        4_721_645,
        "ef7edb566e3e2b2d31b29c1fdb0c89a4cc683597484c3dc2517919c615435a11",
    ),
    "wikitext-103": Download(
        f"{_HUB}/mattdangerw/wikitext-103-raw/resolve/main/wikitext-103-raw-v1.zip",
        "wikitext-103-raw-v1.zip",
        191_984_949,
        "91c00ae287f0d699e18605c84afc9e45c192bc6b7797ff8837e5474655a33794",
    ),
}
NAMES = tuple(DOWNLOADS)


def cache() -> Path:
    """Return the directory of downloaded corpora: ``$GPTLAB_CACHE``, or ``~/.cache/gptlab``."""
    return Path(os.environ.get("GPTLAB_CACHE") or Path.home() / ".cache" / "gptlab")


def fetch(name: str, report: Callable[[dict[str, Any]], None]) -> Path:
    """Return the path of a corpus of `DOWNLOADS`, downloading it when it is not in the cache yet.

    Args:
        name: of the corpus.
        report: called with the bytes so far and in all.

    Raises:
        GptlabError: it is not here and cannot be downloaded, or its size or checksum is not the published one.
    """
    download = DOWNLOADS[name]
    path = cache() / download.file
    if not path.exists():
        _download(name, download, path, report)
    if path.stat().st_size != download.n_bytes or _sha256(path) != download.sha256:
        raise GptlabError(f"{path} is not {name} as it was published; delete it, and it is downloaded again")
    return path


def _download(name: str, download: Download, path: Path, report: Callable[[dict[str, Any]], None]) -> None:
    partial: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{download.file}.", suffix=".partial")
        partial, done = Path(temporary), 0
        with open(handle, "wb") as file, urllib.request.urlopen(download.url, timeout=30) as response:
            while chunk := response.read(2**18):
                file.write(chunk)
                done += len(chunk)
                report({"event": "download", "name": name, "bytes": done, "total_bytes": download.n_bytes})
        if done != download.n_bytes or _sha256(partial) != download.sha256:
            raise GptlabError(
                f"what {download.url} gives is not {name} as it was published ({done:,} bytes of {download.n_bytes:,},"
                f" or another checksum); try again, or put {download.file} into the folder {path.parent}"
            )
        os.replace(partial, path)
    except OSError as error:
        reason = getattr(error, "reason", None) or error.strerror or type(error).__name__
        raise GptlabError(
            f"{name} cannot be downloaded ({reason}); to use it offline, put {download.file} from {download.url} into"
            f" the folder {path.parent}, or choose stdlib or pydoc, which need no network"
        ) from None
    finally:
        if partial is not None:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
