"""A study's two files as the report asks for them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from gptlab.config import ModelConfig
from gptlab.errors import GptlabError
from gptlab.formatting import NBSP, count, listed, millions
from gptlab.model import cost
from gptlab.report.blocks import Interval, literal
from gptlab.study import roofline
from gptlab.study.files import read_study as read_file
from gptlab.study.files import study_names
from gptlab.study.orders import read_order
from gptlab.study.results import RESULTS, TIMINGS, downgraded, read_results, read_timings
from gptlab.study.variants import study_order

CHANGES = ("rope", "gqa", "swa")
"""The three changes that the report has a section for."""
NAMES = {"rope": "RoPE", "gqa": "GQA", "swa": "SWA"}
FIELDS = {
    "position": "rope",
    "rope": "rope",
    "n_kv_head": "gqa",
    "window": "swa",
    "sinks": "swa",
    "dilation": "swa",
}
"""To which change each field of `ModelConfig` belongs."""


class Study:
    """What was found and what was timed.

    Attributes:
        results: `results.json`.
        timings: `timings.json`, or None where a study has none yet.
        variants: of the results, by name, the base first, then as the study's file has them.
        base_name: the variant that the others are compared with.
        configs: the architecture of each variant.
    """

    def __init__(
        self, results: Mapping[str, Any], timings: Mapping[str, Any] | None, order: Sequence[str] = ()
    ) -> None:
        self.results, self.timings = results, timings
        self.about: Mapping[str, Any] = results["study"]
        self.base_name: str = self.about["base"]
        place = {name: i for i, name in enumerate(order)}
        names = sorted(results["variants"], key=lambda n: (n != self.base_name, place.get(n, len(place))))
        self.variants: dict[str, Any] = {name: results["variants"][name] for name in names}
        self.configs = {name: make_config(variant["config"]) for name, variant in self.variants.items()}

    @property
    def base(self) -> Mapping[str, Any]:
        """The base's results."""
        return self.variants[self.base_name]

    def label(self, name: str) -> str:
        """A variant's name in words, as text that stands for itself."""
        return literal(self.name_of(name))

    def name_of(self, name: str) -> str:
        """A variant's name in words, for a drawing, which knows no markup."""
        own = " ".join(self.variants[name]["label"].split())
        return f"{own} (not trained on)" if self.as_converted(name) else own

    def as_converted(self, name: str) -> bool:
        """Was it left as it came out of the conversion, where others were trained on?"""
        made, about = self.variants[name].get("conversion"), self.about.get("conversion")
        return bool(made and about and about["recipe"] and [look["share"] for look in made["looks"]] == [0])

    def made(self, name: str) -> str:
        """A variant's changes in words: GQA with 2 of 6 key/value heads."""
        if self.variants[name]["source"] == "converted":
            return self.label(name)  # there may be others of this architecture
        config, kinds = self.configs[name], self.kinds[name]
        words = {
            "rope": "RoPE" if config.position == "rope" else f"{config.position} positions",
            "gqa": f"GQA with {config.kv_heads} key/value head{'s' * (config.kv_heads != 1)} for {config.n_head}",
            "swa": f"SWA with {_windows(config)}",
        }
        return listed([words[change] for change in CHANGES if change in kinds]) if kinds else self.label(name)

    @cached_property
    def drawn(self) -> list[str]:
        """The variants that figures and counts show: of conversions that come to one architecture, the best.

        One that was trained on comes before those that were not.
        """
        found: list[str] = []
        for name, variant in self.variants.items():
            if variant["source"] == "converted":
                alike = [n for n in self.variants if self.configs[n] == self.configs[name]]
                if any(self.variants[n]["source"] != "converted" for n in alike) or name != min(alike, key=self._rank):
                    continue
            found.append(name)
        return found

    def _rank(self, name: str) -> tuple[bool, float]:
        loss = self.loss(name)
        return self.as_converted(name), math.inf if loss is None else loss

    def reference(self, name: str) -> str:
        """The variant that another is compared with: the base, or for what was trained on the base trained on."""
        about = self.about.get("conversion") or {}
        yardstick = about.get("yardstick")
        looks = (self.variants[name].get("conversion") or {}).get("looks", ())
        return yardstick if yardstick and name != yardstick and len(looks) > 1 else self.base_name

    @cached_property
    def kinds(self) -> dict[str, frozenset[str]]:
        """Which changes each variant makes to the base: of `CHANGES`, or ``other``."""
        before = self.configs[self.base_name].to_dict()
        return {
            name: frozenset(FIELDS.get(f, "other") for f, value in config.to_dict().items() if value != before.get(f))
            for name, config in self.configs.items()
        }

    def alone(self, change: str) -> list[str]:
        """The variants that make this change and no other."""
        return [name for name, kinds in self.kinds.items() if kinds == {change}]

    def with_change(self, change: str) -> list[str]:
        """The variants that make this change, perhaps among others."""
        return [name for name, kinds in self.kinds.items() if change in kinds]

    def difference(self, name: str) -> Interval | None:
        """The loss of a variant on the held-out text less that of its `reference`; None where it cannot be told."""
        return self.results["comparisons"].get(name, {}).get("validation_loss")

    def loss(self, name: str) -> float | None:
        """Nats a token on the held-out text."""
        quality = self.variants[name]["quality"]
        return None if quality is None else quality["nats_per_token"]

    def timed(self, name: str) -> Mapping[str, Any]:
        """What was timed of a variant; empty where nothing was."""
        return self.timings["variants"].get(name, {}) if self.timings else {}

    def rates(self, name: str, what: str) -> dict[tuple[int, int], float]:
        """Measured tokens per second of ``decode`` or ``prefill`` by (context, batch)."""
        return {(p["context"], p["batch"]): p["tokens_per_second"] for p in self.timed(name).get(what, [])}

    def decode(self, name: str) -> dict[tuple[int, int], float]:
        """Measured tokens per second of decoding by (context, batch)."""
        return self.rates(name, "decode")

    @property
    def machine(self) -> roofline.Machine | None:
        """The measured limits of the machine, for the dtype that was timed."""
        return roofline.machine_of(self.timings)

    @property
    def dtype(self) -> str:
        """In which the timings were taken; where there are none, that of the caches counted."""
        return self.timings["dtype"] if self.timings else "bfloat16"

    @property
    def model_words(self) -> str:
        """The base model in a few words."""
        c = self.configs[self.base_name]
        size = millions(self.base["parameters"]["total"])
        return f"GPT-2 with {c.n_layer} layers, {c.n_head} heads, width {c.n_embd} ({size} parameters)"

    @property
    def trained_words(self) -> str:
        """How long the variants were trained."""
        tokens = sorted({v["tokens_trained"] for v in self.variants.values() if v["tokens_trained"]})
        if not tokens:
            return "tokens trained: not recorded"
        amount = millions(tokens[0]) if len(tokens) == 1 else f"{millions(tokens[0])} to {millions(tokens[-1])}"
        seeds = max(len(v["runs"]) for v in self.variants.values())
        return f"{amount} tokens trained" + (f", {seeds} seed{'s' * (seeds > 1)}" if seeds else "")

    @property
    def machine_words(self) -> str:
        """The hardware in a few words."""
        if not self.timings:
            return "hardware: not timed"
        m = self.timings["machine"]
        threads = f"{m['threads']} thread{'s' * (m['threads'] != 1)}"
        where = literal(m["processor"]) + (f", {threads}" if m["device"] == "cpu" else f", {literal(m['device'])}")
        return f"{where}, torch{NBSP}{literal(m['torch'])}"

    @property
    def setting(self) -> str:
        """Model, tokens trained and hardware, for the header of a table."""
        return f"{self.model_words}; {self.trained_words}; {self.machine_words}"

    @property
    def failures(self) -> list[str]:
        """Every run that failed, with the reason."""
        return [
            f"{self.label(name)}, seed {run['seed']}: {literal(run['error'] or 'no reason was recorded')}"
            for name, variant in self.variants.items()
            for run in variant["runs"]
            if run["status"] == "failed"
        ]

    def untrained(self, name: str) -> bool:
        """Whether a variant was to be trained and no run came to its end."""
        runs = self.variants[name]["runs"]
        return bool(runs) and all(run["status"] == "failed" for run in runs)

    @property
    def claims(self) -> list[Mapping[str, Any]]:
        """Papers' claims, those about quality before those that a clock decides."""
        return [*(self.results["claims"] or []), *((self.timings or {}).get("claims") or [])]

    @property
    def text(self) -> str:
        """What the loss was measured on, in words."""
        named = dict.fromkeys(v["quality"]["text"] for v in self.variants.values() if v["quality"])
        return listed([literal(text) for text in named]) if named else "no text"

    @property
    def contexts(self) -> list[int]:
        """Contexts at which the base's cache was counted, ascending."""
        return sorted({entry["context"] for entry in self.base["cache"]})

    def cache(self, name: str, context: int, batch: int = 1) -> int | None:
        """Bytes of a variant's cache as counted by the study."""
        found = (e["bytes"] for e in self.variants[name]["cache"] if (e["context"], e["batch"]) == (context, batch))
        return next(found, None)

    def per_token(self, name: str) -> int:
        """Bytes that a token adds to a variant's cache."""
        return cost.cache_bytes_per_token(self.configs[name], self.cache_size)

    @property
    def cache_size(self) -> int:
        """Bytes of a number in the caches that were counted."""
        return roofline.BYTES[self.base["cache"][0]["dtype"]] if self.base["cache"] else 2


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
    of_results, of_timings = (directory / name for name in names)
    results = downgraded(read_results(directory, of_results.name))
    timings = read_timings(directory, of_timings.name).model_dump(mode="json") if of_timings.exists() else None
    return Study(results, timings, order_in(directory, results["study"]["name"]))


def order_in(directory: Path, name: str) -> list[str]:
    """Return the variants' names in the order of the study's file, as far as the file is known.

    Args:
        directory: of the study, whose `study.json` holds it; else one of that name that the package carries counts.
        name: of the study.
    """
    try:
        return study_order(read_order(directory).study)
    except GptlabError:
        return study_order(read_file(name)) if name in study_names() else []
