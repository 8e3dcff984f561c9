"""The part of `results.json` that is about conversions: losses at every look, differences between like and like."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gptlab.config import ModelConfig
from gptlab.evaluation.scoring import Result
from gptlab.study.results import Checkpoint, Conversion, Interval
from gptlab.study.statistics import Scored, contrast


@dataclass
class Looks:
    """What is known of a converted variant beside its answers.

    Attributes:
        changes: what was asked for.
        uptrain: settings of its own.
        tokens: trained on by share, 0 among them.
        steps: in which it was converted.
        moved: divergence from the base right after the conversion, of each one that was made.
        moved_tokens: that it was measured on.
        results: score on the held-out text by share and seed.
        whole: the same in windows of the model's own context, where that is longer than the base's.
    """

    changes: dict[str, Any]
    uptrain: list[str]
    tokens: dict[float, int]
    steps: list[str] = field(default_factory=list)
    moved: list[float] = field(default_factory=list)
    moved_tokens: int = 0
    results: dict[float, dict[int, Result]] = field(default_factory=dict)
    whole: dict[float, dict[int, Result]] = field(default_factory=dict)


def at(name: str, share: float, *, whole: bool = False) -> str:
    """Return what a variant's scores at a share are called among all scores of a study."""
    return f"{name} at {share:g}" + (" whole" if whole else "")


def scores(looks: Mapping[str, Looks], base: str, of_base: Mapping[int, Result]) -> dict[str, Mapping[int, Result]]:
    """Return the scores of all looks under the names of `at`; those of the base are its own, at 0."""
    found: dict[str, Mapping[int, Result]] = {at(base, 0.0): of_base}
    for name, one in looks.items():
        found |= {at(name, share): results for share, results in one.results.items()}
        found |= {at(name, share, whole=True): results for share, results in one.whole.items()}
    return found


def conversion(
    name: str,
    looks: Mapping[str, Looks],
    configs: Mapping[str, ModelConfig],
    base: str,
    yardstick: str | None,
    scored: Scored,
) -> Conversion:
    """Return what `results.json` says of a converted variant.

    Args:
        name: of the variant.
        looks: of all of them.
        configs: their architectures.
        base: the name of the base.
        yardstick: the base trained on, or None.
        scored: from `scores`.
    """
    own = looks[name]
    return Conversion(
        changes=own.changes,
        steps=own.steps,
        settings=own.uptrain,
        divergence=math.fsum(own.moved) / len(own.moved) if own.moved else None,
        divergence_tokens=own.moved_tokens,
        checkpoints=[
            _look(name, share, looks, _alike(name, configs, looks), base, yardstick, scored)
            for share in sorted(own.results)
        ],
    )


def _alike(name: str, configs: Mapping[str, ModelConfig], looks: Mapping[str, Looks]) -> list[str]:
    """The other conversions that end with the same architecture."""
    return [other for other in looks if other != name and configs[other] == configs[name]]


def _look(
    name: str,
    share: float,
    looks: Mapping[str, Looks],
    rivals: Sequence[str],
    base: str,
    yardstick: str | None,
    scored: Scored,
) -> Checkpoint:
    results = list(looks[name].results[share].values())
    by_run = [result.metrics["nats_per_token"] for result in results]
    against = at(base, 0.0) if share == 0 else at(yardstick, share) if yardstick and yardstick != name else None
    differences: dict[str, Interval] = {}
    for other in rivals:
        found = contrast({at(name, share): 1.0, at(other, share): -1.0}, scored)
        if found is not None:
            differences[other] = found
    whole = looks[name].whole.get(share)
    return Checkpoint(
        share=share,
        tokens=looks[name].tokens[share],
        nats_per_token=math.fsum(by_run) / len(by_run),
        by_run=by_run,
        difference=None if against is None else contrast({at(name, share): 1.0, against: -1.0}, scored),
        rivals=differences,
        own_context=math.fsum(r.metrics["nats_per_token"] for r in whole.values()) / len(whole) if whole else None,
    )
