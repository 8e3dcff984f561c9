"""What papers claim, and what was obtained here."""

from __future__ import annotations

from gptlab.report.blocks import Column, Paragraph, Section, Table, literal
from gptlab.report.view import Study

VERDICTS = {True: "holds", False: "does not hold", None: "undecided"}


def claim_words(study: Study) -> str:
    """Return how many claims hold, in words."""
    held, failed, open_ = (sum(one.holds is verdict for one in study.claims) for verdict in VERDICTS)
    n = len(study.claims)
    holds, does = "holds" if held == 1 else "hold", "does" if failed == 1 else "do"
    undecided = f"{open_} {'is' if open_ == 1 else 'are'} undecided"
    return f"Of {n} claim{'s' * (n > 1)} from papers, {held} {holds} at this scale, {failed} {does} not, {undecided}"


def claims(study: Study) -> Section:
    """Return the table of claims."""
    if not study.claims:
        return Section("claims", "Claims of the papers", [])
    rows = [
        [*map(literal, (one.paper, one.claim, one.ours)), f"**{VERDICTS[one.holds]}**", literal(one.note)]
        for one in study.claims
    ]
    columns = [Column(title, "text") for title in ("paper", "claim", "obtained here", "verdict", "note")]
    table = Table("Claims", study.setting, columns, rows)
    return Section("claims", "Claims of the papers", [Paragraph(f"{claim_words(study)}."), table])
