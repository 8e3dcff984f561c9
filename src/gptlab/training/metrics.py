"""`metrics.jsonl`: what a run reported, one JSON object a line."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from gptlab.checkpoints.files import write_files
from gptlab.errors import GptlabError
from gptlab.training.curves import METRICS


class Metrics:
    """Appends rows to a run's metrics and passes them on.

    Args:
        run: the run's directory.
        tell: called with every row.
        write: False on all processes but the first.
    """

    def __init__(self, run: Path, tell: Callable[[dict[str, Any]], None], write: bool) -> None:
        self._run, self._tell = run, tell
        self._file = (run / METRICS).open("a", encoding="utf-8") if write else None

    def __enter__(self) -> Metrics:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):  # a full disk has been told of by then
                self._file.close()

    def row(self, **values: Any) -> None:
        """Write a row and pass it on.

        Raises:
            GptlabError: the disk is full.
        """
        if self._file is not None:
            with self._refusing():
                self._file.write(json.dumps(values) + "\n")
                self._file.flush()
            self._tell(values)

    def sync(self) -> None:
        """Bring all rows to the disk, before the checkpoint that they lead up to; raises what `row` raises."""
        if self._file is not None:
            with self._refusing():
                os.fsync(self._file.fileno())

    @contextlib.contextmanager
    def _refusing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise GptlabError(
                f"cannot write to {self._run / METRICS}: {error.strerror}; make room, then go on with"
                f" gptlab train --resume {self._run}"
            ) from None


def cut(run: Path, step: int) -> None:
    """Take out the rows after ``step``, which the run will write again, and a last line that was cut off."""
    path = run / METRICS
    kept = []
    for line in path.read_bytes().splitlines(keepends=True) if path.exists() else ():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if line.endswith(b"\n") and row["step"] <= step and row["event"] != "end":
            kept.append(line)
    write_files(run, {METRICS: b"".join(kept)})
