"""A model out of gptlab: written in another program's format, read back, and compared."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor

from gptlab import checkpoints
from gptlab.checkpoints import Checkpoint, gguf, hub, huggingface
from gptlab.checkpoints.card import read_facts
from gptlab.checkpoints.files import refuse_bytes
from gptlab.conversion.calibration import DEFAULT_TEXT, calibration_rows
from gptlab.errors import GptlabError, nearest
from gptlab.formatting import readable
from gptlab.model.gpt import GPT, SCALES

ROWS, LENGTH = 2, 256
"""Rows of the text on which an export is compared with its source, and their longest length in tokens."""
TOLERANCES = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""How far logits, relative to their standard deviation, may be off after a rewriting that is exact on paper."""
LOSSY = {"f16": 2e-2, "bf16": 1e-1, "q8_0": 3e-1}
"""The same after the writer has rounded the weights to a type of GGUF."""


class Report(Protocol):
    """What a writer says of its result: what is written otherwise with the same function, and what is lost."""

    @property
    def family(self) -> str: ...
    @property
    def rewritten(self) -> tuple[str, ...]: ...
    @property
    def lost(self) -> tuple[str, ...]: ...


@dataclasses.dataclass(frozen=True)
class Export:
    """What an export came to.

    Attributes:
        family: the architecture in the other program.
        rewritten: what is written otherwise than it was, with the same function.
        lost: what the other program does not have.
        difference: the largest difference of a logit between the source and what was read back, or None.
        spread: the standard deviation of the source's logits.
        tokens: on how many tokens they were compared.
    """

    family: str
    rewritten: tuple[str, ...]
    lost: tuple[str, ...]
    difference: float | None
    spread: float | None
    tokens: int


WRITERS: Mapping[str, Callable[..., Report]] = MappingProxyType({"hf": huggingface.write, "gguf": gguf.write})
"""The formats that can be written, by their names on the command line."""
PLANS: Mapping[str, Callable[..., Any]] = MappingProxyType({"hf": huggingface.plan, "gguf": gguf.plan})
"""For each, what refuses a configuration that it cannot hold before any weight is read."""


def export(
    model: str | Path,
    out: Path,
    *,
    format: str = "hf",
    dtype: torch.dtype = torch.float32,
    verify: bool = True,
    planning: Mapping[str, Any] | None = None,
    **options: Any,
) -> Export:
    """Write a model in another program's format, read it back, and compare the logits.

    Args:
        model: what `gptlab.load` takes.
        out: the directory or file to write; it must not exist.
        format: one of `WRITERS`.
        dtype: of the weights as they are written.
        verify: compare with the source.
        planning: options that decide whether the format can hold the model at all; they go to the writer as well.
        **options: for the writer.

    Raises:
        GptlabError: an unknown format, a model that the format cannot hold, a place that is taken, or a result that
            does not compute what its source does.
    """
    if format not in WRITERS:
        raise GptlabError(f"unknown format {format!r}{nearest(format, WRITERS)}; there are {', '.join(WRITERS)}")
    if out.exists():
        raise GptlabError(f"{out} already exists; choose another --out, or remove it")
    refuse_bytes(out)
    path = hub.locate(str(model))
    planning = planning or {}
    PLANS[format](checkpoints.read_config(path), **planning)
    source = checkpoints.read(path)
    stored = {name: tensor if name in SCALES else tensor.to(dtype) for name, tensor in source.state.items()}
    facts = {"name": readable(str(model)), **(read_facts(path) if path.is_dir() else {})}
    if checkpoints.format_of(path) is gguf:  # its card is inside
        facts["import"] = {"source": path.name, "format": "gguf", "card": gguf.read_card(path)}
    report = WRITERS[format](out, source._replace(state=stored), facts=facts, **planning, **options)
    difference = spread = None
    rows: list[Tensor] = []
    if verify:
        result = checkpoints.read(out)
        rows = calibration(source, min(source.config.context_length, result.config.context_length, LENGTH))
        rounded = source._replace(state={name: tensor.float() for name, tensor in stored.items()})
        difference, spread = compare(rounded, result, rows)
        if not difference <= max(TOLERANCES[dtype], LOSSY.get(planning.get("type", ""), 0.0)) * spread:
            raise GptlabError(
                f"what was written to {out} does not compute what {model} does: logits differ by up to"
                f" {difference:.2g} (their standard deviation is {spread:.2g}); do not use it, and report this"
            )
    return Export(report.family, report.rewritten, report.lost, difference, spread, sum(map(len, rows)))


def calibration(checkpoint: Checkpoint, length: int) -> list[Tensor]:
    """Return rows of ``length`` ids to compare models on.

    They are of a text of Python's own, or random where there is no tokenizer, or one that cannot write that text.
    """
    config, tokenizer = checkpoint.config, checkpoint.tokenizer
    if tokenizer is not None and tokenizer.vocab_size <= config.vocab_size:
        with contextlib.suppress(GptlabError):  # a character-level model knows its own characters alone
            return list(calibration_rows(tokenizer, length, ROWS * length, DEFAULT_TEXT))
    return list(torch.randint(config.vocab_size, (ROWS, length), generator=torch.Generator().manual_seed(0)))


@torch.no_grad()
def compare(source: Checkpoint, result: Checkpoint, rows: list[Tensor]) -> tuple[float, float]:
    """Return the largest difference of a logit on rows of ids, and the standard deviation of the source's logits."""
    models = []
    for checkpoint in (source, result):
        with torch.device("meta"):
            model = GPT(checkpoint.config)
        model.load_state_dict(checkpoint.state, strict=not checkpoint.config.tie_embeddings, assign=True)
        model.tie()
        models.append(model.eval())
    largest, spread = 0.0, 0.0
    for row in rows:
        expected, actual = (model(row[None].long()) for model in models)
        actual = actual[..., : expected.shape[-1]]
        difference = (actual - expected).abs().max().item()
        largest = max(largest, difference) if difference == difference else float("nan")
        spread = max(spread, expected.std().item())
    return largest, spread
