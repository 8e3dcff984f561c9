"""A study that takes seconds: models of 20 thousand parameters, a text of one page."""

from __future__ import annotations

import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from gptlab.study import run
from gptlab.study.directory import Request
from gptlab.study.results import Machine, Peaks, Timings, VariantTimings
from gptlab.study.settings import StudySettings, make_study

RECIPE = [
    "model.preset=tiny",
    "model.context_length=32",
    "tokenizer.kind=bytes",
    "data.held_out=0.2",
    "batch.size=2",
    "optimizer.name=adamw",
    "optimizer.learning_rate=1e-2",
    "schedule.warmup_steps=2",
    "budget.steps=12",
    "train.evaluate_every=6",
    "train.evaluate_tokens=400",
    "train.dtype=float32",
    "train.compile=false",
]
GRID = {
    "rope": {"label": "RoPE", "model": {"position": "rope"}},
    "gqa": {"label": "GQA", "model": {"n_kv_head": 2}},
    "swa": {"label": "SWA", "model": {"window": 8}},
}
EVALUATE = {"bytes": 2000, "positions": 2, "pieces": 2, "strings": 2, "sample_tokens": 5}
MEASURE = {"seconds": 0, "contexts": [16, 64], "batches": [1, 2], "training_rows": 1}


def text(directory: Path) -> Path:
    """Write thirty documents of plain sentences."""
    draw = random.Random(0)
    words = [["the cat", "a dog", "my rat"], ["sees", "eats", "likes"], ["fish", "bread", "cheese"]]
    documents = [
        "".join(" ".join(map(draw.choice, words)) + ".\n" for _ in range(draw.randint(3, 20))) for _ in range(30)
    ]
    path = directory / "sentences.txt"
    path.write_text("<|endoftext|>\n".join(documents))
    return path


def settings(corpus: Path, *changes: str, **values: Any) -> dict[str, Any]:
    """Return a study file's values; by default the base, RoPE and GQA with one seed."""
    defaults = {
        "name": "small",
        "title": "A small study",
        "question": "What happens?",
        "set": [*RECIPE, f"data.corpus=['{corpus}']", *changes],
        "evaluate": EVALUATE,
        "measure": MEASURE,
    }
    if "grid" not in values and "variant" not in values:
        values["variant"] = [{"name": "base"}, {"name": "rope", "model": {"position": "rope"}}]
    return {**defaults, **values}


def requested(corpus: Path, *changes: str, **values: Any) -> Request:
    """Return a request for `settings`."""
    return Request(small(corpus, *changes, **values))


def small(corpus: Path, *changes: str, **values: Any) -> StudySettings:
    """Return the study of `settings`."""
    return make_study(settings(corpus, *changes, **values))


def no_timings(configs: Iterable[str], *_: Any, **__: Any) -> Timings:
    """Stand in for `gptlab.study.measure.measure`, which takes seconds."""
    nothing = VariantTimings(
        training_tokens_per_second=None, training_memory_bytes=None, decoding_memory_bytes=None, prefill=[], decode=[]
    )
    return Timings(
        machine=Machine(processor="none", threads=1, torch="none", memory_bytes=1, device="cpu", date="2026-11-28"),
        dtype="float32",
        how="not measured",
        peaks=Peaks(bandwidth_bytes_per_second=1e10, flops={"float32": 1e11}, how="not measured"),
        variants=dict.fromkeys(configs, nothing),
    )


def finished_study(corpus: Path, out: Path, **values: Any) -> Path:
    """Do a study that nothing happens to, without its timings; return its directory."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "measure", no_timings)
        torch.set_num_threads(1)
        run.run_study(requested(corpus, **values), out)
    return out


class Stop(BaseException):
    """Ends a study as a power cut would, as far as its files are concerned."""


def do_with_stops(request: Request, out: Path, fewest: int, most: int) -> None:
    """Do a study that is stopped after so many events, goes on, and is stopped again; at other moments every time."""
    draw, stops = random.Random(), 0
    left = [0]

    def report(row: dict[str, Any]) -> None:
        left[0] -= 1
        if not left[0]:
            raise Stop

    while stops < 100:
        left[0] = draw.randint(fewest, most)
        try:
            run.run_study(request, out, report=report)
        except Stop:
            stops += 1
            continue
        assert stops
        return
    raise AssertionError("a hundred stops, and the study is not done")
