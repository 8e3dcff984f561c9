"""A study's two files as the report asks for them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from gptlab import roofline
from gptlab.config import ModelConfig
from gptlab.errors import GptlabError
from gptlab.formatting import NBSP, count, listed, millions
from gptlab.model import cost
from gptlab.plotting import style
from gptlab.plotting.style import Look
from gptlab.report.blocks import literal
from gptlab.study.results import (
    RESULTS,
    TIMINGS,
    Checkpoint,
    Claim,
    Results,
    Timings,
    Variant,
    VariantTimings,
    read_results,
    read_timings,
)

NAMES = {"rope": "RoPE", "gqa": "GQA", "swa": "SWA"}
"""The three changes that the report has a section for."""


def machine_of(timings: Timings | None) -> roofline.Machine | None:
    """Return the limits that a study measured, for the dtype that it timed; None where it measured none."""
    flops = timings.peaks.flops.get(timings.dtype) if timings else None
    return roofline.Machine(timings.peaks.bandwidth_bytes_per_second, flops) if timings and flops else None


class Study:
    """The results of a study, and what was timed.

    Attributes:
        results: `results.json`.
        timings: `timings.json`, or None where a study has none yet.
        about: the study as a whole.
        variants: of the results, by name, the base first.
        base_name: the variant that the others change.
        configs: the architecture of each variant.
        kinds: which changes each variant makes to the base.
    """

    def __init__(self, results: Results, timings: Timings | None) -> None:
        self.results, self.timings, self.about, self.variants = results, timings, results.study, results.variants
        self.base_name = self.about.base
        self.configs = {name: variant.config for name, variant in self.variants.items()}
        self.kinds = {name: frozenset(variant.kinds) for name, variant in self.variants.items()}

    @property
    def base(self) -> Variant:
        """The base's results."""
        return self.variants[self.base_name]

    def label(self, name: str) -> str:
        """A variant's name in words, as text that stands for itself."""
        return literal(self.name_of(name))

    def name_of(self, name: str) -> str:
        """A variant's name in words, for a drawing, which knows no markup."""
        own = " ".join(self.variants[name].label.split())
        return f"{own} (not uptrained)" if self.as_converted(name) else own

    def as_converted(self, name: str) -> bool:
        """Was it left as it came out of the conversion, where others were uptrained?"""
        made, about = self.variants[name].conversion, self.about.conversion
        return bool(made and about and about.recipe and [at.share for at in made.checkpoints] == [0])

    def made(self, name: str) -> str:
        """A variant's changes in words: GQA with 2 of 6 key/value heads."""
        if self.variants[name].source == "converted":
            return self.label(name)  # there may be others of this architecture
        config, kinds = self.configs[name], self.kinds[name]
        words = {
            "rope": "RoPE" if config.position == "rope" else f"{config.position} positions",
            "gqa": f"GQA with {config.kv_heads} key/value head{'s' * (config.kv_heads != 1)} for {config.n_head}",
            "swa": f"SWA with {_windows(config)}",
        }
        return listed([words[change] for change in NAMES if change in kinds]) if kinds else self.label(name)

    @cached_property
    def drawn(self) -> list[str]:
        """The variants that figures and counts show: of conversions that come to one architecture, the best.

        One that was uptrained comes before those that were not.
        """
        names: list[str] = []
        for name, variant in self.variants.items():
            if variant.source == "converted":
                alike = [n for n in self.variants if self.configs[n] == self.configs[name]]
                if any(self.variants[n].source != "converted" for n in alike) or name != min(alike, key=self._rank):
                    continue
            names.append(name)
        return names

    def _rank(self, name: str) -> tuple[bool, float]:
        loss = self.loss(name)
        return self.as_converted(name), math.inf if loss is None else loss

    def reference(self, name: str) -> str:
        """The variant that another is compared with: the base, or the base after the same continued training."""
        return self.variants[name].reference or self.base_name

    def checkpoints(self, name: str) -> list[Checkpoint]:
        """Where a converted variant was evaluated; empty for others."""
        conversion = self.variants[name].conversion
        return conversion.checkpoints if conversion else []

    def alone(self, change: str) -> list[str]:
        """The variants that make this change and no other."""
        return [name for name, kinds in self.kinds.items() if kinds == {change}]

    def with_change(self, change: str) -> list[str]:
        """The variants that make this change, perhaps among others."""
        return [name for name, kinds in self.kinds.items() if change in kinds]

    def loss(self, name: str) -> float | None:
        """The loss on the held-out text, in nats per token."""
        quality = self.variants[name].quality
        return None if quality is None else quality.nats_per_token

    def timed(self, name: str) -> VariantTimings | None:
        """What was timed of a variant."""
        return self.timings.variants.get(name) if self.timings else None

    def rates(self, name: str, what: Literal["decode", "prefill"]) -> dict[tuple[int, int], float]:
        """Measured tokens per second by (context, batch)."""
        timed = self.timed(name)
        if timed is None:
            return {}
        points = timed.decode if what == "decode" else timed.prefill
        return {(p.context, p.batch): p.tokens_per_second for p in points}

    def common_point(self, what: Literal["decode", "prefill"]) -> tuple[int, int] | None:
        """The heaviest (context, batch) that was measured in all timed variants: by tokens held in the cache."""
        measured = [set(self.rates(name, what)) for name in self.variants if self.timed(name)]
        common = set.intersection(*measured) if measured else set()
        return max(common, key=lambda at: (at[0] * at[1], at[0])) if common else None

    @cached_property
    def looks(self) -> dict[str, Look]:
        """How each variant is drawn: the colour tells its attention, dashes and hollow marks rotary positions."""
        without = {"position", "rope"}
        kinds = [
            (str({f: v for f, v in config.to_dict().items() if f not in without}), config.position == "rope")
            for config in self.configs.values()
        ]
        return dict(zip(self.configs, style.looks(kinds), strict=True))

    @property
    def machine(self) -> roofline.Machine | None:
        """The measured limits of the machine, for the dtype that was timed."""
        return machine_of(self.timings)

    @property
    def dtype(self) -> str:
        """In which the timings were taken; where there are none, that of the caches counted."""
        return self.timings.dtype if self.timings else "bfloat16"

    @property
    def model_words(self) -> str:
        """The base model in a few words."""
        c = self.configs[self.base_name]
        size = millions(self.base.parameters["total"])
        family = "Llama" if c.norm == "rms" else "GPT-2"
        return f"{family} with {c.n_layer} layers, {c.n_head} heads, width {c.n_embd} ({size} parameters)"

    @property
    def trained_words(self) -> str:
        """How long the variants were trained."""
        seen = sorted({v.tokens_trained for v in self.variants.values() if v.tokens_trained})
        if not seen:
            return "tokens trained: not recorded"
        amount = millions(seen[0]) if len(seen) == 1 else f"{millions(seen[0])} to {millions(seen[-1])}"
        seeds = max(len(v.runs) for v in self.variants.values())
        return f"{amount} tokens trained" + (f", {seeds} seed{'s' * (seeds > 1)}" if seeds else "")

    @property
    def machine_words(self) -> str:
        """The hardware in a few words."""
        if not self.timings:
            return "hardware: not timed"
        m = self.timings.machine
        threads = f"{m.threads} thread{'s' * (m.threads != 1)}"
        where = literal(m.processor) + (f", {threads}" if m.device == "cpu" else f", {literal(m.device)}")
        return f"{where}, torch{NBSP}{literal(m.torch)}"

    @property
    def setting(self) -> str:
        """Model, tokens trained and hardware, for the header of a table."""
        return f"{self.model_words}; {self.trained_words}; {self.machine_words}"

    @property
    def failures(self) -> list[str]:
        """Every run that failed, with the reason."""
        return [
            f"{self.label(name)}, seed {run.seed}: {literal(run.error or 'no reason was recorded')}"
            for name, variant in self.variants.items()
            for run in variant.runs
            if run.status == "failed"
        ]

    def untrained(self, name: str) -> bool:
        """Whether a variant was to be trained and no run came to its end."""
        runs = self.variants[name].runs
        return bool(runs) and all(run.status == "failed" for run in runs)

    @property
    def claims(self) -> list[Claim]:
        """Papers' claims, those about quality before those that a clock decides."""
        return [*self.results.claims, *(self.timings.claims if self.timings else ())]

    @property
    def text(self) -> str:
        """What the loss was measured on, in words."""
        named = dict.fromkeys(v.quality.text for v in self.variants.values() if v.quality)
        return listed([literal(text) for text in named]) if named else "no text"

    @property
    def contexts(self) -> list[int]:
        """Contexts at which the base's cache was counted, ascending."""
        return sorted({entry.context for entry in self.base.cache})

    def cache(self, name: str, context: int, batch: int = 1) -> int | None:
        """Bytes of a variant's cache as counted by the study."""
        sizes = (e.bytes for e in self.variants[name].cache if (e.context, e.batch) == (context, batch))
        return next(sizes, None)

    def per_token(self, name: str) -> int:
        """Bytes that a token adds to a variant's cache."""
        return cost.cache_bytes_per_token(self.configs[name], self.cache_size)

    @property
    def cache_size(self) -> int:
        """Bytes of a number in the caches that were counted."""
        return roofline.BYTES[self.base.cache[0].dtype] if self.base.cache else 2


