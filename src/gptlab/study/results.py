"""The two files that a study leaves, from which its report is made.

`results.json` holds everything that does not depend on a clock: a study that was killed and went on, or whose variants
stand in another order, writes the same bytes. `timings.json` holds what was measured with one, and the machine.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict, cast

from gptlab.checkpoints.files import write_files
from gptlab.errors import GptlabError
from gptlab.study.results_conversion import Conversion, Converted, Interval

FORMAT, TIMINGS_FORMAT = "gptlab study", "gptlab study timings"
VERSION = 1
__all__ = ["Interval"]

RESULTS, TIMINGS, STUDY = "results.json", "timings.json", "study.json"


class Corpus(TypedDict):
    """What was trained on, or for shipped models what they were evaluated on."""

    name: str
    sha256: str


class About(TypedDict):
    """The study as a whole.

    ``kind`` is that of the variants that are not made by conversion. ``tokens`` are those of one run, ``recipe`` is
    empty where nothing was trained from scratch, ``factors`` are the names of the grid's changes.
    """

    name: str
    title: str
    question: str
    base: str
    kind: Literal["trained", "shipped", "mixed"]
    tokens: int
    seeds: list[int]
    corpus: Corpus
    recipe: dict[str, Any]
    factors: list[str]
    quick: bool
    made_with: dict[str, Any]
    conversion: NotRequired[Converted]


class CacheSize(TypedDict):
    """Bytes of the key/value cache: ``bytes`` is what one token at a time needs, ``allocated`` what gptlab takes.

    A ring is allocated for prompts that come in chunks of 512 tokens, so it has up to 511 slots more than its window.
    """

    context: int
    batch: int
    dtype: str
    bytes: int
    allocated: int | None


class Run(TypedDict):
    """One training run; curves are [tokens, nats a token]. ``key`` names its directory below ``runs/``."""

    seed: int
    status: Literal["done", "failed"]
    error: str | None
    key: str
    curve: list[list[float]]
    validation_curve: list[list[float]]
    validation_loss: float | None


class Quality(TypedDict):
    """Loss on the held-out text: the mean over the runs, and each one's; documents may be parts of long ones."""

    protocol: str
    text: str
    nats_per_token: float
    bits_per_byte: float
    documents: int
    tokens: int
    by_run: list[float]


class ByPosition(TypedDict):
    """Mean loss where so many tokens had been seen: ``buckets`` are [first, last]."""

    protocol: str
    buckets: list[list[int]]
    nats: list[float]
    trained_length: int


class Copy(TypedDict):
    """Random strings reproduced at a distance, and the same tokens where another string stood there."""

    distance: int
    accuracy: float
    logprob: float
    baseline_accuracy: float
    baseline_logprob: float


class Induction(TypedDict):
    """Loss in the first and second pass over random sequences; the best head's prefix matching, and where it is."""

    first: float
    second: float
    best_head_score: float
    best_head: list[int]
    period: int


class LayerHeads(TypedDict):
    """One layer of `gptlab.evaluation.heads.LayerHeads`, and each head's prefix matching."""

    entropy: list[float]
    distance: list[float]
    divergence: list[list[float]]
    key_similarity: list[list[float]]
    key_overlap: list[list[float]]
    prefix_matching: list[float]


class Heads(TypedDict):
    """The heads of all layers, on the first ``tokens`` tokens of the held-out text."""

    tokens: int
    layers: list[LayerHeads]


class AttentionMap(TypedDict):
    """What one head looks at; row i of ``weights`` has i + 1 entries, those of the tokens up to its own."""

    layer: int
    head: int
    tokens: list[str]
    weights: list[list[float]]


class Variant(TypedDict):
    """One variant. What needs a trained model is None where every run failed."""

    label: str
    changes: dict[str, Any]
    factors: list[str]
    config: dict[str, Any]
    source: Literal["trained", "shipped", "converted"]
    tokens_trained: int | None
    parameters: dict[str, int]
    flops_per_token: dict[str, Any]
    cache: list[CacheSize]
    receptive_field: int | None
    runs: list[Run]
    quality: Quality | None
    by_position: ByPosition | None
    copy: list[Copy]
    induction: Induction | None
    heads: Heads | None
    attention_maps: AttentionMap | None
    samples: list[dict[str, str]]
    conversion: NotRequired[Conversion]


