"""What papers claim, and what was obtained here."""

from __future__ import annotations

from gptlab.report.blocks import Column, Section, Table, literal
from gptlab.report.view import Study

VERDICTS = {True: "holds", False: "does not hold", None: "undecided"}


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
    return Section("claims", "Claims of the papers", [table])
