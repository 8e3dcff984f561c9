# The page for looking inside, on a free port, in a thread.
from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

from gptlab.exploring.app import make_app, make_server
from gptlab.serving.listening import listen


@contextlib.contextmanager
def exploring(**settings: Any) -> Iterator[str]:
    """Serve the page; yield its address."""
    listening = listen("127.0.0.1", 0)
    server = make_server(make_app(**settings))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/"
    finally:
        server.should_exit = True
        thread.join()
