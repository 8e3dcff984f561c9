"""A study from its file to its two result files. Whatever was done before is reused."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from gptlab.config import ModelConfig
from gptlab.progress import Report
from gptlab.study.assemble import assemble
from gptlab.study.claims import claims_of_timings
from gptlab.study.directory import CACHE, Request
from gptlab.study.evaluate import evaluate
from gptlab.study.make import make
from gptlab.study.measure import measure
from gptlab.study.resolve import resolve
from gptlab.study.results import Results, Timings, write_results, write_timings
from gptlab.study.settings import StudySettings
from gptlab.training.recipe import Recipe


def run_study(request: Request, out: Path, *, report: Report = lambda row: None) -> tuple[Results, Timings]:
    """Do a study, or go on with it where it was stopped, and write `results.json` and `timings.json`.

    Args:
        request: the study.
        out: its directory.
        report: called with plain values as the work goes on: ``plan``, ``phase``, ``training`` (a row of a run) and
            ``note``.

    Raises:
        GptlabError: an impossible variant or setting, a directory that holds something else, no data, no space.
        Interrupted: a signal came during training; the same call goes on.
    """
    plan = resolve(request, out, report)
    made = make(plan, report)
    evaluation = evaluate(plan, made, report)
    results = assemble(plan, made, evaluation)
    write_results(out, results)
    configs = {entry.name: entry.config for entry in plan.entries}
    timings = time_variants(plan.study, plan.recipe, configs, results, out / CACHE, device=plan.device, report=report)
    write_timings(out, timings)
    return results, timings


def time_variants(
    study: StudySettings,
    recipe: Recipe,
    configs: Mapping[str, ModelConfig],
    results: Results,
    cache: Path,
    *,
    device: torch.device,
    report: Report,
) -> Timings:
    """Time every architecture once, and judge the claims that a clock decides.

    Args:
        study: what to time, and which claims to judge.
        recipe: the batch and dtype of a training step.
        configs: of all variants, by name.
        results: of the study, for claims that need them too.
        cache: where single measurements are kept.
        device: to measure on.
        report: as in `run_study`.
    """
    first = {config: name for name, config in reversed(list(configs.items()))}
    distinct = {name: config for name, config in configs.items() if first[config] == name}
    timings = measure(distinct, study.measure, recipe, cache, device=device, report=report)
    # Variants of one architecture share their times.
    shared = {name: timings.variants[first[config]] for name, config in configs.items()}
    timings = timings.model_copy(update={"variants": shared})
    return timings.model_copy(update={"claims": claims_of_timings(study.claims, results, timings)})
