"""The tables that `blocksight audit` prints."""

from typing import TYPE_CHECKING

from rich.console import Group, RenderableType

from blocksight.jobs.cli.tables import facts_table, grid_table
from blocksight.jobs.plan.text import printable

if TYPE_CHECKING:
    from blocksight.jobs.audit.result import Audit, Shortcut  # which needs pyarrow

SHOWN = 10
"""Entries of a long list that are printed; the files hold all."""


def audit_table(audit: "Audit", place: str) -> RenderableType:
    """The result of an audit: counts, gates, findings, suspicions and oddities."""
    right = "" if audit.num_right is None else f", {audit.num_right:,} of them right predictions"
    gates = ", ".join(f"{count:,} {name}" for name, count in audit.gates.items() if count)
    split = {cluster.target_name for cluster in audit.clusters}
    rows = [
        ("maps", f"{audit.num_maps:,} of {audit.num_rows:,} rows{right}"),
        ("of no use", gates or "none: no gate stops a map"),
        (
            "clusters",
            f"{len(audit.clusters)} in {len(split)} of the classes" if split else "none",
        ),
        ("findings", f"{len(audit.findings)}" if audit.findings else "none"),
        ("suspicions", f"{len(audit.suspicions)}" if audit.suspicions else "none"),
        *(("note", printable(note)) for note in audit.notes),
        ("files", printable(place)),
    ]
    odd = [[one.key, one.target_name, one.label or "-", one.reason, one.detail] for one in audit.oddities[:SHOWN]]
    shown: list[RenderableType] = [facts_table(rows, "audit")]
    for name, shortcuts in (("FINDING", audit.findings), ("suspicion", audit.suspicions)):
        shown += [_shortcut_lines(name, one) for one in shortcuts[:SHOWN]]
    if odd:
        shown.append(grid_table(["odd", "explained class", "label", "why", ""], odd))
    return Group(*shown)


def _shortcut_lines(name: str, one: "Shortcut") -> str:
    left, top, right, bottom = (f"{100 * edge:.0f}" for edge in one.box)
    where = f"the region {left}-{right} % from the left, {top}-{bottom} % from the top"
    return (
        f"[bold]{name}[/bold]: {printable(one.target_name)} looks at {where} in {one.share:.0%} of its maps: "
        f"{printable(one.why)} (such as {printable(one.members[0])})"
    )
