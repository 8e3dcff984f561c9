"""The page as one file without a server: everything that it asks at first, answered beforehand."""

from __future__ import annotations

import base64
import json
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gptlab.checkpoints.files import write_files
from gptlab.config import ModelConfig, divisors
from gptlab.errors import GptlabError
from gptlab.exploring.answers import ANSWERS
from gptlab.exploring.computing import nobody_leaves
from gptlab.exploring.page import single_file
from gptlab.exploring.shelf import Shelf
from gptlab.exploring.texts import AT_FIRST, SHIFTS, SMALL, STEPS, beginning
from gptlab.progress import Report

DIGITS = 6
"""Significant digits of the numbers in the file: twice as many as the page shows."""

Question = tuple[str, dict[str, Any]]


def write_page(
    path: Path,
    models: Sequence[str] = (),
    *,
    text: str | None = None,
    device: str = "cpu",
    report: Report = lambda row: None,
) -> int:
    """Write the page with the answers about one text baked in; return its size in bytes.

    Args:
        path: of the file; it is replaced whole or not at all.
        models: as `gptlab.load` takes them; none: those that the page begins with.
        text: that all of them read; None: the first of the examples.
        device: where to compute.
        report: called with ``{"done", "of"}`` after every answer.

    Raises:
        GptlabError: a model that cannot be loaded, a text that is too long for one, or a place that cannot be written.
    """
    if path.is_dir():
        raise GptlabError(f"{path} is a directory; name the file, such as {path / 'page.html'}")
    write_files(path.parent, {})  # whether there is a place for it, before anything is computed
    names = list(dict.fromkeys(models)) or list(AT_FIRST)
    first = beginning(names, names, text)
    shelf = Shelf(names, device)
    asked = [one for name in names for one in _of_model(name, shelf.get(name).config, first["text"])] + [("costs", {})]
    index: dict[str, Any] = {"begin": first}
    tensors = bytearray()
    for done, (question, body) in enumerate(asked, 1):
        index[_name_of(question, body)] = _answer(shelf, question, body, tensors)
        report({"done": done, "of": len(asked)})
    head = json.dumps(index, ensure_ascii=False, separators=(",", ":")).encode()
    baked = zlib.compress(struct.pack(">I", len(head)) + head + bytes(tensors), 9)
    page = single_file(base64.b64encode(baked).decode()).encode()
    write_files(path.parent, {path.name: page})
    return len(page)


def _of_model(name: str, config: ModelConfig, text: str) -> Iterator[Question]:
    """Yield what the page asks about a model, with everything at its first setting or one step away from it."""
    about = {"model": name, "text": text}
    layers, heads = range(config.n_layer), range(config.n_head)
    key_heads = [n for n in divisors(config.n_head) if n <= config.kv_heads]
    yield "facts", {"model": name}
    yield "losses", about
    for layer in layers:
        yield "effects", {**about, "layer": layer}
        small = {**about, "layer": layer, "size": SMALL}
        yield "maps", small
        yield from (("maps", {**about, "layer": layer, "head": head}) for head in heads)
        yield from (("scores", {**about, "layer": layer, "head": head}) for head in heads)
    for n in key_heads:
        yield "share", {**about, "n_kv_head": n}
        yield from (("maps", {**about, "layer": layer, "size": SMALL, "n_kv_head": n}) for layer in layers)
    yield from (("shift", {**about, "by": by}) for by in SHIFTS)
    yield "steps", {**about, **STEPS}
    out: dict[str, Any] = {**about, "heads": [], "attention": [], "sinks": False}
    yield from (("without", {**out, "heads": [[layer, head]]}) for layer in layers for head in heads)
    yield from (("without", {**out, "attention": [layer]}) for layer in layers)
    if config.sinks:
        yield "without", {**out, "sinks": True}


def _answer(shelf: Shelf, question: str, body: Mapping[str, Any], tensors: bytearray) -> Any:
    """Return an answer as it is baked in: an object, a reason why there is none, or where its bytes lie."""
    kind, function = ANSWERS[question]
    try:
        answer = function(shelf, kind.model_validate(body), nobody_leaves)
    except GptlabError as error:
        if question in ("facts", "losses"):  # without these there is no page
            raise
        return {"error": str(error)}
    if isinstance(answer, dict):
        return _rounded(answer)
    where = {"shape": list(answer.shape), "at": len(tensors)}
    tensors += answer.numpy().tobytes()
    return where


def _name_of(question: str, body: Mapping[str, Any]) -> str:
    """As ``nameOf`` in api.js has it."""
    return f"{question} {json.dumps(dict(sorted(body.items())), ensure_ascii=False, separators=(',', ':'))}"


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, dict):
        return {
            name: own if name == "data" else _rounded(own) for name, own in value.items()
        }  # checked to the last bit
    return [_rounded(own) for own in value] if isinstance(value, list | tuple) else value
