"""What the kept studies measured of GPT-2 and of each change, for the subject pages and docs/results.md."""

from __future__ import annotations

from typing import Any

from gptlab import roofline
from gptlab.config import ModelConfig
from gptlab.formatting import count, memory, millions
from gptlab.model import cost
from gptlab.report.ages import term_of
from gptlab.report.blocks import ends, nats, span
from gptlab.report.summary import speed_up, variants_table
from gptlab.report.view import Study, tokens
from gptlab.study.results import Results

BUILT_IN = {"rope": "pocket-rope", "gqa": "pocket-gqa", "swa": "pocket-swa"}


def small_models(study: Study) -> str:
    """Return Markdown: the table of variants of a study."""
    table = variants_table(study, "", list(study.variants), {name: study.label(name) for name in study.variants})
    return f"{table.markdown}\n\n{table.note} {study.setting}."


def ladder(results: Results) -> str:
    """Return Markdown: one change after the other, and what was claimed of each step before it was trained.

    Args:
        results: of a study whose claims are its steps, in the order of its variants.
    """
    rows = [
        "| | parameters | loss | the step adds | 95% interval | claimed beforehand | |",
        "|---|---:|---:|---:|---|---|---|",
    ]
    for variant, claim in zip(results.variants.values(), [None, *results.claims], strict=True):
        assert variant.quality is not None
        cells = [variant.label, count(variant.parameters["total"]), f"{variant.quality.nats_per_token:.3f}"]
        if claim is not None and claim.interval is not None:
            verdict = {True: "holds", False: "does not hold", None: "not decided"}[claim.holds]
            cells += [nats(claim.interval), span(claim.interval), claim.claim, verdict]
        else:
            cells += ["", "", "", ""]
        rows.append(f"| {' | '.join(cells)} |")
    rows += [f"| {one.label} | | {one.quality.nats_per_token:.3f} | | | | |" for one in results.baselines]
    quality = results.variants[results.study.base].quality
    assert quality is not None
    rows.append(
        f"\nNats per token on {quality.tokens:,} tokens of {quality.documents} documents of {quality.text};"
        f" {millions(results.study.tokens)} tokens trained, seeds {' and '.join(map(str, results.study.seeds))}, one"
        " learning rate for all. Intervals: over seeds, with the residual variance of all variants pooled,"
        " uncorrected; verdicts by p-values corrected for the number of claims, where 'nothing' is less than 0.02."
        " [All of it](appendix/modern.md)."
    )
    return "\n".join(rows)


def predicted(study: Study) -> str:
    """Return Markdown: the share of the predicted limit that decoding one sequence reaches, by variant and context."""
    machine = study.machine
    assert machine is not None
    at = {
        name: {point.context: point.milliseconds for point in timed.decode if point.batch == 1}
        for name in study.configs
        if (timed := study.timed(name))
    }
    contexts = sorted({context for row in at.values() for context in row})
    rows = [f"| | {' | '.join(f'{context:,}' for context in contexts)} |", "|---|" + "---:|" * len(contexts)]
    for name, row in at.items():
        cells = []
        for context in contexts:
            step = roofline.predict(study.configs[name], machine, context=context, batch=1, dtype=study.dtype)
            cells.append(f"{1e5 * step.seconds / row[context]:.0f}%" if context in row else "")
        rows.append(f"| {study.label(name)} | {' | '.join(cells)} |")
    rows.append(
        f"\nShare of the predicted limit that a step reaches, one sequence, by tokens of context; {study.dtype},"
        f" {study.model_words}, {study.machine_words}; memory read at {machine.bandwidth / 1e9:.1f} GB/s in that run."
    )
    return "\n".join(rows)


def ages(study: Study) -> str:
    """Return Markdown: losses, effects and recall of the variants of a study, by age."""
    results = study.results
    n_seeds = [len(age.quality[study.base_name].by_run) for age in results.ages]
    heads = [
        f"{millions(age.tokens)} tokens, {n} seed{'s' * (n > 1)}" for age, n in zip(results.ages, n_seeds, strict=True)
    ]
    rows = [f"| | {' | '.join(heads)} |", "|---|" + "---:|" * len(heads)]
    for name in study.variants:
        losses = (f"{age.quality[name].nats_per_token:.3f}" for age in results.ages)
        rows.append(f"| {study.label(name)} | {' | '.join(losses)} |")
    counted = (f"{age.baseline.quality.nats_per_token:.3f}" if age.baseline else "" for age in results.ages)
    rows.append(f"| trigram of equal tokens | {' | '.join(counted)} |")
    effects = [age.effects.main | age.effects.interactions if age.effects else {} for age in results.ages]
    for term in effects[0]:
        cells = (f"{nats(of_age[term])} [{span(of_age[term])}]" for of_age in effects)
        rows.append(f"| *{term_of(term)}* | {' | '.join(cells)} |")
    heads_found = (max(one.best_head_score for one in age.induction.values()) for age in results.ages)
    rows.append(f"| best induction score | {' | '.join(f'{score:.3f}' for score in heads_found)} |")
    copies = [
        max((copy.accuracy, copy.distance) for row in age.copying.values() for copy in row) for age in results.ages
    ]
    rows.append(f"| most copied at any distance | {' | '.join(f'{100 * share:.0f}%' for share, _ in copies)} |")
    quality = study.variants[study.base_name].quality
    assert quality is not None
    rows.append(
        f"\nNats per token on {quality.tokens:,} tokens of {quality.documents} whole documents of {study.text}, for the"
        f" test alone; {study.model_words}. In italics: effects, averaged over the other change, and what both do"
        " together beyond the sum; 95% intervals with the residual variance of all variants, over documents where one"
        f" seed was trained. Each age is the end of a run of its own, with a decay of its rate. Chance for an"
        f" induction score: {_chance(study):.3f}. [All of it](appendix/{results.study.name}.md)."
    )
    return "\n".join(rows)


