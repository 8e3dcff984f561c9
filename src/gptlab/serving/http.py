"""What lies between a socket and an answer: bodies within limits, errors in one form, clients that leave."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import json
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from gptlab.errors import GptlabError
from gptlab.serving.errors import Refusal

MOST_BYTES = 4 * 2**20
"""Of a body."""
MOST_SKIPPED = 16 * MOST_BYTES
"""Bytes of a body that is too long which are read to their end, so that its sender hears of it."""
BODY_SECONDS = 30.0
"""That a client has to send its body."""


class JSON(Response):
    """An answer as JSON in ASCII, which even a text with half a surrogate pair fits into."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return written(content)


def written(content: Any) -> bytes:
    """Return a value as JSON."""
    return json.dumps(content, allow_nan=False, separators=(",", ":")).encode()


def refused(refusal: Refusal) -> JSON:
    """Return a refusal as an answer."""
    headers = {"Retry-After": "1"} if refusal.status == 429 else {}
    if refusal.status == 401:
        headers = {"WWW-Authenticate": "Bearer"}
    return JSON(refusal.body, status_code=refusal.status, headers=headers)


def endpoint(route: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
    """Turn what a route raises into the answer that a client reads."""

    async def answer(request: Request) -> Response:
        try:
            return await route(request)
        except Refusal as refusal:
            return refused(refusal)
        except GptlabError as error:
            return refused(Refusal(400, str(error)))
        except ClientDisconnect:
            return Response(status_code=499)  # which nobody reads

    return answer


async def _http_error(request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 500
    said = {404: f"there is no {request.url.path:.100} here", 405: f"{request.url.path} does not take {request.method}"}
    return refused(Refusal(status, said.get(status, "the request cannot be answered")))


async def _server_error(request: Request, error: Exception) -> Response:
    return refused(Refusal(500, "the server failed at this; its log says more"))


ERRORS: Mapping[Any, Callable[[Request, Exception], Awaitable[Response]]] = {
    HTTPException: _http_error,
    Exception: _server_error,
}
"""How an application answers what no route raised on purpose."""


async def read_body(request: Request) -> bytes:
    """Return a request's body.

    Raises:
        Refusal: it is too long, or does not come in time.
        ClientDisconnect: the client has left.
    """
    body = bytearray()
    n_bytes = 0
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in request.stream():
                n_bytes += len(part)
                if n_bytes <= MOST_BYTES:
                    body += part
                elif n_bytes > MOST_SKIPPED:
                    break
    except TimeoutError:
        raise Refusal(408, f"the body did not come within {BODY_SECONDS:.0f} seconds; send it at once") from None
    if n_bytes > MOST_BYTES:
        raise Refusal(413, f"the body has more than {MOST_BYTES // 2**20} MiB; send fewer or shorter prompts at a time")
    return bytes(body)


async def gone(request: Request) -> None:
    """Wait until the client has left; its body must have been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


class Guard:
    """Lets in whoever may ask.

    With a key, whoever has it. Without one, whoever is on this machine: a page in a browser that comes from elsewhere
    is told off, also where its name has been made to point here.

    Args:
        app: what answers.
        key: that a client must show, as ``Authorization: Bearer KEY``, for all but ``/health``.
    """

    def __init__(self, app: ASGIApp, key: str | None) -> None:
        self._app, self._key = app, key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] != "/health":
            refusal = self._refusal(Headers(scope=scope))
            if refusal is not None:
                await refused(refusal)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _refusal(self, headers: Headers) -> Refusal | None:
        if self._key is not None:
            shown = headers.get("authorization", "").removeprefix("Bearer ").strip()
            if hmac.compare_digest(shown.encode(), self._key.encode()):
                return None
            return Refusal(401, "this server wants its API key, as Authorization: Bearer KEY", code="invalid_api_key")
        host = headers.get("host", "")
        origin = headers.get("origin")
        if not is_loopback(_name(host)) or (origin is not None and origin.rpartition("//")[2] != host):
            return Refusal(403, "without an API key this server answers programs of this machine only")
        return None


def is_loopback(name: str) -> bool:
    """Say whether a host's name or address is that of this machine to itself."""
    try:
        return name.lower() == "localhost" or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def _name(host: str) -> str:
    """The name in a Host header, without its port."""
    return host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
