"""The thread that computes: texts come from any number of clients, share steps, and go."""

from __future__ import annotations

import collections
import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from gptlab.errors import GptlabError
from gptlab.generation.batch import MOST, SHARE
from gptlab.generation.compiled.decoder import can_serve, serves
from gptlab.generation.engine import memory_of_text
from gptlab.generation.memory import available_memory
from gptlab.generation.padded import CHUNK
from gptlab.generation.rows import Row, Rows, TokenScore
from gptlab.language_model import LanguageModel
from gptlab.serving.errors import Refusal, busy, stopping

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Piece:
    """What a step added to a text.

    Attributes:
        row: its number in the job.
        text: in whole characters, perhaps none.
        drawn: the new tokens.
        scores: theirs, where asked for.
        finish: why the text ended, or None.
    """

    row: int
    text: str
    drawn: tuple[int, ...]
    scores: tuple[TokenScore, ...]
    finish: str | None


class Job:
    """The texts of one request.

    Args:
        rows: which must not be touched before the job is done.
        deliver: called from the worker's thread: with a list of `Piece` after a step, where ``stream``; with None when
            all rows are done; with an exception, once and last, when they will not be.
        stream: whether pieces are wanted.
    """

    def __init__(self, rows: Sequence[Row], deliver: Callable[[Any], None], *, stream: bool) -> None:
        self.rows = list(rows)
        self.deliver = deliver
        self.stream = stream
        self.open = len(self.rows)  # rows that wait or run
        self.over = False


class Worker:
    """Continues the texts of all requests, so many at a time; others wait in line, up to a limit.

    Args:
        lm: its model must not change afterwards.
        max_length: tokens that a text may have, its prompt among them.
        slots: texts at a time; None: as many as fit into half of the free memory, at most `MOST`.
        queue: texts that may wait.
    """

    def __init__(self, lm: LanguageModel, *, max_length: int, slots: int | None = None, queue: int = 256) -> None:
        lm.model.eval()
        self.compiled = serves(lm.model, 4096) and can_serve()
        self._rows = Rows(lm.model, compiled=self.compiled, **lm.vocabulary())
        held, passing = memory_of_text(lm.model, max_length, max_length)
        free = available_memory(lm.model.wte.weight.device)
        most = MOST if free is None else min(MOST, max(1, int(SHARE * free) // (held + passing)))
        self.slots = most if slots is None else slots
        self.most = self.slots + queue
        self._condition = threading.Condition()
        self._waiting: collections.deque[tuple[Job, int]] = collections.deque()
        self._running: dict[Row, tuple[Job, int]] = {}
        self._open = 0  # texts that wait or run
        self._draining = self._closed = False
        self._threads = torch.get_num_threads()  # a thread begins with its own number
        self._thread = threading.Thread(target=self._run, name="gptlab-worker", daemon=True)

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()

    @property
    def load(self) -> tuple[int, int]:
        """How many texts are being continued, and how many wait."""
        return len(self._running), len(self._waiting)

    def submit(self, job: Job) -> None:
        """Put a job at the end of the line.

        Raises:
            Refusal: the line is too long, or the worker is ending.
        """
        with self._condition:
            if self._draining:
                raise stopping()
            if self._open + len(job.rows) > self.most:
                raise busy(self.most)
            self._open += len(job.rows)
            self._waiting += [(job, i) for i in range(len(job.rows))]
            self._condition.notify()

    def cancel(self, job: Job) -> None:
        """Forget a job: its places are free after the current step at the latest."""
        with self._condition:
            self._end(job)

    def drain(self) -> None:
        """Take no more jobs; those that wait are refused, those that have begun go on."""
        with self._condition:
            self._draining = True
            begun = {id(job) for job, _ in self._running.values()}
            for job in {id(job): job for job, _ in self._waiting if id(job) not in begun}.values():
                self._end(job, stopping())

    def abort(self) -> None:
        """Take no more jobs and end those that have begun."""
        with self._condition:
            self._draining = True
            for job, _ in [*self._running.values(), *self._waiting]:
                self._end(job, stopping())

    def close(self) -> None:
        """End the thread."""
        self.abort()
        with self._condition:
            self._closed = True
            self._condition.notify()
        if self._thread.is_alive():
            self._thread.join()

    def _end(self, job: Job, error: BaseException | None = None) -> None:
        """Take a job out of the line; its running rows go before the next step. Needs the lock."""
        if job.over:
            return
        job.over = True
        if job.open:
            self._waiting = collections.deque(entry for entry in self._waiting if entry[0] is not job)
            self._open -= job.open
            job.open = 0
        if error is not None:
            job.deliver(error)
        self._condition.notify()

    def _run(self) -> None:
        torch.set_num_threads(self._threads)
        while True:
            with self._condition:
                while not (self._waiting or self._running or self._closed):
                    self._condition.wait()
                if self._closed:
                    return
                gone = [row for row, (job, _) in self._running.items() if job.over]
                for row in gone:
                    del self._running[row]
                new = self._next()
            try:
                if gone:
                    self._rows.drop(gone)
                for row in new:
                    self._admit(row)
                self._step()
            except Exception:
                _log.exception("a step failed")
                self._fail(Refusal(500, "the server failed at this; its log says more"))

    def _next(self) -> list[Row]:
        """Take rows out of the line. A few short prompts are read between two steps, or one that is long."""
        new: list[Row] = []
        n_tokens = 0
        while self._waiting and len(self._running) < self.slots and n_tokens < CHUNK:
            job, i = self._waiting.popleft()
            row = job.rows[i]
            self._running[row] = job, i
            new.append(row)
            n_tokens += len(row.prompt.ids)
        return new

    def _admit(self, row: Row) -> None:
        job, _ = self._running[row]
        if job.over:
            return
        try:
            self._rows.admit(row)
        except GptlabError as error:
            with self._condition:
                self._end(job, Refusal(400, str(error)))
            return
        if row.grown.finish is not None:
            self._report([(row, "")])

    def _step(self) -> None:
        try:
            self._report(self._rows.step())
        except GptlabError as error:
            self._fail(Refusal(503, str(error)))

    def _report(self, stepped: Sequence[tuple[Row, str]]) -> None:
        """Tell jobs what was added to their rows, and when they are done."""
        pieces: dict[Job, list[Piece]] = {}
        with self._condition:
            for row, text in stepped:
                job, i = self._running[row]
                finish = row.grown.finish
                if finish is not None:
                    del self._running[row]
                if job.over:
                    continue
                listed = pieces.setdefault(job, [])
                if job.stream:
                    listed.append(Piece(i, text, tuple(row.drawn[-1:]), tuple(row.scores[-1:]), finish))
                if finish is not None:
                    job.open -= 1
                    self._open -= 1
            for job, listed in pieces.items():
                if listed:
                    job.deliver(listed)
                if not job.open:
                    job.over = True
                    job.deliver(None)

    def _fail(self, error: Refusal) -> None:
        """End all that runs."""
        with self._condition:
            rows = list(self._running)
            for job, _ in list(self._running.values()):
                self._end(job, error)
            self._running.clear()
        self._rows.drop(rows)