def _chance(study: Study) -> float:
    """What a head that spreads its attention evenly has for an induction score."""
    induction = study.variants[study.base_name].induction
    assert induction is not None
    period = induction.period
    # Of a query at place period + i, 0 <= i < period - 1, with period + i + 1 keys in sight.
    return sum(1 / (period + i + 1) for i in range(period)) / period


def rates(study: Study) -> str:
    """Return Markdown: the loss of every variant at every learning rate that was tried."""
    searches = study.results.rates
    tried = sorted({one.learning_rate for row in searches.values() for one in row})
    rows = [f"| | {' | '.join(f'{rate:g}' for rate in tried)} |", "|---|" + "---:|" * len(tried)]
    for name, row in searches.items():
        losses = {one.learning_rate: one.nats_per_token for one in row if one.nats_per_token is not None}
        best = min(losses, key=losses.__getitem__)
        cells = (f"**{losses[r]:.3f}**" if r == best else f"{losses[r]:.3f}" if r in losses else "" for r in tried)
        label = study.variants[row[0].variant].label.rpartition(",")[0]
        rows.append(f"| {label or name} | {' | '.join(cells)} |")
    quality = next(v.quality for v in study.variants.values() if v.quality is not None)
    rows.append(
        f"\nNats per token on {quality.tokens:,} tokens of {quality.documents} documents of {study.text}, none of which"
        f" a study reports on; {study.trained_words}; the best in bold."
        f" [All of it](appendix/{study.results.study.name}.md)."
    )
    return "\n".join(rows)


def measured(change: str, study: Study, cards: dict[str, dict[str, Any]]) -> str:
    """Return what a change alone did to loss, cache, speed and recall, in one line.

    Args:
        change: ``rope``, ``gqa`` or ``swa``.
        study: one that makes the change alone.
        cards: of the built-in models, by name.
    """
    name, context = study.alone(change)[0], study.contexts[-1]
    gap = study.variants[name].difference
    own, before = (study.cache(one, context) or 0 for one in (name, study.base_name))
    cache = f"{memory(own)}, as without it" if own == before else f"{memory(own)} in place of {memory(before)}"
    parts = [
        f"{study.made(name)}, in a model of {millions(study.base.parameters['total'])} parameters"
        f" ({study.trained_words}, one learning rate for all variants): loss {nats(gap) if gap else 'not measured'}"
        f" nats per token{f' ({span(gap)})' if gap and ends(gap) else ''}; cache of {tokens(context)} {cache}"
    ]
    if point := study.common_point("decode"):
        times = speed_up(study, name, point)
        tie = ", a tie" if times.startswith("(") else ""
        parts.append(f"decoding {times.strip('()')} the speed{tie} ({tokens(point[0])}, batch {point[1]})")
    parts.append(f"recall: {_recall(study, name)} (without it: {_recall(study, study.base_name)})")
    plain, changed = cards["pocket"], cards[BUILT_IN[change]]
    parts.append(
        f"`{changed['name']}` after {millions(changed['tokens_trained'])} tokens of Wikipedia, one seed:"
        f" {changed['nats_per_token']:.3f} where `pocket` has {plain['nats_per_token']:.3f}"
    )
    return "; ".join(parts) + ". Intervals: 95%. [All of it](appendix/standard.md)."


def _recall(study: Study, name: str) -> str:
    """What a variant copies, and how far its best head is one for induction."""
    variant = study.variants[name]
    copied = max((one.accuracy for one in variant.copying), default=0)
    score = variant.induction.best_head_score if variant.induction else 0
    return f"{100 * copied:.0f}% of a random string copied, best induction score {score:.3f}"


def gpt2_sizes(study: Study, real: Study, cards: dict[str, dict[str, Any]]) -> str:
    """Return Markdown: the four published sizes as counted, and what trained models without a change can do."""
    rows = ["| | parameters | weights, bfloat16 | cache per token | cache, 1,024 tokens | arithmetic per token |"]
    rows.append("|---|---:|---:|---:|---:|---:|")
    for size in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"):
        config = ModelConfig.preset(size)
        total = sum(cost.parameters(config).values())
        cells = [count(total), memory(2 * total), memory(cost.cache_bytes_per_token(config, 2))]
        cells += [memory(cost.cache_bytes(config, 1024, 2))]
        cells.append(f"{cost.forward_flops(config, 1024).total / 1024 / 1e6:,.0f} MFLOP")
        rows.append(f"| `{size}` | {' | '.join(cells)} |")
    plain = cards["pocket"]
    rows.append(
        "\nCounted from the configuration: cache in bfloat16, arithmetic of a forward pass over 1,024 tokens. Measured:"
        f" {study.model_words} after {study.trained_words} has {study.loss(study.base_name):.3f} nats per token on"
        f" {study.text}; {_recall(study, study.base_name)}. `pocket`, {millions(plain['tokens_trained'])} tokens of"
        f" Wikipedia: {plain['nats_per_token']:.3f}. {real.label(real.base_name)}, trained for long, with another"
        f" tokenizer: {_recall(real, real.base_name)}."
    )
    return "\n".join(rows)
