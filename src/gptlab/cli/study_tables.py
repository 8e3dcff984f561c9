"""What `gptlab study` shows at its end: tables of the variants, and what their figures depend on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

    from gptlab.study.results import Interval, Results, Timings


def summary(results: Results, timings: Timings, order: Sequence[str] = ()) -> Table:
    """Return the table of all variants: size, memory, loss with its difference to the base, speed.

    Args:
        results: what was found.
        timings: what was timed.
        order: the variants' names as they are to stand; without it they stand as in the results.
    """
    from rich.table import Table

    about, context = results["study"], _context(results)
    batch = max((row["batch"] for row in _base_points(results, timings) if row["context"] == context), default=1)
    table = Table("variant", title=about["title"], title_justify="left")
    columns = (
        "parameters",
        f"cache, {context:,} tokens",
        "loss, nats a token",
        "less the base [95%]",
        f"ms a token, batch {batch}",
    )
    for column in columns:
        table.add_column(column, justify="right")
    for name in _ordered(results, order):
        variant = results["variants"][name]
        size = next(
            row["bytes"] for row in variant["cache"] if (row["context"], row["batch"]) == (context, _least(variant))
        )
        quality, timing = variant["quality"], timings["variants"][name]
        point = next((row for row in timing["decode"] if (row["context"], row["batch"]) == (context, batch)), None)
        table.add_row(
            variant["label"],
            f"{variant['parameters']['total']:,}",
            _size(size / _least(variant)),
            "failed" if quality is None else f"{quality['nats_per_token']:.4f}",
            "" if name == about["base"] else difference(results["comparisons"][name].get("validation_loss")),
            "" if point is None else f"{point['milliseconds']:.2f}",
        )
    return table


def conversion_table(results: Results, order: Sequence[str] = ()) -> Table | None:
    """Return the losses of conversions by share of the pre-training; None where there are fewer than two shares.

    Args:
        results: what was found.
        order: the variants' names as they are to stand.
    """
    from rich.table import Table

    about = results["study"].get("conversion")
    found = {name: variant["conversion"] for name, variant in results["variants"].items() if "conversion" in variant}
    shares = sorted({look["share"] for conversion in found.values() for look in conversion["looks"]})
    if about is None or len(shares) < 2:
        return None
    yardstick = about["yardstick"]
    label = results["variants"][yardstick]["label"] if yardstick else "the base"
    title = f"loss less that of {label}, by share of the pre-training"
    table = Table("variant", title=title, title_justify="left", min_width=len(title))
    for share in shares:
        table.add_column(f"{100 * share:g}%", justify="right")
    for name in (name for name in _ordered(results, order) if name in found):
        looks = {look["share"]: look for look in found[name]["looks"]}
        cells = []
        for look in map(looks.get, shares):
            gap = None if look is None or name == yardstick else look["difference"]
            loss = "" if look is None else f"{look['nats_per_token']:.4f}"
            cells.append(loss if gap is None else f"{gap['mean']:+.4f}")
        table.add_row(results["variants"][name]["label"], *cells)
    return table


def _ordered(results: Results, order: Sequence[str]) -> list[str]:
    place = {name: i for i, name in enumerate(order)}
    return sorted(results["variants"], key=lambda name: place.get(name, len(place)))


def difference(interval: Interval | None) -> str:
    """Return a difference with its interval in few words."""
    if interval is None:
        return "no run"
    if interval["low"] is None or interval["high"] is None:
        return f"{interval['mean']:+.4f}"
    inside = ", noise" if interval["low"] <= 0 <= interval["high"] else ""
    return f"{interval['mean']:+.4f} [{interval['low']:+.4f}, {interval['high']:+.4f}{inside}]"


def notes(results: Results, timings: Timings) -> list[str]:
    """Return what the table's figures depend on, in sentences."""
    about, machine = results["study"], timings["machine"]
    found = []
    tokens = {variant["tokens_trained"] for variant in results["variants"].values()} - {None}
    if tokens:
        seeds = f", {len(about['seeds'])} seeds" if len(about["seeds"]) > 1 else ", one seed"
        found.append(f"Trained on {' or '.join(f'{n:,}' for n in sorted(filter(None, tokens)))} tokens{seeds}.")
    quality = next((v["quality"] for v in results["variants"].values() if v["quality"]), None)
    if quality:
        found.append(f"Loss: {quality['text']}, {quality['tokens']:,} tokens, {quality['protocol']}.")
    about_all = results["study"].get("conversion")
    if about_all is not None and about_all["yardstick"]:
        label = results["variants"][about_all["yardstick"]]["label"]
        found.append(f"What was converted and trained on is compared with {label!r}, the base trained on for as long.")
    intervals = [one["validation_loss"] for one in results["comparisons"].values() if one]
    if intervals:
        found.append(f"Intervals: {intervals[0]['method']}, n = {intervals[0]['n']}.")
    threads = f"{machine['threads']} thread{'s' * (machine['threads'] > 1)}"
    found.append(
        f"Cache of one sequence in bfloat16; times in {timings['dtype']} on {machine['processor']}, {threads}, torch"
        f" {machine['torch']}."
    )
    failed = [
        f"{name}, seed {run['seed']}: {run['error']}"
        for name, variant in results["variants"].items()
        for run in variant["runs"]
        if run["status"] == "failed"
    ]
    return found + [f"Failed: {one}" for one in failed]


def _base_points(results: Results, timings: Timings) -> list[Any]:
    return list(timings["variants"][results["study"]["base"]]["decode"])


def _context(results: Results) -> int:
    """The longest context that a cache is told of."""
    return max(row["context"] for row in results["variants"][results["study"]["base"]]["cache"])


def _least(variant: Any) -> int:
    return min(row["batch"] for row in variant["cache"])


def _size(n_bytes: float) -> str:
    return f"{n_bytes / 2**20:,.2f} MiB" if n_bytes >= 2**20 else f"{n_bytes / 2**10:,.1f} KiB"
