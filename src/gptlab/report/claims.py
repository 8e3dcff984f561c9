"""What papers and the study itself claim, and what was obtained here."""

from __future__ import annotations

from gptlab.report.blocks import Column, Section, Table, literal, probability
from gptlab.report.view import Study

VERDICTS = {True: "holds", False: "does not hold", None: "undecided"}


def claims(study: Study) -> Section:
    """Return the table of claims."""
    rows, tested = [], any(one.p is not None for one in study.claims)
    for one in study.claims:
        row = [literal(one.paper or "this study"), literal(one.claim), literal(one.ours), f"**{VERDICTS[one.holds]}**"]
        rows.append([*row, *[probability(one.p), probability(one.adjusted)] * tested, literal(one.note)])
    if not rows:
        return Section("claims", "Claims", [])
    columns = [Column(title, "text") for title in ("by", "claim", "obtained here", "verdict")]
    columns += [Column("p"), Column("p, corrected")] * tested
    note = "Corrected: by Holm's method over all claims of the study about losses." if tested else ""
    table = Table("", study.setting, [*columns, Column("note", "text")], rows, note)
    return Section("claims", "Claims", [table])
