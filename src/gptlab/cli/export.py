"""`gptlab export`."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer

from gptlab.errors import GptlabError

DTYPES = ("float32", "bfloat16", "float16")


def export(
    model: Annotated[str, typer.Argument(help="A built-in model, a directory, a file, a run, or owner/name.")],
    out: Annotated[Path, typer.Option(help="Directory or file to write.")],
    format: Annotated[str, typer.Option(help="hf: a directory for transformers; gguf: a file for llama.cpp.")] = "hf",
    dtype: Annotated[str, typer.Option(help=f"Type of the weights: {', '.join(DTYPES)}.")] = "float32",
    custom_code: Annotated[
        bool, typer.Option("--custom-code", help="hf: where no class computes the model, include its own code.")
    ] = False,
    max_shard_size: Annotated[
        str | None, typer.Option(help="hf: largest size of a file, such as 500MB (default 50GB).")
    ] = None,
    type: Annotated[
        str | None, typer.Option(help="gguf: type of the weights: f32 (default), f16, bf16 or q8_0.")
    ] = None,
    context: Annotated[
        int | None, typer.Option(help="gguf: cap the context at so many tokens, as at a window that llama.cpp ignores.")
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Read the result back and compare its logits.")
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
) -> None:
    """Write a model for another program, in the form that computes exactly the same."""
    if dtype not in DTYPES:
        raise GptlabError(f"--dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    for flag, given in (("--custom-code", custom_code), ("--max-shard-size", max_shard_size is not None)):
        if given and format != "hf":
            raise GptlabError(f"{flag} belongs to --format hf; drop it")
    for flag, given in (("--type", type is not None), ("--context", context is not None)):
        if given and format != "gguf":
            raise GptlabError(f"{flag} belongs to --format gguf; drop it")
    if format == "gguf" and dtype != "float32":
        raise GptlabError("the weights of a GGUF file have a type; use --type instead of --dtype")
    import torch

    from gptlab.exporting import export as write

    result = write(
        model,
        out,
        format=format,
        dtype=getattr(torch, dtype),
        verify=verify,
        planning={
            name: value
            for name, value in (("custom_code", custom_code or None), ("type", type), ("context", context))
            if value is not None
        },
        **({} if max_shard_size is None else {"max_shard_size": max_shard_size}),
    )
    if as_json:
        print(json.dumps({"model": model, "out": str(out), "format": format, **dataclasses.asdict(result)}, indent=2))
        return
    print(f"{model} as {result.family}: {out}")
    if custom_code and result.family != "gptlab":
        print(f"   --custom-code was not needed: {result.family} computes exactly this, so no code is sent along")
    for words in result.rewritten:
        print(f"   the same function: {words}")
    for words in result.lost:
        print(f"   lost: {words}")
    if result.difference is None:
        print("not compared with its source, as requested")
    else:
        print(
            f"read back and compared on {result.tokens:,} tokens: logits differ by at most {result.difference:.2g}"
            f" (their standard deviation is {result.spread:.2g})"
        )
