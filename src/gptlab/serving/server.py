"""Runs the application until it is told to stop."""

from __future__ import annotations

import asyncio
import contextlib
import socket

import uvicorn
from starlette.applications import Starlette

from gptlab.serving.protocol import server_config
from gptlab.serving.worker import Worker

GRACE = 10.0
"""Seconds in which texts that have begun may be finished after the first Ctrl-C."""


class Server(uvicorn.Server):
    """Finishes what has begun, for `GRACE` seconds, when it is told to stop; at once when it is told again."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        worker: Worker = self.config.app.state.worker  # type: ignore[union-attr]
        worker.drain()
        aborting = asyncio.create_task(self._abort(worker))
        await super().shutdown(sockets)
        aborting.cancel()
        worker.close()

    async def _abort(self, worker: Worker) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(GRACE):
                while not self.force_exit:
                    await asyncio.sleep(0.05)
        worker.abort()


def make_server(app: Starlette) -> Server:
    """Return what serves an application of `gptlab.serving.app`."""
    return Server(server_config(app, int(GRACE) + 5))
