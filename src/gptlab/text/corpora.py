"""Texts to train on: a file, a directory, or the Python standard library's own sources."""

from __future__ import annotations

import hashlib
import re
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gptlab.errors import GptlabError
from gptlab.text.tokenizers import END_OF_TEXT

_DOCUMENT_END = re.compile(rf"^{re.escape(END_OF_TEXT)}(?:\n|\Z)", re.MULTILINE)


@dataclass(frozen=True)
class Corpus:
    """A named collection of documents.

    Attributes:
        name: what to call it in results.
        documents: the texts, in a fixed order.
        sha256: hash of the documents and of where each ends.
    """

    name: str
    documents: tuple[str, ...]

    @property
    def sha256(self) -> str:
        digest = hashlib.sha256()
        for document in self.documents:
            digest.update(hashlib.sha256(document.encode()).digest())
        return digest.hexdigest()

    @property
    def n_bytes(self) -> int:
        """Bytes of UTF-8 text in all documents."""
        return sum(len(document.encode()) for document in self.documents)

    def split(self, held_out: float) -> tuple[Corpus, Corpus]:
        """Return (training, held-out) parts.

        A document is held out when a hash of its text falls below ``held_out``, a share of 1: the side it is
        on does not depend on what else is in the corpus. Each part has at least one document; a corpus of
        one document is cut at ``1 - held_out`` of its characters, at a line's end.

        Raises:
            GptlabError: too little text for two parts.
        """
        documents = self.documents
        if len(documents) == 1:
            text = documents[0]
            cut = text.rfind("\n", 0, int(len(text) * (1 - held_out))) + 1
            if cut == 0:
                raise GptlabError(f"the corpus {self.name} is too short to hold a part of it out; add text")
            parts: tuple[list[str], list[str]] = [text[:cut]], [text[cut:]]
        else:
            ranked = sorted(set(documents), key=_rank)
            limit = sum(_rank(document) < held_out for document in ranked)
            limit = min(max(limit, 1), len(ranked) - 1)
            chosen = set(ranked[:limit])
            parts = [d for d in documents if d not in chosen], [d for d in documents if d in chosen]
        if not parts[0] or not parts[1]:
            raise GptlabError(f"the corpus {self.name} is too short to hold a part of it out; add text")
        return Corpus(self.name, tuple(parts[0])), Corpus(f"{self.name} (held out)", tuple(parts[1]))


def _rank(document: str) -> float:
    return int.from_bytes(hashlib.sha256(document.encode()).digest()[:8], "big") / 2**64


def read_corpus(source: str) -> Corpus:
    """Read ``stdlib``, a text file, or every ``.txt``, ``.md`` and ``.py`` file of a directory.

    A line ``<|endoftext|>`` ends a document; so does the end of a file.

    Raises:
        GptlabError: nothing there, nothing in it, or no UTF-8 text.
    """
    if source == "stdlib":
        root = Path(sysconfig.get_path("stdlib"))
        skip = {"site-packages", "test", "tests", "idlelib", "__pycache__"}
        files = [path for path in root.rglob("*.py") if not skip & set(path.relative_to(root).parts)]
        return Corpus("stdlib", _documents(sorted(files), strict=False))
    path = Path(source)
    if path.is_dir():
        files = [p for p in path.rglob("*") if p.suffix in (".txt", ".md", ".py") and p.is_file()]
        if not files:
            raise GptlabError(f"the directory {source} holds no .txt, .md or .py file; name another corpus")
        return Corpus(path.resolve().name, _documents(sorted(files)))
    if not path.exists():
        raise GptlabError(f"no corpus at {source}; give a text file, a directory of them, or 'stdlib'")
    return Corpus(path.stem, _documents([path]))


def _documents(files: Sequence[Path], strict: bool = True) -> tuple[str, ...]:
    documents: list[str] = []
    for path in files:
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            if not strict:  # a few of Python's own files are Latin-1 on purpose
                continue
            raise GptlabError(
                f"{path} is no UTF-8 text (byte {error.start}); convert it, for instance with iconv"
            ) from None
        except OSError as error:
            raise GptlabError(f"{path} cannot be read: {error.strerror}") from None
        documents += [part for part in _DOCUMENT_END.split(text) if part.strip()]
    if not documents:
        raise GptlabError(f"there is no text in {files[0] if files else 'the corpus'}; name another corpus")
    return tuple(documents)
