"""Limits of a connection: the time for a request's head, the time to take an answer, and how many there may be.

uvicorn has none of them: a client that sends a byte a second, or never reads, would hold its connection for ever.
"""

from __future__ import annotations

import asyncio

import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.h11_impl import H11Protocol

from gptlab.serving.errors import Refusal
from gptlab.serving.http import written

HEAD_SECONDS = 10.0
"""That a client has from its first byte, or from connecting, until its request's head is complete."""
UNREAD_SECONDS = 30.0
"""That a client may take nothing of an answer that waits for it."""
MOST_CONNECTIONS = 768
"""At a time: below the 1,024 files that a process may have open by default."""


class Protocol(H11Protocol):
    """HTTP/1.1 that ends connections whose request does not come, whose answer is not taken, or that are too many."""

    _deadline: asyncio.TimerHandle | None = None
    _patience: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        # Pause as soon as the system takes no more and until it has taken all: what waits can then only become less.
        transport.set_write_buffer_limits(high=0)
        if len(self.connections) > MOST_CONNECTIONS:
            self._refuse(Refusal(503, f"the server has {MOST_CONNECTIONS} connections already; close some, or wait"))
            return
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget()
        self._taken()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._wait(self.transport.get_write_buffer_size())

    def resume_writing(self) -> None:
        super().resume_writing()
        self._taken()

    def _watch(self) -> None:
        """Let the time run while no request is being answered; what follows an answer counts as the next one's head."""
        if self.cycle is not None and not self.cycle.response_complete:
            self._forget()
        elif self._deadline is None and not self.transport.is_closing():
            self._deadline = self.loop.call_later(HEAD_SECONDS, self._late)

    def _forget(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _late(self) -> None:
        self._deadline = None
        if self.transport.is_closing() or (self.cycle is not None and not self.cycle.response_complete):
            return
        if self.cycle is None:
            self._refuse(Refusal(408, f"the request's head did not come within {HEAD_SECONDS:.0f} seconds"))
        else:
            self.transport.close()

    def _wait(self, n_bytes: int) -> None:
        """Give the client time to take some of the bytes that wait for it."""
        self._patience = self.loop.call_later(UNREAD_SECONDS, self._unread, n_bytes)

    def _unread(self, n_bytes: int) -> None:
        left = self.transport.get_write_buffer_size()
        if left < n_bytes:
            self._wait(left)
        else:
            self._patience = None
            self.transport.abort()  # to close would wait until all is taken

    def _taken(self) -> None:
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None

    def _refuse(self, refusal: Refusal) -> None:
        """Answer what has not been asked, and close."""
        body = written(refusal.body)
        reason = {408: "Request Timeout", 503: "Service Unavailable"}[refusal.status]
        head = (
            f"HTTP/1.1 {refusal.status} {reason}\r\nContent-Type: application/json\r\nConnection: close\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()


def server_config(app: Starlette, grace: int) -> uvicorn.Config:
    """Return how an application is served: with these limits, and ``grace`` seconds to finish in when it is stopped."""
    return uvicorn.Config(
        app,
        http=Protocol,
        ws="none",
        lifespan="on",
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=grace,
    )
