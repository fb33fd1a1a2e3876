"""The tables of one record: its facts, and a line per target."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table

from blocksight.jobs.cli.tables import facts_table
from blocksight.jobs.plan.text import printable
from blocksight.jobs.report.products import products_of, said_of

FIGURES = ("score", "rank", "Drop", "grew", "forwards", "fidelity", "map bytes")
"""Columns of a target after its name."""


def record_table(rows: Sequence[Mapping[str, Any]]) -> RenderableType:
    """One record's rows: its facts, a line per target, and a line for each side product.

    Raises UnreconciledError if a side product is damaged.
    """
    first = rows[0]
    table = Table(title=printable(first["key"]), title_justify="left", title_style="bold")
    for name in ("target", *FIGURES):
        table.add_column(name)
    for row in rows:
        if row["map"] is not None:
            table.add_row(*target_cells(row))
    if first["map"] is None:
        return facts_table([(f"rejected ({first['reject_code']})", printable(first["error"]))], printable(first["key"]))
    return Group(table, *_beside_maps([row for row in rows if row["map"] is not None]))


def _beside_maps(rows: Sequence[Mapping[str, Any]]) -> Iterator[Table]:
    """The side products, by target if there are several."""
    for row in rows:
        found = [(name, printable(text)) for name, text in said_of(products_of(row))]
        if found:
            yield facts_table(found, printable(row["target_name"]) if len(rows) > 1 else None)


def target_cells(row: Mapping[str, Any]) -> list[str]:
    """The target's name, and its values of FIGURES."""
    drop, increase = row["metrics"]["drop"], row["metrics"]["increase"]
    return [
        printable(row["target_name"]),
        f"{row['score']:.3f}",
        str(row["target_rank"]),
        "map is flat" if drop is None else f"{drop:.1f} %",
        "-" if increase is None else "yes" if increase else "no",
        f"{row['num_forwards']:,}",
        "-" if row["fidelity"] is None else f"{row['fidelity']}: {row['fidelity_reason']}",
        f"{len(row['map']):,}",
    ]
