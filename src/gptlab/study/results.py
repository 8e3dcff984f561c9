"""The two files that a study leaves, from which its report is made.

`results.json` holds everything that does not depend on a clock: a study that was killed and went on writes the same
bytes. `timings.json` holds what was measured with one, and the machine. Both are read into the models below, which are
complete and checked: a report needs nothing else.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, PlainSerializer, ValidationError

from gptlab.checkpoints.files import write_files
from gptlab.config import ModelConfig
from gptlab.errors import GptlabError

FORMAT, TIMINGS_FORMAT = "gptlab study", "gptlab study timings"
VERSION = 1

RESULTS, TIMINGS, STUDY = "results.json", "timings.json", "study.json"

_File = TypeVar("_File", bound="Record")

Kind = Literal["rope", "gqa", "swa", "other"]
"""One of the three changes, or any other difference between two configurations."""


def _config(value: Any) -> ModelConfig:
    if isinstance(value, ModelConfig):
        return value
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a window as long as the context was remarked on when the study was made
        return ModelConfig.from_dict(value)


Unit = Literal["document", "part of a document"]
"""What a text is scored in and resampled by."""

Config = Annotated[ModelConfig, BeforeValidator(_config), PlainSerializer(lambda config: config.to_dict())]


class Record(BaseModel):
    """A part of a result file. It cannot be changed, and has no other fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, arbitrary_types_allowed=True)


class Interval(Record):
    """A difference of losses and its 95% interval, whose ends are None where there is none; below 0 it is lower.

    Attributes:
        mean: of the difference.
        low: lower end of the interval.
        high: its upper end.
        n: seeds, or units of text (`Quality.unit`), that the method is over.
        unit: of all three.
        method: how the interval was made, in words.
        df: degrees of freedom of Student's t; None where the interval is another.
        p: of a difference of 0, two-sided; None where there is no interval, and in files of before it was kept.
        adjusted: p by Holm's correction over the family that the difference is one of: all variants' differences, or
            all terms of a factorial.
    """

    mean: float
    low: float | None
    high: float | None
    n: int
    unit: str
    method: str
    df: int | None = None
    p: float | None = None
    adjusted: float | None = None


class Corpus(Record):
    """What was trained on, or for models that were loaded what they were evaluated on."""

    name: str
    sha256: str


class Conversions(Record):
    """What the conversions of a study have in common.

    Attributes:
        calibration: what they were fitted on, in words.
        reference: the base after the same continued training, which uptrained variants are compared with; None
            where there is none.
        pretraining_tokens: that the base was trained on, of which shares are counted; None where nothing was uptrained.
        recipe: of the uptraining; None where nothing was uptrained.
    """

    calibration: str
    reference: str | None
    pretraining_tokens: int | None
    recipe: dict[str, Any] | None


class About(Record):
    """The study as a whole.

    Attributes:
        name: of the study.
        title: a heading.
        question: what it is to answer.
        base: name of the variant that the others change.
        kind: where the variants come from that are not made by conversion.
        tokens: of one training run of the base, 0 where that is not known.
        seeds: that variants were trained with.
        corpus: the data.
        recipe: of the base, as JSON; empty where nothing was trained from scratch.
        factors: names of all changes that the variants combine.
        quick: the study shows what there is to see, in minutes.
        made_with: versions and threads.
        conversion: None where nothing was converted.
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
    made_with: dict[str, str | int]
    conversion: Conversions | None = None


class CacheSize(Record):
    """Bytes of the key/value cache: ``bytes`` is what one token at a time needs, ``allocated`` what gptlab takes.

    A ring is allocated for prompts that come in chunks of 512 tokens, so it has up to 511 slots more than its window.
    ``allocated`` is None where the cache was too large to be allocated.
    """

    context: int
    batch: int
    dtype: str
    bytes: int
    allocated: int | None = None


class Flops(Record):
    """Operations of one token: ``forward`` by the tokens before it, ``training`` on average over a window."""

    forward: dict[str, int]
    training: float


class Run(Record):
    """One training run; curves are (tokens, nats per token). ``key`` names its directory below ``runs/``."""

    seed: int
    status: Literal["done", "failed"]
    error: str | None
    key: str
    curve: list[tuple[int, float]]
    validation_curve: list[tuple[int, float]]
    validation_loss: float | None


class Quality(Record):
    """Loss on the held-out text: the mean over the runs, and each one's.

    Attributes:
        protocol: how it was scored, in words.
        text: what it is.
        nats_per_token: mean over the runs.
        bits_per_byte: the same.
        documents: units that the text is scored in and resampled by.
        tokens: that are predicted.
        by_run: nats per token of each run.
        unit: what these units are, ``document`` or ``part of a document``; None in files of before it was kept.
        part: which of the held-out documents they are, see `gptlab.text.splits.part_of`; None where the text is
            another one, or its documents are not divided.
    """

    protocol: str
    text: str
    nats_per_token: float
    bits_per_byte: float
    documents: int
    tokens: int
    by_run: list[float]
    unit: Unit | None = None
    part: Literal["tune", "test"] | None = None


class ByPosition(Record):
    """Mean loss by the number of tokens seen before; ``buckets`` are (first, last)."""

    protocol: str
    buckets: list[tuple[int, int]]
    nats: list[float]
    trained_length: int


class Copy(Record):
    """Random strings reproduced at a distance, and the same tokens where another string stood there."""

    distance: int
    accuracy: float
    logprob: float
    baseline_accuracy: float
    baseline_logprob: float


class Induction(Record):
    """Loss in the first and second pass over random sequences; the best head's prefix matching, and where it is."""

    first: float
    second: float
    best_head_score: float
    best_head: tuple[int, int]
    period: int


