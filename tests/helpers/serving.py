# A server on a free port, in a thread.
from __future__ import annotations

import contextlib
import http.client
import json
import socket
import threading
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import openai

from gptlab.language_model import LanguageModel
from gptlab.serving.app import make_app
from gptlab.serving.listening import listen
from gptlab.serving.server import make_server
from gptlab.serving.worker import Worker


@dataclass(frozen=True)
class Running:
    port: int
    worker: Worker
    client: openai.OpenAI
    connections: Collection[Any]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def request(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, Any]]:
        """Send a body as it is, or a value as JSON; return the status and the answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        content = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        connection.request(method, path, content, headers or {})
        response = connection.getresponse()
        answer = json.loads(response.read())
        connection.close()
        return response.status, answer

    def idle(self, seconds: float = 10.0) -> bool:
        """Wait until nothing is computed any more."""
        end = time.monotonic() + seconds
        while self.worker.load != (0, 0) and time.monotonic() < end:
            time.sleep(0.01)
        return self.worker.load == (0, 0)


@contextlib.contextmanager
def serving(
    lm: LanguageModel, name: str = "m", *, send_buffer: int | None = None, **settings: Any
) -> Iterator[Running]:
    """Serve a model; ``send_buffer`` is the bytes that the system may hold for a client that does not read."""
    app = make_app(lm, name, **settings)
    listening = listen("127.0.0.1", 0)
    if send_buffer is not None:  # accepted sockets have it from the one that listens
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
    server = make_server(app)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    port = listening.getsockname()[1]
    key = settings.get("api_key") or "none"
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=key, max_retries=0, timeout=60)
    try:
        yield Running(port, app.state.worker, client, server.server_state.connections)
    finally:
        client.close()
        server.should_exit = True
        thread.join()
