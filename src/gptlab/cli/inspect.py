"""`gptlab inspect`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gptlab.cli.model_options import (
    BiasFlag,
    DilationFlag,
    KvHeadFlag,
    MlpFlag,
    NormFlag,
    PositionFlag,
    SinksFlag,
    WindowFlag,
    overrides,
)

if TYPE_CHECKING:
    from gptlab.config import ModelConfig

DTYPES = {"float32": 4, "bfloat16": 2}


def inspect(
    model: Annotated[
        str, typer.Argument(help="A preset such as gpt2-xl, a built-in model, a directory, or owner/name.")
    ],
    position: PositionFlag = None,
    n_kv_head: KvHeadFlag = None,
    window: WindowFlag = None,
    sinks: SinksFlag = None,
    dilation: DilationFlag = None,
    norm: NormFlag = None,
    mlp: MlpFlag = None,
    bias: BiasFlag = None,
    context: Annotated[int | None, typer.Option(help="Tokens for cache and arithmetic; else the model's own.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
) -> None:
    """Show what a model weighs, computes and keeps in its cache; with changes, beside the model without them."""
    from gptlab.config import PRESETS, ModelConfig, with_changes
    from gptlab.errors import GptlabError

    changes = overrides(position, n_kv_head, window, sinks, dilation, norm, mlp, bias)
    if model in PRESETS:
        plain = ModelConfig.preset(model)
    else:
        from gptlab import checkpoints
        from gptlab.checkpoints import hub

        plain = checkpoints.read_config(hub.locate(model))
    configs = {model: plain}
    if changes:
        configs[f"{model} changed"] = ModelConfig.from_dict(with_changes(plain.to_dict(), changes))
    tokens = plain.context_length if context is None else context
    if tokens < 1:
        raise GptlabError(f"--context must be at least 1, got {tokens}")
    facts = {name: _facts(config, tokens) for name, config in configs.items()}
    if as_json:
        print(json.dumps({"model": model, **facts[model], "changed": facts.get(f"{model} changed")}, indent=2))
        return
    _show(facts, tokens)
    for name, config in configs.items():
        print(f"{name}: {_describe(config)}")
        if config.has_table and tokens > config.context_length:
            print(
                f"{name}: learned positions end at {config.context_length:,}; beyond, its figures are arithmetic only"
            )


def _facts(config: ModelConfig, tokens: int) -> dict[str, Any]:
    from gptlab.model import cost

    parts = cost.parameters(config)
    total = sum(parts.values())
    return {
        "config": config.to_dict(),
        "context": tokens,
        "parameters": {**parts, "total": total},
        "weight_bytes": {name: n * total for name, n in DTYPES.items()},
        "cache_bytes_per_token": {name: cost.cache_bytes_per_token(config, n) for name, n in DTYPES.items()},
        "cache_bytes": {name: cost.cache_bytes(config, tokens, n) for name, n in DTYPES.items()},
        "forward_flops_per_token": cost.forward_flops(config, tokens).total // tokens,
        "attention_flops_per_token": cost.forward_flops(config, tokens).attention // tokens,
        "bytes_read_per_generated_token": {
            name: sum(cost.decode_bytes(config, tokens - 1, n)) for name, n in DTYPES.items()
        },
        "receptive_field": cost.receptive_field(config),
    }


def _show(facts: dict[str, dict[str, Any]], tokens: int) -> None:
    from rich.table import Table

    from gptlab.cli.output import table_console

    table = Table()
    table.add_column("")
    for name in facts:
        table.add_column(name, justify="right")
    columns = list(facts.values())
    for part in columns[0]["parameters"]:
        if part == "total":
            table.add_section()
        table.add_row(f"parameters: {part}", *(f"{column['parameters'].get(part, 0):,}" for column in columns))
    table.add_section()
    mebibytes = (
        ("weights", "weight_bytes"),
        (f"cache, {tokens:,} tokens", "cache_bytes"),
        ("read per generated token", "bytes_read_per_generated_token"),
    )
    for label, key in mebibytes:
        for dtype in DTYPES:
            cells = (f"{column[key][dtype] / 2**20:,.1f}" for column in columns)
            table.add_row(f"{label}, {dtype}, MiB", *cells)
    table.add_section()
    for label, key in (("forward", "forward_flops_per_token"), ("of it attention", "attention_flops_per_token")):
        table.add_row(f"{label}, MFLOP per token", *(f"{column[key] / 1e6:,.1f}" for column in columns))
    fields = ("all" if column["receptive_field"] is None else f"{column['receptive_field']:,}" for column in columns)
    table.add_row("receptive field, tokens", *fields)
    table_console().print(table)


def _describe(config: ModelConfig) -> str:
    head = "tied to the token embedding" if config.tie_embeddings else "separate"
    window = "" if config.window is None else f", window {config.window}, sinks {config.sinks}"
    dilation = "" if set(config.dilations) == {1} else f", dilation {config.dilation}"
    feed_forward = "swiglu " if config.mlp == "swiglu" else ""
    norms = "" if config.norm == "layer" else f"{config.norm} norms, "
    biases = "" if config.bias else "no biases, "
    heads = f"{config.n_head} heads of {config.head_dim} on {config.kv_heads} key/value heads"
    return (
        f"{config.n_layer} layers, {heads}, width {config.n_embd}, {feed_forward}feed-forward {config.inner},"
        f" {norms}{biases}vocabulary {config.vocab_size:,}, context {config.context_length:,},"
        f" {config.position} positions{window}{dilation}, output head {head}"
    )