def make_config(values: Mapping[str, Any]) -> ModelConfig:
    """Return a configuration without the remark that its window is as long as its context."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ModelConfig.from_dict(values)


def _windows(config: ModelConfig) -> str:
    """The windows of a model in words, from its first layer to its last."""
    if len(set(config.windows)) > 1:
        words = f"windows of {', '.join('all' if w is None else count(w) for w in config.windows)}"
    else:
        words = "no window" if config.windows[0] is None else f"a window of {count(config.windows[0])}"
    words += f", {config.sinks} sink{'s' * (config.sinks != 1)}" if config.sinks else ""
    return words + (f", dilation {config.dilation}" if set(config.dilations) != {1} else "")


def tokens(n: int) -> str:
    """So many tokens, in words."""
    return f"{count(n)} token{'s' * (n != 1)}"


def sequences(batch: int) -> str:
    """So many sequences, in words."""
    return "one sequence" if batch == 1 else f"{batch} sequences"


def read_study(directory: Path, names: tuple[str, str] = (RESULTS, TIMINGS)) -> Study:
    """Read a study's results and, where there are any, its timings.

    Args:
        directory: of the study.
        names: of the two files, where they have others.

    Raises:
        GptlabError: no results, or a file that is damaged or of another version.
    """
    if not directory.is_dir():
        raise GptlabError(f"there is no study in {directory}: no such directory; name what gptlab study --out made")
    results = read_results(directory, names[0])
    return Study(results, read_timings(directory, names[1]) if (directory / names[1]).exists() else None)
