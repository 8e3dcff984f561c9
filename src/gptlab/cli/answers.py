"""The file that `gptlab generate --batch` writes, beside it the settings that it was begun with.

    answers.jsonl        one JSON object a line, in the order in which texts were done
    answers.jsonl.json   the settings; a run that goes on must have the same

A line is written whole or, when the process is killed at that moment, cut off by the next run.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from gptlab.checkpoints.files import read_json, write_files
from gptlab.errors import GptlabError

try:
    import fcntl
except ImportError:  # no POSIX system
    fcntl = None  # type: ignore[assignment]

_OTHER = {
    "prompts_sha256": "another file of prompts",
    "weights_sha256": "another model, or another --dtype",
    "tokenizer_sha256": "another tokenizer",
}


class Settings(BaseModel):
    """All that the answers depend on, and what to call it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["gptlab generate answers"] = "gptlab generate answers"
    version: Literal[1] = 1
    prompts: str
    prompts_sha256: str
    model: str
    weights_sha256: str
    tokenizer_sha256: str
    device: str
    special: bool
    chat: bool
    max_new_tokens: int
    temperature: float
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float
    seed: int
    stop: list[str]
    compiled: bool
    """Other texts may come without the compiled step; with it, none depends on the batch size."""
    batch_size: int

    def difference(self, other: Settings) -> str | None:
        """Say in words why answers under ``other`` cannot be added to those under these settings, if they cannot."""
        for name in type(self).model_fields:
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine == theirs or name in ("prompts", "model"):
                continue
            if name == "compiled":
                return "with the compiled step, which is not to be had now"
            if name == "batch_size" and self.compiled:
                continue
            if name in _OTHER:
                return f"with {_OTHER[name]}"
            option = f"--{name.replace('_', '-')}"
            if isinstance(mine, bool):
                return f"{'with' if mine else 'without'} {option}"
            return f"with {option} {_shown(mine)}, not {_shown(theirs)}"
        return None


def _shown(value: Any) -> str:
    return "none" if value is None or value == [] else json.dumps(value)


class Answers:
    """Opens a file of answers, so that no other process writes to it meanwhile. Use it as a context manager.

    Attributes:
        path: of the file.
        begun: the settings of the answers that are there already, or None where there are none.
        done: their indices, known after `begin`.
        failed: how many of them are errors.

    Raises:
        GptlabError: the file cannot be written, is in use, or something other than answers.
    """

    def __init__(self, path: Path) -> None:
        if path.exists() and not path.is_file():
            raise GptlabError(f"--out must be a file, and {path} is something else; give another name")
        self.path, self._settings = path, path.with_name(path.name + ".json")
        self.begun: Settings | None = None
        self.done: set[int] = set()
        self.failed = 0
        try:
            self._file: IO[bytes] = path.open("a+b")
        except OSError as error:
            raise GptlabError(f"cannot write to {path}: {error.strerror}; choose another place for --out") from None
        try:
            self._lock()
            if self._size():
                self.begun = self._read_settings()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Answers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):
            if self.begun is None:  # nothing was begun
                self.path.unlink()
            self._file.close()  # a full disk has been told of by then

    def begin(self, settings: Settings) -> None:
        """Begin with these settings, or go on.

        Raises:
            GptlabError: what is there was begun with others, or is damaged.
        """
        if self.begun is None:
            content = settings.model_dump_json(indent=2).encode() + b"\n"
            write_files(self._settings.absolute().parent, {self._settings.name: content})
            self.begun = settings
            return
        if difference := self.begun.difference(settings):
            raise GptlabError(
                f"{self.path} was begun {difference}; to go on with it give the same as then, or give another --out"
            )
        self._file.seek(0)
        end = 0
        for number, line in enumerate(self._file, 1):
            if not line.endswith(b"\n"):
                break
            end += len(line)
            try:
                row = json.loads(line)
                self.done.add(int(row["index"]))
                self.failed += "error" in row
            except (ValueError, TypeError, LookupError):
                raise GptlabError(
                    f"line {number} of {self.path} is not an answer of this command; restore it, or give another --out"
                ) from None
        self._file.truncate(end)

    def write(self, row: dict[str, Any]) -> None:
        """Add a line, which another program sees at once.

        Raises:
            GptlabError: the disk is full.
        """
        try:
            self._file.write(json.dumps(row).encode() + b"\n")
            self._file.flush()
        except OSError as error:
            raise GptlabError(
                f"cannot write to {self.path}: {error.strerror}; make room, then the same command goes on from there"
            ) from None
        self.done.add(row["index"])
        self.failed += "error" in row

    def _size(self) -> int:
        return os.fstat(self._file.fileno()).st_size

    def _lock(self) -> None:
        if fcntl is not None:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise GptlabError(
                    f"another process is writing to {self.path}; wait for its end, or give another --out"
                ) from None
            except OSError:  # a file system without locks
                pass

    def _read_settings(self) -> Settings:
        if not self._settings.exists():
            raise GptlabError(
                f"{self.path} is there, but not {self._settings.name}, which says how it was begun; give another --out"
            )
        try:
            return Settings.model_validate(read_json(self._settings))
        except ValidationError as error:
            where = ".".join(map(str, error.errors()[0]["loc"]))
            raise GptlabError(f"{self._settings} is damaged ({where}); restore it, or give another --out") from None