class Effects(TypedDict):
    """Main effects by factor and interactions by "a x b"; ``definition`` says what the numbers mean."""

    definition: str
    main: dict[str, Interval]
    interactions: dict[str, Interval]


class Claim(TypedDict):
    """A paper's claim, what was obtained here, and whether it holds; None where this study cannot tell."""

    paper: str
    claim: str
    ours: str
    holds: bool | None
    note: str


class Racer(TypedDict):
    """One variant of the race."""

    label: str
    changes: dict[str, Any]
    config: dict[str, Any]
    parameters: int
    run: Run


class Race(TypedDict):
    """A short training of tiny models side by side: it shows how training goes, not how good a variant is."""

    label: str
    base: str
    corpus: Corpus
    tokens: int
    recipe: dict[str, Any]
    variants: dict[str, Racer]


class Results(TypedDict):
    """`results.json`."""

    format: str
    version: int
    study: About
    variants: dict[str, Variant]
    comparisons: dict[str, dict[str, Interval]]
    effects: Effects | None
    four_sizes: dict[str, dict[str, Any]]
    race: Race | None
    claims: list[Claim] | None


class Machine(TypedDict):
    """Where the timings were taken."""

    processor: str
    threads: int
    torch: str
    memory_bytes: int
    device: str
    date: str


class Peaks(TypedDict):
    """What the machine reaches at best: bytes read a second, and operations a second of matrix products by dtype."""

    bandwidth_bytes_per_second: float
    flops: dict[str, float]
    how: str


class Prefill(TypedDict):
    """Reading ``batch`` prompts of ``context`` tokens."""

    context: int
    batch: int
    tokens_per_second: float


class Decode(TypedDict):
    """One more token for each of ``batch`` sequences that hold ``context`` tokens."""

    context: int
    batch: int
    milliseconds: float
    tokens_per_second: float


class VariantTimings(TypedDict):
    """What the clock says of one variant. Memory is what the process took beyond its start, at the peak."""

    training_tokens_per_second: float | None
    training_memory_bytes: int | None
    decoding_memory_bytes: int | None
    prefill: list[Prefill]
    decode: list[Decode]


class Timings(TypedDict):
    """`timings.json`. ``how`` says how the figures were taken; ``claims`` are those that a clock decides."""

    format: str
    version: int
    machine: Machine
    dtype: str
    how: str
    peaks: Peaks
    variants: dict[str, VariantTimings]
    claims: NotRequired[list[Claim]]


def encode(values: Any) -> bytes:
    """Return JSON whose bytes depend on the values alone; numbers that JSON does not know are refused."""
    return json.dumps(values, indent=1, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def write_results(directory: Path, results: Results) -> None:
    """Write `results.json` into a study's directory; raises `GptlabError` where that cannot be done."""
    write_files(directory, {RESULTS: encode(results)})


def write_timings(directory: Path, timings: Timings) -> None:
    """Write `timings.json` into a study's directory; raises `GptlabError` where that cannot be done."""
    write_files(directory, {TIMINGS: encode(timings)})


def read_results(directory: Path, name: str = RESULTS) -> Results:
    """Read `results.json`; raises `GptlabError` where it is missing, damaged, or of another version."""
    return cast(Results, _read(directory / name, FORMAT))


def read_timings(directory: Path, name: str = TIMINGS) -> Timings:
    """Read `timings.json`; raises `GptlabError` where it is missing, damaged, or of another version."""
    return cast(Timings, _read(directory / name, TIMINGS_FORMAT))


def _read(path: Path, kind: str) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise GptlabError(
            f"{path.parent} has no {path.name}; finish its study first: gptlab study --resume --out {path.parent}"
        ) from None
    except (OSError, ValueError) as error:
        raise GptlabError(f"{path} cannot be read ({error}); make it again by gptlab study --resume") from None
    found = (values.get("format"), values.get("version")) if isinstance(values, dict) else None
    if found != (kind, VERSION):
        raise GptlabError(f"{path} is no {kind} of version {VERSION}; make it again by gptlab study --resume")
    return cast(dict[str, Any], values)
