"""`gptlab serve`."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Annotated

import typer


def serve(
    model: Annotated[
        str, typer.Option(help="A built-in model, a directory, smollm2, gpt2 ... gpt2-xl, or owner/name.")
    ] = "pocket",
    host: Annotated[
        str, typer.Option(help="Address to answer at; with --api-key it may be one that others can reach.")
    ] = ("127.0.0.1"),
    port: Annotated[int, typer.Option(help="Port to answer at; 0 takes any that is free.")] = 8000,
    api_key: Annotated[
        str | None, typer.Option(envvar="GPTLAB_API_KEY", help="What clients must show (default: nothing).")
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="What clients call the model (default: --model, of a path its last part).")
    ] = None,
    max_length: Annotated[
        int | None, typer.Option(help="Tokens of the longest text, its prompt among them (default: the context).")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Texts to continue at a time (default: what fits into half of the free memory).")
    ] = None,
    queue: Annotated[int, typer.Option(help="Texts that may wait; beyond that the answer is 429.")] = 256,
    tokenizer: Annotated[str | None, typer.Option(help="gpt2 or bytes, for weights without a tokenizer.")] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="float32, bfloat16, int8 or int4; auto for the fastest that keeps the quality (default: float32, or"
            " what the model was saved in)."
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="Where to compute: cpu, cuda, cuda:1, mps.")] = "cpu",
) -> None:
    """Answer programs by OpenAI's completions interface."""
    from gptlab.errors import needing

    with needing("serve", "the server's packages are"):
        from gptlab.serving.app import make_app
        from gptlab.serving.listening import check_access, listen
        from gptlab.serving.server import make_server
    import gptlab

    check_access(host, api_key)
    listening = listen(host, port)
    try:
        lm = gptlab.load(model, dtype=dtype, tokenizer=tokenizer, device=device)
        called = name or (Path(model).resolve().name if Path(model).exists() else model)
        app = make_app(lm, called, max_length=max_length, slots=batch_size, queue=queue, api_key=api_key)
        shown = f"[{host}]" if ":" in host else host
        print(
            f"{called} answers at http://{shown}:{listening.getsockname()[1]}/v1, {app.state.worker.slots} texts at a"
            f" time and {queue} waiting; Ctrl-C stops it",
            file=sys.stderr,
            flush=True,
        )
        # The thread that computes and the one that talks take turns many times a step, and would wait each time.
        sys.setswitchinterval(2e-4)
        with contextlib.suppress(KeyboardInterrupt):
            make_server(app).run(sockets=[listening])
        print("stopped", file=sys.stderr)
    finally:
        listening.close()
