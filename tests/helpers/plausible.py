"""Results and timings of a study that nobody ran: real configurations and costs, losses from a formula."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gptlab import roofline
from gptlab.config import ModelConfig
from gptlab.model import cost
from gptlab.report.view import Study
from gptlab.study.results import TIMINGS_FORMAT, Results, Timings
from gptlab.study.statistics import factorial, over_seeds

FACTORS: dict[str, dict[str, Any]] = {
    "rope": {"position": "rope"},
    "gqa": {"n_kv_head": 2},
    "swa": {"window": 128},
}
LABELS = {"rope": "RoPE", "gqa": "GQA", "swa": "SWA"}
EFFECT = {"rope": -0.09, "gqa": 0.035, "swa": 0.002}
TOKENS = 8_192_000
BANDWIDTH, FLOPS = 3.0e10, 2.0e11
CONTEXTS, BATCHES = (128, 512, 2048, 8192), (1, 8)


def noise(*what: object) -> float:
    """A number between -1 and 1 that depends on nothing but its arguments."""
    return math.sin(12.9898 * sum((i + 1) * len(str(w)) + ord(str(w)[-1]) for i, w in enumerate(what)) + 78.233)


def loss(factors: Sequence[str], seed: int) -> float:
    extra = -0.012 if {"rope", "swa"} <= set(factors) else 0.0
    return 4.51 + sum(EFFECT[f] for f in factors) + extra + 0.01 * noise("seed", seed) + 0.004 * noise(*factors, seed)


def runs(factors: Sequence[str], seeds: Sequence[int]) -> list[dict[str, Any]]:
    made = []
    for seed in seeds:
        end = loss(factors, seed)
        curve = [
            [
                tokens,
                end + 4.5 * math.exp(-9 * tokens / TOKENS) + 0.5 * (1 - tokens / TOKENS) + 0.04 * noise(tokens, seed),
            ]
            for tokens in range(TOKENS // 80, TOKENS + 1, TOKENS // 80)
        ]
        checks = [
            [tokens, end + 4.5 * math.exp(-9 * tokens / TOKENS) + 0.5 * (1 - tokens / TOKENS)]
            for tokens in range(TOKENS // 8, TOKENS + 1, TOKENS // 8)
        ]
        run = {"seed": seed, "status": "done", "error": None, "key": f"{'-'.join(factors)}{seed}"}
        made.append({**run, "curve": curve, "validation_curve": checks, "validation_loss": end})
    return made


def attention(window: int | None, n: int = 48) -> list[list[float]]:
    rows = []
    for i in range(n):
        raw = [
            math.exp(-(i - j) / 6) + (2.0 if j == 0 else 0) + (0.6 if (i - j) % 11 == 10 else 0) for j in range(i + 1)
        ]
        raw = [0.0 if window and i - j >= window else r for j, r in enumerate(raw)]
        rows.append([r / sum(raw) for r in raw])
    return rows


def heads(config: ModelConfig) -> dict[str, Any]:
    def pairs(n: int, same: int) -> list[list[float]]:
        return [[0.0 if i == j else 0.2 + 0.1 * (i // same != j // same) for j in range(n)] for i in range(n)]

    group = config.n_head // config.kv_heads
    layer = {
        "entropy": [1.0 + 0.2 * h for h in range(config.n_head)],
        "distance": [3.0 + 9.0 * h for h in range(config.n_head)],
        "divergence": pairs(config.n_head, group),
        "key_similarity": [[1.0 if i == j else 0.3 for j in range(config.kv_heads)] for i in range(config.kv_heads)],
        "key_overlap": [[1.0 if i == j else 0.2 for j in range(config.kv_heads)] for i in range(config.kv_heads)],
        "prefix_matching": [0.02 + 0.01 * h for h in range(config.n_head)],
    }
    return {"tokens": 256, "layers": [layer] * config.n_layer}


def variant(factors: Sequence[str], seeds: Sequence[int] = (0, 1, 2), **more: Any) -> dict[str, Any]:
    """One variant of `pocket`, as `results.json` has it."""
    changes: dict[str, Any] = {}
    for factor in factors:
        changes |= FACTORS[factor]
    config = ModelConfig.preset("pocket", **changes)
    parts = cost.parameters(config)
    length, reach = config.context_length, cost.receptive_field(config)
    made = runs(factors, seeds)
    mean = sum(run["validation_loss"] for run in made) / len(made)
    buckets = [[1, 16], [17, 32], [33, 64], [65, 128], [129, 256], [257, 512]]
    if config.position == "rope":
        buckets += [[513, 1024], [1025, 2048]]
    beyond = 0.02 if config.window else 0.7
    copies = [
        {
            "distance": d,
            "accuracy": 0.08 / math.sqrt(d / 16) if reach is None or d < reach else 0.001,
            "logprob": -8.3 + (1.2 / math.log2(d / 4) if reach is None or d < reach else 0.0),
            "baseline_accuracy": 0.001,
            "baseline_logprob": -8.3,
        }
        for d in (16, 32, 64, 128, 256, 448)
    ]
    values: dict[str, Any] = {
        "label": " + ".join(LABELS[f] for f in factors) or "GPT-2",
        "changes": changes,
        "kinds": list(factors),
        "reference": None,
        "difference": None,
        "factors": list(factors),
        "config": config.to_dict(),
        "source": "trained",
        "tokens_trained": TOKENS,
        "parameters": {**parts, "total": sum(parts.values())},
        "flops_per_token": {
            "forward": {str(c): cost.token_flops(config, c - 1).total for c in CONTEXTS},
            "training": cost.training_flops(config, length) / length,
        },
        "cache": [
            {
                "context": c,
                "batch": b,
                "dtype": "bfloat16",
                "bytes": cost.cache_bytes(config, c, 2, batch=b),
                "allocated": None,
            }
            for c in CONTEXTS
            for b in BATCHES
        ],
        "receptive_field": reach,
        "runs": made,
        "quality": {
            "protocol": "windows of 512 tokens",
            "text": "held-out part of enwiki",
            "nats_per_token": mean,
            "bits_per_byte": mean / 2.34,
            "documents": 39,
            "tokens": 223256,
            "by_run": [run["validation_loss"] for run in made],
        },
        "by_position": {
            "protocol": "mean over 16 pieces",
            "buckets": buckets,
            "nats": [
                mean + 1.6 * (16 / last) ** 0.7 + (beyond * math.log2(last / 512) if last > 512 else 0.0)
                for _, last in buckets
            ],
            "trained_length": length,
        },
        "copying": copies,
        "induction": {"first": 9.8, "second": 9.4, "best_head_score": 0.07, "best_head": [2, 5], "period": 64},
        "heads": heads(config),
        "attention_map": {
            "layer": 1,
            "head": 3,
            "tokens": [f"w{i} " for i in range(48)],
            "weights": attention(16 if config.window else None),
        },
        "samples": [{"prompt": "The ", "text": "city of <the> & city's region was an agreement.\nIt was named"}],
    }
    return values | more


def interval(differences: Sequence[float]) -> dict[str, Any]:
    return dict(over_seeds(list(differences)).interval)


def results(cells: Sequence[Sequence[str]] | None = None, seeds: Sequence[int] = (0, 1, 2)) -> dict[str, Any]:
    """`results.json` of the factorial, or of some of its cells, the base first."""
    if cells is None:
        cells = [c for size in range(4) for c in itertools.combinations(FACTORS, size)]
    named = {"-".join(factors) or "base": tuple(factors) for factors in cells}
    losses = {name: {seed: loss(factors, seed) for seed in seeds} for name, factors in named.items()}

    def versus(name: str) -> dict[str, Any]:
        if name == "base":
            return {}
        return {"reference": "base", "difference": interval([losses[name][s] - losses["base"][s] for s in seeds])}

    contrasts = factorial(named)
    effects = None
    if contrasts is not None:
        main, interactions = (
            {
                term: interval([sum(w * losses[v][s] for v, w in weights.items()) for s in seeds])
                for term, weights in part.items()
            }
            for part in contrasts
        )
        effects = {"definition": "A main effect is a mean change.", "main": main, "interactions": interactions}
    return {
        "format": "gptlab study",
        "version": 1,
        "study": {
            "name": "standard",
            "title": "RoPE, grouped queries and windows on a small GPT-2",
            "question": "What does each change do to size, memory, speed and quality?",
            "base": "base",
            "kind": "trained",
            "tokens": TOKENS,
            "seeds": list(seeds),
            "corpus": {"name": "enwiki", "sha256": "849945bcdf84b2d4db187f60b2a8dc8803b5386a9f1953eaaf73ce94c6020784"},
            "recipe": {"optimizer": {"name": "muon", "learning_rate": 0.003}, "batch": {"size": 8}},
            "factors": list(FACTORS),
            "quick": False,
            "made_with": {"torch": "2.13.0", "threads": 2},
        },
        "variants": {name: variant(factors, seeds, **versus(name)) for name, factors in named.items()},
        "effects": effects,
        "four_sizes": {size: {name: counterpart(size, f) for name, f in named.items()} for size in ("gpt2", "gpt2-xl")},
        "claims": [],
    }


def counterpart(size: str, factors: Sequence[str]) -> dict[str, Any]:
    """A variant's changes in one of GPT-2's sizes."""
    changes: dict[str, Any] = {}
    for factor in factors:
        changes |= {"gqa": {"n_kv_head": 4 if size == "gpt2" else 5}, "swa": {"window": 256}}.get(
            factor, FACTORS[factor]
        )
    config = ModelConfig.preset(size, **changes)
    return {
        "changes": changes,
        "parameters": sum(cost.parameters(config).values()),
        "cache": [
            {"context": c, "batch": 1, "dtype": "bfloat16", "bytes": cost.cache_bytes(config, c, 2)}
            for c in (1024, 4096, 16384)
        ],
        "flops_per_token": {str(c): cost.token_flops(config, c - 1).total for c in (1024, 4096, 16384)},
    }


def study(results: dict[str, Any], timed: dict[str, Any] | None = None) -> Study:
    """The files as the report reads them."""
    return Study(
        Results.model_validate_json(json.dumps(results)),
        Timings.model_validate_json(json.dumps(timed)) if timed else None,
    )


def timings(results: dict[str, Any]) -> dict[str, Any]:
    """`timings.json`: the prediction for each variant, and a millisecond and a half on top."""
    machine = roofline.Machine(BANDWIDTH, FLOPS)
    variants = {}
    for name, values in results["variants"].items():
        config = ModelConfig.from_dict(values["config"])
        decode = []
        for context, batch in itertools.product(CONTEXTS, BATCHES):
            if config.position == "learned" and context > config.context_length:
                continue
            step = roofline.predict(config, machine, context=context, batch=batch, dtype="bfloat16")
            ms = 1000 * step.seconds + 1.5 + 0.05 * noise(name, context, batch)
            point = {"context": context, "batch": batch, "milliseconds": ms, "tokens_per_second": 1000 * batch / ms}
            decode.append(point)
        variants[name] = {
            "training_tokens_per_second": 6300.0 + 100 * noise(name),
            "training_memory_bytes": 412_000_000,
            "decoding_memory_bytes": 31_000_000 + 1_000_000 * config.kv_heads,
            "prefill": [{"context": c, "batch": 1, "tokens_per_second": 21000.0 - c} for c in (128, 512)],
            "decode": decode,
        }
    return {
        "format": TIMINGS_FORMAT,
        "version": 1,
        "machine": {
            "processor": "Some Processor",
            "threads": 2,
            "torch": "2.13.0",
            "memory_bytes": 24 * 2**30,
            "device": "cpu",
            "date": "2026-11-23",
        },
        "dtype": "bfloat16",
        "how": "Medians of 5.",
        "peaks": {
            "bandwidth_bytes_per_second": BANDWIDTH,
            "flops": {"float32": 1e11, "bfloat16": FLOPS},
            "how": "Best of 5.",
        },
        "variants": variants,
    }


def write(directory: Path, results: dict[str, Any], timed: dict[str, Any] | None = None) -> Path:
    """Lay a study's files into a directory, as a runner would."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "results.json").write_text(json.dumps(results), encoding="utf-8")
    if timed is not None:
        (directory / "timings.json").write_text(json.dumps(timed), encoding="utf-8")
    return directory
