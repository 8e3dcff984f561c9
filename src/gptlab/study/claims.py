"""The verdicts on the claims of a study: those of papers, and its own.

All claims about losses are one family, stated in the study's file before anything is trained. A claim holds, or does
not, when the p-value of what was obtained is below 5% after Holm's correction over the family. In every other case the
study cannot tell: more seeds or longer training might.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from gptlab.errors import GptlabError, nearest
from gptlab.evaluation.compare import COVERAGE
from gptlab.study.findings import NOTHING, Finding, Test, over, said
from gptlab.study.papers import CLAIMS
from gptlab.study.results import Claim, Results, Timings
from gptlab.study.statistics import Scored, Weights, at, at_age, contrast, factorial
from gptlab.study.student import holm

if TYPE_CHECKING:
    from gptlab.study.settings import ClaimSettings

TRIGRAM = "trigram"
"""What claims call the count model of equal tokens."""


def claims_of_results(
    papers: Sequence[str], own: Sequence[ClaimSettings], results: Results, scored: Scored
) -> list[Claim]:
    """Return the verdicts on all claims about losses: those of papers, by name, and the study's own."""
    made: list[tuple[str, str, float | None, Finding]] = []
    for rule in (CLAIMS[name] for name in papers):
        if rule.judge is not None:
            found = _absent(rule.variants, results) or rule.judge(results, scored)
            made.append((rule.paper, rule.claim, None, found))
    factors = {name: variant.factors for name, variant in results.variants.items()}
    for claim in own:
        absent = _absent([name for name in claim.of or () if name != TRIGRAM], results)
        made.append(("", claim.claim, claim.margin or None, absent or _own(claim, factors, scored)))
    # What was not obtained stays a member of the family that was stated: it counts as 1.
    values = [1.0 if found.p is None else found.p for *_, found in made]
    return [_verdict(*one, adjusted) for one, adjusted in zip(made, holm(values), strict=True)]


def claims_of_timings(names: Sequence[str], results: Results, timings: Timings) -> list[Claim]:
    """Return the verdicts on those of the papers' claims that a clock decides."""
    claims = []
    for rule in (CLAIMS[name] for name in names):
        if rule.clock is not None:
            absent = _absent(rule.variants, results)
            ours, holds, note = rule.clock(timings) if absent is None else (absent.ours, None, absent.note)
            claims.append(Claim(paper=rule.paper, claim=rule.claim, ours=ours, holds=holds, note=note))
    return claims


def check_claims(own: Sequence[ClaimSettings], factors: Mapping[str, Sequence[str]]) -> None:
    """Refuse claims about variants or effects that a study does not have.

    Args:
        own: the study's.
        factors: of each variant, by its name.

    Raises:
        GptlabError: with the nearest right name.
    """
    contrasts = factorial(factors)
    terms = [*contrasts[0], *contrasts[1]] if contrasts else []
    for claim in own:
        if claim.effect is not None and not terms:
            raise GptlabError(
                f"the claim {claim.claim!r} is about the effect {claim.effect!r}, but the variants are no full"
                " factorial; state what it is of, or add a [grid]"
            )
        known = [*factors, TRIGRAM] if claim.effect is None else terms
        for name in claim.of or [claim.effect or ""]:
            if name not in known:
                raise GptlabError(
                    f"the claim {claim.claim!r} is about {name!r}{nearest(name, known)}; there are {', '.join(known)}"
                )


def _absent(needed: Sequence[str], results: Results) -> Finding | None:
    absent = [name for name in needed if name not in results.variants]
    return Finding("not obtained", (), f"not trained: {', '.join(absent)}") if absent else None


def _own(claim: ClaimSettings, factors: Mapping[str, Sequence[str]], scored: Scored) -> Finding:
    weights: Weights = claim.of or {}
    if claim.effect is not None:
        contrasts = factorial(factors)
        if contrasts is None:  # some variants were left out
            return NOTHING
        weights = (contrasts[0] | contrasts[1])[claim.effect]
    if claim.tokens is not None:
        weights = {at_age(name, claim.tokens): weight for name, weight in weights.items()}
    elif claim.share is not None:
        weights = {at(name, claim.share): weight for name, weight in weights.items()}
    estimate = contrast(weights, scored)
    if estimate is None:
        return NOTHING
    margin = claim.margin
    expected = {
        "lower": f"below {-margin:g}" if margin else "below 0",
        "higher": f"above {margin:g}",
        "equal": f"within {margin:g} of 0",
        "not higher": f"below {margin:g}",
    }[claim.expect]
    note = f"expected {expected}; {over(estimate.interval)}"
    return Finding(said(estimate.interval), (Test(estimate, claim.expect, margin),), note)


def _verdict(paper: str, claim: str, margin: float | None, found: Finding, adjusted: float) -> Claim:
    p = found.p
    sure = p is not None and adjusted < 1 - COVERAGE
    return Claim(
        paper=paper,
        claim=claim,
        ours=found.ours,
        holds=found.agrees if sure else None,
        note=found.note,
        margin=margin,
        interval=found.tests[0].estimate.interval if len(found.tests) == 1 else None,
        p=p,
        adjusted=None if p is None else adjusted,
    )
