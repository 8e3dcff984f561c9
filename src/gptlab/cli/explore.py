"""`gptlab explore`."""

from __future__ import annotations

import contextlib
import sys
import threading
import webbrowser
from pathlib import Path
from typing import Annotated

import typer


def explore(
    model: Annotated[
        list[str] | None,
        typer.Option(help="A model to begin with, beside the built-in ones; give it several times for several."),
    ] = None,
    text: Annotated[str | None, typer.Option(help="Text to begin with (default: an example).")] = None,
    port: Annotated[int, typer.Option(help="Port of the page; 0 takes any that is free.")] = 8080,
    host: Annotated[str, typer.Option(help="Address of the page; only this machine can be let in.")] = "127.0.0.1",
    browser: Annotated[bool, typer.Option("--browser/--no-browser", help="Open the page in a browser.")] = True,
    export: Annotated[
        Path | None, typer.Option(help="Write a page that needs no server, of one text, to this file, and stop.")
    ] = None,
    device: Annotated[str, typer.Option(help="Where to compute: cpu, cuda, cuda:1, mps.")] = "cpu",
) -> None:
    """Look inside models in a browser: losses, attention, heads and positions, side by side."""
    from gptlab.errors import GptlabError, needing

    with needing("serve", "the page's packages are"):
        from gptlab.exploring.app import make_app, make_server
        from gptlab.serving.http import is_loopback
        from gptlab.serving.listening import listen

    if text is not None and not text.strip():
        raise GptlabError("the text is empty; give it some words, or leave --text out for an example")
    if export is not None:
        from gptlab.exploring.export import write_page

        size = write_page(export, model or (), text=text, device=device)
        print(f"wrote {export} ({size / 2**20:.1f} MiB); a browser opens it without a server", file=sys.stderr)
        return
    if not is_loopback(host):
        raise GptlabError(f"{host} can be reached from other machines, and the page is for this one; leave --host out")
    listening = listen(host, port)
    shown = f"[{host}]" if ":" in host else host
    address = f"http://{shown}:{listening.getsockname()[1]}/"
    print(f"the page is at {address}; Ctrl-C stops it", file=sys.stderr, flush=True)
    if browser:
        threading.Thread(target=webbrowser.open, args=[address], daemon=True).start()
    with contextlib.suppress(KeyboardInterrupt):
        make_server(make_app(model or (), text=text, device=device)).run(sockets=[listening])
    print("stopped", file=sys.stderr)