class LayerHeads(Record):
    """One layer of `gptlab.evaluation.heads.LayerHeads`, and each head's prefix matching."""

    entropy: list[float]
    distance: list[float]
    divergence: list[list[float]]
    key_similarity: list[list[float]]
    key_overlap: list[list[float]]
    prefix_matching: list[float]


class Heads(Record):
    """The heads of all layers, on the first ``tokens`` tokens of the held-out text."""

    tokens: int
    layers: list[LayerHeads]


class AttentionMap(Record):
    """What one head attends to; row i of ``weights`` has i + 1 entries, those of the tokens up to its own."""

    layer: int
    head: int
    tokens: list[str]
    weights: list[list[float]]


class Sample(Record):
    """A prompt and its continuation."""

    prompt: str
    text: str


class Checkpoint(Record):
    """A converted model after a share of the tokens of pre-training; 0 is right after the conversion.

    Attributes:
        share: of the tokens that the base was trained on.
        tokens: of uptraining.
        nats_per_token: loss on the held-out text, the mean over the runs.
        by_run: each one's.
        difference: to the reference after as many tokens, at 0 to the base; None where there is none.
        rivals: differences to other variants of the same architecture, by name.
        own_context: the loss in windows of the model's own context, for one that was extended.
    """

    share: float
    tokens: int
    nats_per_token: float
    by_run: list[float]
    difference: Interval | None
    rivals: dict[str, Interval]
    own_context: float | None = None


class Conversion(Record):
    """How a variant was made by conversion.

    Attributes:
        changes: what was asked for.
        steps: that were taken, in words.
        settings: of its uptraining alone.
        divergence: mean KL(base || converted) in nats per token right after the conversion; None where it failed.
        divergence_tokens: of the held-out text that it was measured on.
        checkpoints: by share, ascending.
    """

    changes: dict[str, Any]
    steps: list[str]
    settings: list[str]
    divergence: float | None
    divergence_tokens: int
    checkpoints: list[Checkpoint]


class Variant(Record):
    """One variant. What needs a trained model is None or empty where every run failed.

    Attributes:
        label: in words.
        changes: fields in which its configuration differs from the base's, as JSON.
        kinds: which changes these are.
        factors: the changes that it combines, for the effects of a factorial.
        reference: the variant that it is compared with; None for the base.
        difference: its loss less the reference's; None for the base, and where no seed was trained to the end in both.
        config: its architecture.
        source: how it came to be.
        tokens_trained: that the model has seen, None where it is not recorded.
        parameters: by part, and their ``total``.
        flops_per_token: operations.
        cache: sizes by context and batch.
        receptive_field: in tokens, None where it has no limit.
        runs: none for a model that was loaded or only converted.
        quality: loss on the held-out text.
        by_position: None also where the text is too short.
        copying: by distance.
        induction: the mean over the runs.
        heads: of the first run.
        attention_map: of the first run, the same head in all variants.
        samples: of the first run.
        conversion: None where it was not made by conversion.
    """

    label: str
    changes: dict[str, Any]
    kinds: list[Kind]
    factors: list[str]
    reference: str | None
    difference: Interval | None
    config: Config
    source: Literal["trained", "shipped", "converted"]
    tokens_trained: int | None
    parameters: dict[str, int]
    flops_per_token: Flops
    cache: list[CacheSize]
    receptive_field: int | None
    runs: list[Run]
    quality: Quality | None
    by_position: ByPosition | None
    copying: list[Copy]
    induction: Induction | None
    heads: Heads | None
    attention_map: AttentionMap | None
    samples: list[Sample]
    conversion: Conversion | None = None


