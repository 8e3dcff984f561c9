"""Answers as they come: whole, or as server-sent events; a client that leaves ends its texts."""

from __future__ import annotations

import asyncio
import collections
from collections.abc import AsyncIterator, Callable
from typing import Any, Protocol

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from gptlab.generation.rows import TokenScore
from gptlab.serving.errors import Refusal
from gptlab.serving.http import JSON, gone, written
from gptlab.serving.worker import Piece


class Form(Protocol):
    """What writes an answer."""

    def whole(self) -> dict[str, Any]: ...

    def chunk(
        self,
        i: int,
        text: str,
        drawn: tuple[int, ...],
        scores: tuple[TokenScore, ...],
        finish: str | None,
        first: bool,
    ) -> dict[str, Any] | None: ...

    def closing(self) -> dict[str, Any]: ...


APART = 1e-3
"""Seconds for each text between two times that all texts are told what is new: 32 texts hear of it 30 times a second, a
single one at once. Writing to each after every step would take a quarter of a core from the model."""


class Post:
    """Carries things from the worker's thread to the event loop, which is woken once for all that some steps bring."""

    def __init__(self) -> None:
        self._updates: collections.deque[tuple[asyncio.Queue[Any], Any]] = collections.deque()
        self._planned = False
        self._next = 0.0  # not to be handed out before

    def send(self, loop: asyncio.AbstractEventLoop, queue: asyncio.Queue[Any], update: Any) -> None:
        """Put an update into a queue of the loop; called from any thread."""
        self._updates.append((queue, update))
        if not self._planned and not loop.is_closed():
            self._planned = True
            loop.call_soon_threadsafe(self._plan, loop)

    def _plan(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._next > loop.time():
            loop.call_at(self._next, self._hand_out, loop)
        else:
            self._hand_out(loop)

    def _hand_out(self, loop: asyncio.AbstractEventLoop) -> None:
        self._planned = False  # before the first is taken, so that none is left lying
        told = set()
        while self._updates:
            queue, update = self._updates.popleft()
            queue.put_nowait(update)
            told.add(queue)
        self._next = loop.time() + APART * len(told)


class Outbox:
    """What the worker's thread hands to a request.

    Args:
        loop: in which the request is answered.
        post: one for all requests of the loop.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, post: Post) -> None:
        self._loop, self._post = loop, post
        self._queue: asyncio.Queue[Any] = asyncio.Queue()

    def deliver(self, update: list[Piece] | BaseException | None) -> None:
        """Hand something over; called from any thread."""
        self._post.send(self._loop, self._queue, update)

    def leave(self, _: object) -> None:
        """Note that the client has left; called in the event loop."""
        self._queue.put_nowait(ClientDisconnect())

    async def next(self) -> tuple[list[Piece], bool]:
        """Return all the pieces that there are by now, at least one step's, and whether all is done.

        Raises:
            Refusal: the texts will not be finished.
            ClientDisconnect: nobody is there to read them.
        """
        pieces: list[Piece] = []
        update = await self._queue.get()
        while True:
            if isinstance(update, BaseException):
                raise update
            if update is None:
                return pieces, True
            pieces += update
            if self._queue.empty():
                return pieces, False
            update = self._queue.get_nowait()


async def answer(
    request: Request, outbox: Outbox, form: Form, cancel: Callable[[], None], stream: bool, with_usage: bool
) -> Response:
    """Return the answer to a request whose job has been submitted.

    Raises:
        Refusal: the texts were refused before there was anything to send.
        ClientDisconnect: the client has left; ``cancel`` has been called.
    """
    leaving = asyncio.create_task(gone(request))
    leaving.add_done_callback(outbox.leave)
    try:
        first = await outbox.next()
    except BaseException:
        cancel()
        leaving.cancel()
        raise
    if stream:
        return _Events(outbox, first, form, cancel, leaving, with_usage)
    leaving.cancel()
    return JSON(form.whole())


class _Events(Response):
    """Server-sent events, the last of which is ``[DONE]``."""

    def __init__(
        self,
        outbox: Outbox,
        first: tuple[list[Piece], bool],
        form: Form,
        cancel: Callable[[], None],
        leaving: asyncio.Task[None],
        with_usage: bool,
    ) -> None:
        super().__init__(media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        del self.headers["content-length"]
        self._outbox, self._first, self._form = outbox, first, form
        self._cancel, self._leaving, self._with_usage = cancel, leaving, with_usage

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for event in self._events():
                await send({"type": "http.response.body", "body": event, "more_body": True})
            await send({"type": "http.response.body", "body": b""})
        except ClientDisconnect:
            pass
        finally:
            self._leaving.cancel()
            self._cancel()  # of no effect on what is done

    async def _events(self) -> AsyncIterator[bytes]:
        (pieces, done), begun = self._first, set[int]()
        try:
            while True:
                body = b"".join(self._event(piece, begun) for piece in pieces)
                if body:
                    yield body
                if done:
                    break
                pieces, done = await self._outbox.next()
        except Refusal as refusal:
            yield _line(refusal.body)
        else:
            yield (_line(self._form.closing()) if self._with_usage else b"") + b"data: [DONE]\n\n"

    def _event(self, piece: Piece, begun: set[int]) -> bytes:
        first = piece.row not in begun
        chunk = self._form.chunk(piece.row, piece.text, piece.drawn, piece.scores, piece.finish, first)
        if chunk is None:
            return b""
        begun.add(piece.row)
        return _line({**chunk, "usage": None} if self._with_usage else chunk)


def _line(content: Any) -> bytes:
    return b"data: " + written(content) + b"\n\n"
