"""When does it pay? The prediction and how well it holds here, the calculator, and what was timed."""

from __future__ import annotations

import dataclasses
import statistics
from typing import Any

from gptlab.config import ModelConfig, divisors
from gptlab.formatting import count, digits, memory
from gptlab.model import cost
from gptlab.report import pictures as pictures
from gptlab.report.blocks import Block, Calculator, Column, Formula, Paragraph, Pictures, Section, Table, literal
from gptlab.report.summary import common_point
from gptlab.report.texts import known
from gptlab.report.view import Study, make_config, tokens
from gptlab.study import roofline

SIZES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
FIELDS = ("vocab_size", "context_length", "n_layer", "n_head", "n_kv_head", "n_embd", "n_inner", "position", "bias")
"""What of a configuration the calculator needs, beside whether the embeddings are tied."""
CHECKS: tuple[dict[str, int], ...] = (
    {"context": 1024, "batch": 1},
    {"context": 1024, "batch": 32, "n_kv_head": 1},
    {"context": 16384, "batch": 1, "window": 256},
    {"context": 100, "batch": 7, "window": 256},
    {"context": 65536, "batch": 256, "n_kv_head": 1, "window": 1024},
)
"""What the page computes again when it is opened, for each size, before it shows anything."""


def speed(study: Study) -> Section:
    """Prediction, calculator, measured speed and memory."""
    text, machine = known()["prediction"], study.machine
    blocks: list[Block] = []
    if machine is not None and study.timings:
        how = study.timings.peaks.how
        measured = (
            f"{text['where']} On this machine memory is read at {digits(machine.bandwidth / 1e9)} GB/s, and products in"
            f" {study.dtype} reach {digits(machine.flops / 1e9)} GFLOP/s ({literal(how)})."
        )
        drawn = pictures.predictions(study)
        blocks += [Paragraph(text["what"]), Formula(text["tex"], text["mathml"]), Paragraph(measured, "note")]
        blocks += [*_fit(study, machine), *([Pictures(drawn)] if drawn else []), Calculator(calculator(study, machine))]
    drawn = pictures.decoding(study)
    timed = [*([Pictures(drawn)] if drawn else []), *_timed(study)]
    return Section("pays", "When does it pay?", blocks, [Section("measured", "Measured speed and memory", timed)])


def _fit(study: Study, machine: roofline.Machine) -> list[Block]:
    """How far the measured points are from the prediction."""
    shares, gaps = [], []
    for name, config in study.configs.items():
        for point in timed.decode if (timed := study.timed(name)) else ():
            context, batch = point.context, point.batch
            limit = roofline.predict(config, machine, context=context, batch=batch, dtype=study.dtype).seconds
            shares.append(1000 * limit / point.milliseconds)
            gaps.append(point.milliseconds - 1000 * limit)
    if not shares:
        return []
    small = statistics.median(shares) < 0.5
    middle, above = statistics.median(gaps), sum(share > 1 for share in shares)
    said = f"Over {len(shares)} measured points of this study's models, decoding reaches"
    said += f" {100 * statistics.median(shares):.0f}% of the predicted limit"
    said += f" (median; {100 * min(shares):.0f} to {100 * max(shares):.0f}%)."
    if middle > 0:
        leaves_out = known()["prediction"]["leaves_out"]
        said += f" A step takes {digits(middle, 2)} ms longer than predicted (median), for what the formula leaves out:"
        said += f" {leaves_out}. That is more than half of a step in models this small." if small else f" {leaves_out}."
    smallest = min(v.parameters["total"] for v in study.variants.values())
    if above:
        size = memory(smallest * roofline.BYTES[study.dtype])
        said += (
            f" {above} point{'s are' if above > 1 else ' is'} above it: weights of {size} may stay in the processor's"
            " caches, which are faster than the memory."
        )
    return [Paragraph(said)]


def calculator(study: Study, machine: roofline.Machine) -> dict[str, Any]:
    """Everything that the calculator in the page starts from, and what it must find to show itself."""
    base = study.configs[study.base_name]
    # Plain attention: what to change is the calculator's own question.
    own = dataclasses.replace(base, n_kv_head=base.n_head, window=None, sinks=0, dilation=1)
    configs = {**{size: ModelConfig.preset(size) for size in SIZES}, "this study's model": own}
    return {
        "models": {name: {**_fields(config), "kv": divisors(config.n_head)} for name, config in configs.items()},
        "size": roofline.BYTES[study.dtype],
        "dtype": study.dtype,
        "bandwidth": machine.bandwidth,
        "peak": machine.flops,
        "machine": study.machine_words,
        "checks": [check(name, config, at, machine, study.dtype) for name, config in configs.items() for at in CHECKS],
    }


def _fields(config: ModelConfig) -> dict[str, Any]:
    return {**{name: getattr(config, name) for name in FIELDS}, "tie_embeddings": config.tie_embeddings, "window": None}


def check(name: str, config: ModelConfig, at: dict[str, int], machine: roofline.Machine, dtype: str) -> dict[str, Any]:
    """Return a question to the calculator and the answer of `roofline.predict`."""
    changed = {key: value for key, value in at.items() if key in ("n_kv_head", "window")}
    model = make_config({**config.to_dict(), **changed})
    step = roofline.predict(model, machine, context=at["context"], batch=at["batch"], dtype=dtype)
    return {
        "model": name,
        **at,
        "parameters": sum(cost.parameters(model).values()),
        "weightBytes": step.weight_bytes,
        "cacheBytes": step.cache_bytes,
        "seconds": step.seconds,
        "limit": step.limit,
    }


def _timed(study: Study) -> list[Block]:
    """One row for each variant: training, memory, reading a prompt, generating."""
    names = [name for name in study.drawn if study.timed(name)]
    if not names or not study.timings:
        return []
    makers = {
        "training, tokens/s": ("training_tokens_per_second", count),
        "memory, training": ("training_memory_bytes", memory),
        "memory, decoding": ("decoding_memory_bytes", memory),
    }
    titles = [title for title, (key, _) in makers.items() if any(getattr(study.timed(n), key) for n in names)]
    prefill, decode = common_point(study, "prefill"), common_point(study, "decode")
    rows = []
    for name in names:
        row = [f"**{study.label(name)}**"]
        for title in titles:
            key, write = makers[title]
            value = getattr(study.timed(name), key)
            row.append(write(value) if value else "-")
        row += [count(study.rates(name, "prefill")[prefill])] if prefill else []
        row += [count(study.rates(name, "decode")[decode])] if decode else []
        rows.append(row)
    columns = [Column("variant", "text"), *map(Column, titles)]
    for point, what in ((prefill, "prefill"), (decode, "decoding")):
        columns += [Column(f"{what}, tokens/s")] if point else []
    points = [f"{what} {tokens(p[0])}, batch {p[1]}" for p, what in ((prefill, "prefill"), (decode, "decoding")) if p]
    return [Table("Measured", study.setting, columns, rows, f"{study.dtype}; {'; '.join(points)}." if points else "")]