class Effects(Record):
    """Main effects by factor and interactions by "a x b"; ``definition`` says what the numbers mean."""

    definition: str
    main: dict[str, Interval]
    interactions: dict[str, Interval]


class Residual(Record):
    """What is left of the losses of runs once every variant and every seed has its own mean.

    Attributes:
        deviation: standard deviation of one run, nats per token; all intervals over seeds are made from it.
        df: its degrees of freedom, (variants - 1) (seeds - 1) where no run failed.
        by_variant: the root mean square residual of each variant, to see whether they are alike.
    """

    deviation: float
    df: int
    by_variant: dict[str, float]


class Baseline(Record):
    """A count model as a yardstick, in every table of losses.

    Attributes:
        label: what to call it.
        definition: what it is, in a sentence.
        tokens: of the training data that it was counted on.
        quality: its loss on the text that the variants were asked about.
        difference: the base's loss less its own, over documents, at the age at which the base has seen as many tokens;
            None where it has not.
    """

    label: str
    definition: str
    tokens: int
    quality: Quality
    difference: Interval | None = None


class Age(Record):
    """All variants after so many tokens: the end of a run of its own, with a decay of its own.

    Attributes:
        tokens: of training.
        quality: by variant; none where every run failed.
        differences: to the base, by variant.
        effects: None where the variants form no full factorial.
        induction: by variant.
        copying: by variant.
        residual: of the runs of this age.
        baseline: counted on as many tokens.
    """

    tokens: int
    quality: dict[str, Quality]
    differences: dict[str, Interval]
    effects: Effects | None
    induction: dict[str, Induction]
    copying: dict[str, list[Copy]]
    residual: Residual | None
    baseline: Baseline | None


class Rate(Record):
    """One learning rate of a search.

    Attributes:
        learning_rate: of the recipe.
        variant: the name under which its runs are.
        nats_per_token: mean over the runs; None where all failed.
    """

    learning_rate: float
    variant: str
    nats_per_token: float | None


class Claim(Record):
    """A claim, what was obtained here, and whether it holds; None where this study cannot tell.

    Attributes:
        paper: that makes it; empty for a claim of the study's own.
        claim: in words.
        ours: what was obtained.
        holds: whether it does.
        note: what the verdict rests on.
        margin: beyond or within which the difference must be, where the claim states one.
        interval: of the difference, where the claim is about one.
        p: of the verdict, before correction; None where a clock decides, and where nothing was obtained.
        adjusted: by Holm's correction over all claims of the study about losses.
    """

    paper: str
    claim: str
    ours: str
    holds: bool | None
    note: str
    margin: float | None = None
    interval: Interval | None = None
    p: float | None = None
    adjusted: float | None = None


class Counterpart(Record):
    """What a variant's changes would give in one of GPT-2's sizes."""

    changes: dict[str, Any]
    parameters: int
    cache: list[CacheSize]
    flops_per_token: dict[str, int]


