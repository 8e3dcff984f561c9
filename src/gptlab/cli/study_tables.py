"""What `gptlab study` shows at its end: tables of the variants, and what their figures depend on."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

    from gptlab.study.results import Interval, Results, Timings, Variant


def summary(results: Results, timings: Timings) -> Table:
    """Return the table of all variants: size, memory, loss with its difference to the reference, speed."""
    from rich.table import Table

    about, context = results.study, _context(results)
    batch = max((row.batch for row in timings.variants[about.base].decode if row.context == context), default=1)
    table = Table("variant", title=about.title, title_justify="left")
    columns = (
        "parameters",
        f"cache, {context:,} tokens",
        "loss, nats per token",
        "less the base [95%]",
        f"ms per token, batch {batch}",
    )
    for column in columns:
        table.add_column(column, justify="right")
    for name, variant in results.variants.items():
        smallest = (context, _least(variant))
        size = next(row.bytes for row in variant.cache if (row.context, row.batch) == smallest)
        decode = timings.variants[name].decode
        point = next((row for row in decode if (row.context, row.batch) == (context, batch)), None)
        table.add_row(
            variant.label,
            f"{variant.parameters['total']:,}",
            _size(size / _least(variant)),
            "failed" if variant.quality is None else f"{variant.quality.nats_per_token:.4f}",
            "" if name == about.base else difference(variant.difference),
            "" if point is None else f"{point.milliseconds:.2f}",
        )
    for counted in results.baselines[-1:]:
        gap = "" if counted.difference is None else f"the base less it: {difference(counted.difference)}"
        table.add_row(counted.label, "", "", f"{counted.quality.nats_per_token:.4f}", gap, "")
    return table


def rates_table(results: Results) -> Table | None:
    """Return the losses of a search for the learning rate; None where there was none."""
    from rich.table import Table

    if not results.rates:
        return None
    rates = sorted({one.learning_rate for row in results.rates.values() for one in row})
    title = "loss by learning rate, nats per token"
    table = Table("variant", *(f"{rate:g}" for rate in rates), "best", title=title, title_justify="left")
    for cell, row in results.rates.items():
        losses = {one.learning_rate: one.nats_per_token for one in row if one.nats_per_token is not None}
        best = min(losses, key=lambda rate: losses[rate], default=None)
        cells = [f"{losses[rate]:.4f}" if rate in losses else "failed" for rate in rates]
        table.add_row(cell, *cells, "" if best is None else f"{best:g}")
    return table


def ages_table(results: Results) -> Table | None:
    """Return losses and effects by age; None where there is one age."""
    from rich.table import Table

    if not results.ages:
        return None
    title = "loss and effects by tokens of training"
    table = Table("", *(f"{age.tokens:,}" for age in results.ages), title=title, title_justify="left")
    for name, variant in results.variants.items():
        losses = [age.quality.get(name) for age in results.ages]
        table.add_row(variant.label, *("failed" if one is None else f"{one.nats_per_token:.4f}" for one in losses))
    counted = [age.baseline for age in results.ages]
    table.add_row("trigram", *("" if one is None else f"{one.quality.nats_per_token:.4f}" for one in counted))
    effects = [{} if age.effects is None else age.effects.main | age.effects.interactions for age in results.ages]
    for term in dict.fromkeys(term for of_age in effects for term in of_age):
        table.add_row(f"effect of {term}", *(difference(of_age.get(term)) for of_age in effects))
    return table


def conversion_table(results: Results) -> Table | None:
    """Return the losses of conversions by share of the pre-training; None where there are fewer than two shares."""
    from rich.table import Table

    general = results.study.conversion
    conversions = {name: v.conversion for name, v in results.variants.items() if v.conversion is not None}
    shares = sorted({point.share for about in conversions.values() for point in about.checkpoints})
    if general is None or len(shares) < 2:
        return None
    label = results.variants[general.reference].label if general.reference else "the base"
    title = f"loss less that of {label}, by share of the pre-training"
    table = Table("variant", title=title, title_justify="left", min_width=len(title))
    for share in shares:
        table.add_column(f"{100 * share:g}%", justify="right")
    for name, about in conversions.items():
        by_share = {point.share: point for point in about.checkpoints}
        cells = []
        for point in map(by_share.get, shares):
            if point is None:
                cells.append("")
            elif point.difference is None or name == general.reference:
                cells.append(f"{point.nats_per_token:.4f}")
            else:
                cells.append(f"{point.difference.mean:+.4f}")
        table.add_row(results.variants[name].label, *cells)
    return table


def difference(interval: Interval | None) -> str:
    """Return a difference with its interval in few words."""
    if interval is None:
        return "no run"
    if interval.low is None or interval.high is None:
        return f"{interval.mean:+.4f}"
    inside = ", noise" if interval.low <= 0 <= interval.high else ""
    return f"{interval.mean:+.4f} [{interval.low:+.4f}, {interval.high:+.4f}{inside}]"


def notes(results: Results, timings: Timings) -> list[str]:
    """Return what the table's figures depend on, in sentences."""
    about, machine = results.study, timings.machine
    said = []
    tokens = {variant.tokens_trained for variant in results.variants.values()} - {None}
    if tokens:
        seeds = f", {len(about.seeds)} seeds" if len(about.seeds) > 1 else ", one seed"
        said.append(f"Trained on {' or '.join(f'{n:,}' for n in sorted(filter(None, tokens)))} tokens{seeds}.")
    quality = next((v.quality for v in results.variants.values() if v.quality), None)
    if quality:
        said.append(f"Loss: {quality.text}, {quality.tokens:,} tokens, {quality.protocol}.")
    if about.conversion is not None and about.conversion.reference:
        label = results.variants[about.conversion.reference].label
        said.append(f"Uptrained variants are compared with {label!r}: the base after the same continued training.")
    intervals = [variant.difference for variant in results.variants.values() if variant.difference]
    if intervals:
        said.append(f"Intervals: {intervals[0].method}, n = {intervals[0].n}.")
    threads = f"{machine.threads} thread{'s' * (machine.threads > 1)}"
    said.append(
        f"Cache of one sequence in bfloat16; times in {timings.dtype} on {machine.processor}, {threads}, torch"
        f" {machine.torch}."
    )
    failed = [
        f"{name}, seed {run.seed}: {run.error}"
        for name, variant in results.variants.items()
        for run in variant.runs
        if run.status == "failed"
    ]
    return said + [f"Failed: {one}" for one in failed]


def _context(results: Results) -> int:
    """The longest context that a cache is told of."""
    return max(row.context for row in results.variants[results.study.base].cache)


def _least(variant: Variant) -> int:
    return min(row.batch for row in variant.cache)


def _size(n_bytes: float) -> str:
    return f"{n_bytes / 2**20:,.2f} MiB" if n_bytes >= 2**20 else f"{n_bytes / 2**10:,.1f} KiB"
