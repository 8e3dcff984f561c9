"""`gptlab inspect`."""

from __future__ import annotations

import json
from typing import Annotated

import typer


def inspect(
    model: Annotated[
        str, typer.Argument(help="A preset such as gpt2-xl, a built-in model, a directory, or owner/name.")
    ],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
) -> None:
    """Show the size of every part of a model, and what its cache costs."""
    from gptlab.config import PRESETS, ModelConfig
    from gptlab.model import cost

    if model in PRESETS:
        config = ModelConfig.preset(model)
    else:
        from gptlab import checkpoints
        from gptlab.checkpoints import hub

        config = checkpoints.read_config(hub.locate(model))
    parts = cost.parameters(config)
    total = sum(parts.values())
    cache = {name: cost.cache_bytes_per_token(config, n) for name, n in (("float32", 4), ("bfloat16", 2))}
    if as_json:
        values = {
            "model": model,
            "config": config.to_dict(),
            "parameters": {**parts, "total": total},
            "weight_bytes": {"float32": 4 * total, "bfloat16": 2 * total},
            "cache_bytes_per_token": cache,
        }
        print(json.dumps(values, indent=2))
        return
    _show(model, config.context_length, parts, cache)
    head = "tied to the token embedding" if config.tie_embeddings else "separate"
    print(
        f"{config.n_layer} layers, {config.n_head} heads of {config.head_dim}, width {config.n_embd}, feed-forward"
        f" {config.inner}, vocabulary {config.vocab_size:,}, context {config.context_length:,}, output head {head}"
    )


def _show(model: str, context: int, parts: dict[str, int], cache: dict[str, int]) -> None:
    from rich.console import Console
    from rich.table import Table

    total = sum(parts.values())
    table = Table(title=model, title_justify="left")
    table.add_column("part")
    for column in ("parameters", "share", "MiB float32", "MiB bfloat16"):
        table.add_column(column, justify="right")
    for name, n in [*parts.items(), ("total", total)]:
        if name == "total":
            table.add_section()
        table.add_row(name, f"{n:,}", f"{n / total:.1%}", f"{4 * n / 2**20:.1f}", f"{2 * n / 2**20:.1f}")
    table.add_section()
    for name, per in (("cache, one token", 1), (f"cache, {context:,} tokens", context)):
        table.add_row(name, "", "", *(f"{per * cache[d] / 2**20:.3f}" for d in ("float32", "bfloat16")))
    Console().print(table)
