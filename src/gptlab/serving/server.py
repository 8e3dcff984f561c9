"""Runs the application until it is told to stop."""

from __future__ import annotations

import asyncio
import contextlib
import socket

import uvicorn
from starlette.applications import Starlette

from gptlab.errors import GptlabError
from gptlab.serving.http import is_loopback
from gptlab.serving.protocol import Protocol
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


def check_access(host: str, api_key: str | None) -> None:
    """Refuse to answer other machines without a key.

    Raises:
        GptlabError: an address that is not loopback, and no key, or an empty one.
    """
    if api_key is not None and not api_key.strip():
        raise GptlabError("the API key is empty; give one, or leave it out")
    if api_key is None and not is_loopback(host):
        raise GptlabError(
            f"{host} can be reached from other machines, which needs a key: --api-key KEY, or GPTLAB_API_KEY in the"
            " environment; or leave --host out"
        )


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens; port 0 is any that is free.

    Raises:
        GptlabError: the address is not this machine's, or the port is taken or not allowed.
    """
    if not 0 <= port < 2**16:
        raise GptlabError(f"a port is 0 to 65535, got {port}")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(2048)
    except OSError as error:
        raise GptlabError(
            f"{host} port {port} cannot be listened on: {error.strerror or error}; choose another --port, or --host"
        ) from None
    return listening


def make_server(app: Starlette) -> Server:
    """Return what serves an application of `gptlab.serving.app`."""
    config = uvicorn.Config(
        app,
        http=Protocol,
        ws="none",
        lifespan="on",
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=int(GRACE) + 5,
    )
    return Server(config)
