"""The routes: the page, its files, and the questions that it asks. Nothing here imports torch: the page comes first."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

import uvicorn
from starlette.applications import Starlette
from starlette.datastructures import MutableHeaders
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gptlab.exploring.computing import Check, Computer
from gptlab.exploring.page import TYPES, files, policy
from gptlab.exploring.texts import AT_FIRST, BUILT_IN, beginning
from gptlab.serving.bodies import parse
from gptlab.serving.errors import Refusal
from gptlab.serving.http import ERRORS, JSON, Guard, endpoint, read_body
from gptlab.serving.protocol import server_config

if TYPE_CHECKING:
    from gptlab.exploring.shelf import Shelf


def make_app(models: Sequence[str] = (), *, text: str | None = None, device: str = "cpu") -> Starlette:
    """Make the application.

    Args:
        models: to begin with, beside the built-in ones, as `gptlab.load` takes them; none: two of the built-in ones.
            A model is loaded when it is first asked for.
        text: to begin with; None: the first of the examples.
        device: where to compute.
    """
    names = list(dict.fromkeys([*models, *BUILT_IN]))
    chosen = list(dict.fromkeys(models)) or list(AT_FIRST)
    computer = Computer()
    shelves: list[Shelf] = []

    def answer(path: str, body: bytes, check: Check) -> Any:
        """In the computer's thread, which is the one that imports torch."""
        from gptlab.exploring.answers import ANSWERS
        from gptlab.exploring.shelf import Shelf

        if path not in ANSWERS:
            raise Refusal(404, f"there is no question {path!r:.60}; there are {', '.join(ANSWERS)}")
        kind, function = ANSWERS[path]
        asked = parse(body, kind)
        if not shelves:
            shelves.append(Shelf(names, device))
        return function(shelves[0], asked, check)

    async def ask(request: Request) -> Response:
        body, path = await read_body(request), request.path_params["question"]
        return _written(await computer.run(request, functools.partial(answer, path, body)))

    async def begin(request: Request) -> Response:
        return JSON(beginning(names, chosen, text))

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        computer.close()

    content = files()
    return Starlette(
        routes=[
            Route("/", _file("index.html", content["index.html"])),
            *(Route(f"/static/{name}", _file(name, data)) for name, data in content.items() if name != "index.html"),
            Route("/api/begin", endpoint(begin), methods=["GET"]),
            Route("/api/{question}", endpoint(ask), methods=["POST"]),
        ],
        exception_handlers=ERRORS,
        middleware=[Middleware(Headers), Middleware(Guard, key=None)],
        lifespan=lifespan,
    )


class Headers:
    """Says to the browser that a page may load nothing but what comes from here, and that others may not show it."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._headers = {
            "Content-Security-Policy": policy(),
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cross-Origin-Resource-Policy": "same-origin",
            "Cache-Control": "no-cache",
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(self._headers)
            await send(message)

        await self._app(scope, receive, sending)


def _file(name: str, content: bytes) -> Callable[[Request], Awaitable[Response]]:
    kind = TYPES[PurePath(name).suffix]

    async def file(request: Request) -> Response:
        return Response(content, media_type=kind)

    return file


def _written(answer: Any) -> Response:
    """JSON, or the bytes of a tensor with its shape beside them."""
    if isinstance(answer, dict):
        return JSON(answer)
    shape = ",".join(map(str, answer.shape))
    return Response(answer.numpy().tobytes(), media_type="application/octet-stream", headers={"X-Shape": shape})


def make_server(app: Starlette) -> uvicorn.Server:
    """Return what serves the page. Ctrl-C ends it at once: nothing that is computed here is worth waiting for."""
    return uvicorn.Server(server_config(app, 1))