class Results(Record):
    """`results.json`.

    Attributes:
        format: `FORMAT`.
        version: `VERSION`.
        study: the study as a whole.
        variants: by name, in the order in which a reader expects them: the base first, then as in the study's file.
        effects: None where the variants form no full factorial.
        four_sizes: by GPT-2's sizes and variants.
        claims: of papers and of the study, those about losses; together they are the family of Holm's correction.
        residual: of the runs of all variants that were trained from scratch; None where there is one seed.
        baselines: count models; one for each number of tokens that variants were trained on.
        ages: by tokens, ascending; the last is what ``variants`` have. empty where a study has one age.
        rates: of a search, by what was searched, in the order of the rates.
    """

    format: Literal["gptlab study"] = "gptlab study"
    version: Literal[1] = 1
    study: About
    variants: dict[str, Variant]
    effects: Effects | None
    four_sizes: dict[str, dict[str, Counterpart]]
    claims: list[Claim] = []
    residual: Residual | None = None
    baselines: list[Baseline] = []
    ages: list[Age] = []
    rates: dict[str, list[Rate]] = {}


class Machine(Record):
    """Where the timings were taken."""

    processor: str
    threads: int
    torch: str
    memory_bytes: int
    device: str
    date: str


class Peaks(Record):
    """What the machine reaches at best: bytes read a second, and operations a second of matrix products by dtype."""

    bandwidth_bytes_per_second: float
    flops: dict[str, float]
    how: str


class Prefill(Record):
    """Reading ``batch`` prompts of ``context`` tokens."""

    context: int
    batch: int
    tokens_per_second: float


class Decode(Record):
    """One more token for each of ``batch`` sequences that hold ``context`` tokens."""

    context: int
    batch: int
    milliseconds: float
    tokens_per_second: float


class VariantTimings(Record):
    """What the clock says of one variant. Memory is what the process took beyond its start, at the peak."""

    training_tokens_per_second: float | None
    training_memory_bytes: int | None
    decoding_memory_bytes: int | None
    prefill: list[Prefill]
    decode: list[Decode]


class Timings(Record):
    """`timings.json`. ``how`` says how the figures were taken; ``claims`` are those that a clock decides."""

    format: Literal["gptlab study timings"] = "gptlab study timings"
    version: Literal[1] = 1
    machine: Machine
    dtype: str
    how: str
    peaks: Peaks
    variants: dict[str, VariantTimings]
    claims: list[Claim] = []


def encode(values: Any) -> bytes:
    """Return JSON whose bytes depend on the values alone; numbers that JSON does not know are refused."""
    plain = values.model_dump(mode="json") if isinstance(values, BaseModel) else values
    return json.dumps(plain, indent=1, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def write_results(directory: Path, results: Results) -> None:
    """Write `results.json` into a study's directory; raises `GptlabError` where that cannot be done."""
    write_files(directory, {RESULTS: encode(results)})


def write_timings(directory: Path, timings: Timings) -> None:
    """Write `timings.json` into a study's directory; raises `GptlabError` where that cannot be done."""
    write_files(directory, {TIMINGS: encode(timings)})


def read_results(directory: Path, name: str = RESULTS) -> Results:
    """Read `results.json`; raises `GptlabError` where it is missing, damaged, or of another version."""
    path = directory / name
    results = _read(path, FORMAT, Results)
    if results.study.base not in results.variants:
        raise GptlabError(f"{path} is damaged: it lacks its base {results.study.base!r}")
    return results


def read_timings(directory: Path, name: str = TIMINGS) -> Timings:
    """Read `timings.json`; raises `GptlabError` where it is missing, damaged, or of another version."""
    return _read(directory / name, TIMINGS_FORMAT, Timings)


def _read(path: Path, kind: str, model: type[_File]) -> _File:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise GptlabError(
            f"{path.parent} has no {path.name}; finish its study first: gptlab study --resume --out {path.parent}"
        ) from None
    except (OSError, ValueError) as error:
        raise GptlabError(f"{path} cannot be read ({error}); {_again(path)}") from None
    stated = (values.get("format"), values.get("version")) if isinstance(values, dict) else None
    if stated != (kind, VERSION):
        raise GptlabError(f"{path} is not a {kind} of version {VERSION}; {_again(path)}")
    try:
        return model.model_validate_json(json.dumps(values))
    except ValidationError as error:
        raise GptlabError(f"{path} is damaged: {explain(error)}; {_again(path)}") from None


def _again(path: Path) -> str:
    return f"make it again: gptlab study --resume --out {path.parent}"


def explain(error: ValidationError) -> str:
    """Return the first thing in a file that is missing or of another type, in words."""
    first = error.errors()[0]
    where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"])
    return f"{where.lstrip('.')}: {first['msg'][0].lower()}{first['msg'][1:]}"
