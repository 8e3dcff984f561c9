"""One computation at a time, in a thread of its own; what nobody waits for any more is not computed."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from starlette.requests import ClientDisconnect, Request

from gptlab.serving.http import gone

T = TypeVar("T")
Check = Callable[[], None]
"""Called now and then by whatever takes long; it raises `Stale` where nobody waits for the result."""


class Stale(Exception):
    """The result of a computation is not wanted any more."""


def nobody_leaves() -> None:
    """A `Check` for a computation whose result is wanted in any case."""


class Computer:
    """A line of computations, of which one runs."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="gptlab-explore")

    async def run(self, request: Request, compute: Callable[[Check], T]) -> T:
        """Compute when it is this request's turn. The page drops a request as soon as it has a newer question.

        Args:
            request: who asks; its body must have been read.
            compute: gets a `Check`.

        Raises:
            ClientDisconnect: the client has left. What it asked for is skipped, or ends at the next check.
        """
        left = threading.Event()
        leaving = asyncio.create_task(gone(request))
        leaving.add_done_callback(lambda task: None if task.cancelled() else left.set())

        def check() -> None:
            if left.is_set():
                raise Stale

        def task() -> T:
            check()
            return compute(check)

        try:
            return await asyncio.get_running_loop().run_in_executor(self._pool, task)
        except Stale:
            raise ClientDisconnect from None
        except asyncio.CancelledError:
            left.set()
            raise
        finally:
            leaving.cancel()

    def close(self) -> None:
        """Forget what waits; what runs is finished."""
        self._pool.shutdown(wait=False, cancel_futures=True)
