"""The tables that `blocksight audit` prints."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType

from blocksight.jobs.cli.tables import facts_table, grid_table
from blocksight.jobs.plan.text import counted, printable

if TYPE_CHECKING:
    from blocksight.jobs.audit.result import Audit, Shortcut  # which needs pyarrow

SHOWN = 10
"""Entries of a long list that are printed; the files hold all."""


def audit_table(audit: "Audit", place: str) -> RenderableType:
    """The result of an audit: counts, gates, findings, suspicions and oddities."""
    right = "" if audit.num_right is None else f", {audit.num_right:,} of them right predictions"
    gates = ", ".join(f"{count:,} {name}" for name, count in audit.gates.items() if count)
    split = {cluster.target_name for cluster in audit.clusters}
    whole = "classes" if all(cluster.target_index is not None for cluster in audit.clusters) else "targets"
    rows = [
        ("maps", f"{audit.num_maps:,} of {counted(audit.num_rows, 'row')}{right}"),
        ("flat maps", f"{audit.gates.get('flat', 0) or 'none'} of {counted(audit.num_maps, 'map')}"),
        ("maps of no use", gates or "none"),
        (
            "clusters",
            f"{len(audit.clusters)} in {len(split)} of the {whole}" if split else "none",
        ),
        ("findings", f"{len(audit.findings)}" if audit.findings else "none"),
        ("suspicions", f"{len(audit.suspicions)}" if audit.suspicions else "none"),
        ("tested, not confirmed", f"{len(audit.not_confirmed)}" if audit.not_confirmed else "none"),
        *(("note", printable(note)) for note in audit.notes),
        ("files", printable(place)),
    ]
    odd = [[one.key, one.target_name, one.label or "-", one.reason, one.detail] for one in audit.oddities[:SHOWN]]
    shown: list[RenderableType] = [facts_table(rows, "audit")]
    for name, shortcuts in (("FINDING", audit.findings), ("suspicion", audit.suspicions)):
        shown += [_shortcut_lines(name, one) for one in shortcuts[:SHOWN]]
    if audit.not_confirmed:
        shown.append(_not_confirmed_line(audit.not_confirmed))
    if odd:
        shown.append(grid_table(["odd", "explained class", "label", "why", ""], odd))
    return Group(*shown)


def _not_confirmed_line(shortcuts: Sequence["Shortcut"]) -> str:
    """One line for all regions whose trial showed no effect: they are no reason to look."""
    names = list(dict.fromkeys(one.target_name for one in shortcuts))
    more = f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else ""
    regions = counted(len(shortcuts), "region")
    return (
        f"tested, not confirmed: {regions} of {printable(', '.join(names[:SHOWN]))}{more}; "
        "audit.json has the figures, the report the pictures"
    )


def _shortcut_lines(name: str, one: "Shortcut") -> str:
    from blocksight.jobs.audit.words import scope  # which needs pyarrow

    left, top, right, bottom = (f"{100 * edge:.0f}" for edge in one.box)
    where = f"the region {left}-{right} % from the left, {top}-{bottom} % from the top"
    bounds = scope(one) if one.is_confirmed else None
    return (
        f"[bold]{name}[/bold]: {printable(one.target_name)} looks at {where} in {one.share:.0%} of its maps: "
        f"{printable(one.why)} (such as {printable(one.members[0])})" + (f"\n  {printable(bounds)}" if bounds else "")
    )
