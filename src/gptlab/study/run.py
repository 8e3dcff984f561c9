"""A study from its file to its two result files. Whatever was done before is reused."""

from __future__ import annotations

from pathlib import Path

from gptlab.progress import Report
from gptlab.study.assemble import assemble
from gptlab.study.claims import claims_of_timings
from gptlab.study.directory import CACHE, Request
from gptlab.study.evaluate import evaluate
from gptlab.study.make import make
from gptlab.study.measure import measure
from gptlab.study.resolve import Plan, resolve
from gptlab.study.results import Results, Timings, write_results, write_timings


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
    timings = time_variants(plan, results, report)
    write_timings(out, timings)
    return results, timings


def time_variants(plan: Plan, results: Results, report: Report) -> Timings:
    """Time every architecture once, and judge the claims that a clock decides."""
    first = {entry.config: entry.name for entry in reversed(plan.entries)}
    configs = {entry.name: entry.config for entry in plan.entries if first[entry.config] == entry.name}
    settings, cache = plan.study.measure, plan.out / CACHE
    timings = measure(configs, settings, plan.recipe, cache, device=plan.device, report=report)
    # Variants of one architecture share their times.
    shared = {entry.name: timings.variants[first[entry.config]] for entry in plan.entries}
    timings = timings.model_copy(update={"variants": shared})
    return timings.model_copy(update={"claims": claims_of_timings(plan.study.claims, results, timings)})
