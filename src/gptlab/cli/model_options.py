"""The changes of a model as command-line flags, named as the fields of `ModelConfig` are."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from gptlab.errors import GptlabError

PositionFlag = Annotated[str | None, typer.Option("--position", help="learned, rope or none.")]
KvHeadFlag = Annotated[int | None, typer.Option("--n-kv-head", help="Key/value heads; a divisor of n_head.")]
WindowFlag = Annotated[
    str | None,
    typer.Option("--window", help="Keys that a query sees: one number, none, or one a layer as 128,128,none."),
]
SinksFlag = Annotated[int | None, typer.Option("--sinks", help="First tokens that stay visible outside the window.")]
DilationFlag = Annotated[
    str | None, typer.Option("--dilation", help="Distance between the keys of a window: one number, or one a layer.")
]

NormFlag = Annotated[str | None, typer.Option("--norm", help="layer or rms.")]
MlpFlag = Annotated[str | None, typer.Option("--mlp", help="Feed-forward network: gelu (GPT-2's) or swiglu.")]
BiasFlag = Annotated[
    bool | None, typer.Option("--bias/--no-bias", help="Whether projections and layer norms have a bias.")
]


def overrides(
    position: str | None,
    n_kv_head: int | None,
    window: str | None,
    sinks: int | None,
    dilation: str | None,
    norm: str | None = None,
    mlp: str | None = None,
    bias: bool | None = None,
) -> dict[str, Any]:
    """Return the fields of `ModelConfig` that were given; a window of None is full attention.

    Raises:
        GptlabError: a list that is not a list of numbers.
    """
    given = {"position": position, "n_kv_head": n_kv_head, "sinks": sinks, "norm": norm, "mlp": mlp, "bias": bias}
    layers = {"window": window, "dilation": dilation}
    return {
        **{name: value for name, value in given.items() if value is not None},
        **{name: _per_layer(f"--{name}", text) for name, text in layers.items() if text is not None},
    }


def _per_layer(flag: str, text: str) -> int | list[int | None] | None:
    try:
        values = [None if part.strip() == "none" else int(part) for part in text.split(",")]
    except ValueError:
        raise GptlabError(f"{flag} takes a number, or one per layer as in 128,128,none, got {text!r}") from None
    return values[0] if len(values) == 1 else values
