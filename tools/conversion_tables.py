"""What conversions lose and what training brings back, in docs/conversion.md and the README, from the kept studies."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from gptlab.formatting import signed
from gptlab.model.cost import cache_bytes
from gptlab.report.blocks import identical, in_noise, nats
from gptlab.study.results import Checkpoint, Conversion, Interval, Results

STUDIES = ("convert", "convert-8m")
"""In the order of the columns; those without results are left out."""
METHODS = ("svd", "procrustes", "mean", "first", "random")
ALL = "all three: 2 key heads, RoPE, fit, window 128"
DIGEST = (
    *("half of the key heads, svd", "half of the key heads, mean", "2 key heads, svd", "2 key heads, mean"),
    *("1 key head, svd", "1 key head, mean", "RoPE, fit", "RoPE, abrupt", "window 128", "window 128, 4 sinks"),
    *(ALL, f"{ALL}, distilled, attention faster"),
)
"""The rows that docs/conversion_results.md shows."""


def table(studies: Mapping[str, Results], only: Collection[str] = ()) -> str:
    """Return Markdown.

    Args:
        studies: the results of `STUDIES`, by name; empty gives an empty text.
        only: titles of the rows to show, then with intervals; all without, where none are named.
    """
    if not studies:
        return ""
    columns = [name for name in STUDIES if name in studies]
    last = max(c.share for name in columns for one in converted(studies[name]).values() for c in one.checkpoints)
    heads = [f"{_base(studies[name])}, {when}" for name in columns for when in ("0%", f"{100 * last:g}%")]
    rows = [f"| | {' | '.join(heads)} |", "|---|" + "---:|" * len(heads)]
    for title, names in _rows(studies).items():
        if only and title not in only:
            continue
        cells = []
        for study in columns:
            about = converted(studies[study]).get(names.get(study, ""))
            by_share = {c.share: c for c in about.checkpoints} if about else {}
            cells += [_cell(by_share.get(share), bool(only)) for share in (0.0, last)]
        rows.append(f"| {title} | {' | '.join(cells)} |")
    of = (f"{_base(studies[name])} {_pretraining(studies[name]) / 1e6:.1f} million" for name in columns)
    rows.append(
        "\nLoss in nats per token on held-out text, less that of the base; after continued training, less"
        f" that of the base after the same training: {100 * last:g}% of its pre-training ({', '.join(of)})."
        " 0% is right after the conversion; variants without a second figure were not uptrained. In brackets: within"
        " noise, the 95% interval of the difference, over documents, includes 0. One seed."
    )
    return "\n".join(rows)


def headline(results: Results, name: str = "all-fit-distilled-faster") -> str:
    """Return what all three changes at once cost, in a few sentences.

    Args:
        results: of the study ``convert``.
        name: the variant to speak of.
    """
    base, variant = results.variants[results.study.base], results.variants[name]
    about = converted(results)[name]
    before, after = base.config, variant.config
    sizes = [cache_bytes(config, before.context_length, 2) / 2**20 for config in (before, after)]
    first, last = (about.checkpoints[i] for i in (0, -1))
    how = ", with the original as teacher" if any(setting.startswith("distill.") for setting in about.settings) else ""
    return (
        f"A trained model converted: `{base.label}` with {after.kv_heads} of its {before.kv_heads} key heads, rotary"
        f" positions and a window of {after.windows[0]} needs {sizes[1]:.2f} MiB of cache for {before.context_length}"
        f" tokens in place of {sizes[0]:.2f}. Loss added, in nats per token: {_with_interval(first.difference)} right"
        f" after the conversion; {_untouched(results, name)} after continued training for {100 * last.share:g}% of its"
        f" pre-training{how}; {_with_interval(last.difference)} against the original after as many tokens of"
        " continued training at one rate. 95% intervals over 57 pieces of 16 articles, one seed"
        " ([results](docs/conversion_results.md))."
    )


def _with_interval(gap: Interval | None) -> str:
    if gap is None or gap.low is None or gap.high is None:
        return "not measured" if gap is None else signed(gap.mean)
    noise = ", within noise" if in_noise(gap) else ""
    return f"{signed(gap.mean)} ({signed(gap.low)} to {signed(gap.high)}{noise})"


def _untouched(results: Results, name: str) -> str:
    """The final loss less that of the base as it was, and a bound: two upper ends added hold at 95% at least."""
    variant, base = results.variants[name], results.variants[results.study.base]
    assert variant.quality is not None
    assert base.quality is not None
    reference = results.variants[variant.reference or results.study.base]
    highs = [gap.high for one in (variant, reference) if (gap := one.difference) and gap.high is not None]
    bound = f" (at most {nats(sum(highs))})" if len(highs) == 2 else ""
    return f"{nats(variant.quality.nats_per_token - base.quality.nats_per_token)}{bound}"


def converted(results: Results) -> dict[str, Conversion]:
    """Return what is known of the conversions of a study, by variant; those that failed are left out."""
    variants = {name: variant.conversion for name, variant in results.variants.items()}
    return {name: about for name, about in variants.items() if about and about.checkpoints}


def _pretraining(results: Results) -> int:
    """The tokens that the base was trained on."""
    about = results.study.conversion
    return (about and about.pretraining_tokens) or 0


def _base(results: Results) -> str:
    return results.variants[results.study.base].label


def _rows(studies: Mapping[str, Results]) -> dict[str, dict[str, str]]:
    """Titles of the rows, with the variant of each study that belongs there."""
    rows: dict[str, dict[str, str]] = {}
    for study, results in studies.items():
        n_head = results.variants[results.study.base].config.n_head
        for name, about in converted(results).items():
            if about.changes:
                rows.setdefault(_title(about, n_head), {})[study] = name
    order = {title: i for i, title in enumerate(rows)}
    return dict(sorted(rows.items(), key=lambda row: (_rank(row[0]), order[row[0]])))


def _title(about: Conversion, n_head: int) -> str:
    """What a conversion is called, so that like ones of models of different sizes have one name."""
    changes, taught = about.changes, any(s.startswith("distill.") for s in about.settings)
    faster = any(s.startswith("optimizer.attention_factor") for s in about.settings)
    words = []
    if "n_kv_head" in changes:
        shared = changes["n_kv_head"]
        number = "half of the key heads" if 2 * shared == n_head else f"{shared} key head{'s' * (shared > 1)}"
        words.append(number)
    if "position" in changes:
        blend = changes["position"] == "blend"
        how = changes.get("rotary", "gauge" if blend else "fit")
        words.append("RoPE, " + ("blend" if blend and how == "abrupt" else f"{how} and blend" if blend else how))
    if "window" in changes:
        words.append(f"window {changes['window']}" + (f", {changes['sinks']} sinks" if changes.get("sinks") else ""))
    if "context_length" in changes:
        words.append(f"context {changes['context_length']:,}, {changes.get('extension', 'copy')}")
    if len(words) == 1 and "method" in changes:
        words.append(changes["method"])
    words = ["all three: " + ", ".join(words)] if len(words) > 2 else words
    return ", ".join([*words, *["distilled"] * taught, *["attention faster"] * faster])


def _rank(title: str) -> tuple[int, int]:
    kinds = ("half of", "2 key", "1 key", "RoPE", "window", "context", "all three")
    kind = next((i for i, start in enumerate(kinds) if title.startswith(start)), len(kinds))
    method = next((i for i, name in enumerate(METHODS) if title.endswith(name)), 0)
    return kind, method


def _cell(checkpoint: Checkpoint | None, interval: bool) -> str:
    if checkpoint is None or checkpoint.difference is None:
        return ""
    gap = checkpoint.difference
    if identical(gap):
        return "identical"
    text = f"({signed(gap.mean)})" if in_noise(gap) else signed(gap.mean)
    shown = interval and gap.low is not None and gap.high is not None
    return f"{text} [{signed(gap.low or 0)}, {signed(gap.high or 0)}]" if shown else text
