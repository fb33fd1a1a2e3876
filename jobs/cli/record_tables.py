"""The tables of one record, its facts and a line per target, and of the regions of all."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.table import Table

from blocksight.engine.catalog.readouts import ReadoutName
from blocksight.jobs.cli.tables import facts_table
from blocksight.jobs.plan.preflight import is_class_score, score_name, target_score_text
from blocksight.jobs.plan.text import counted, printable
from blocksight.jobs.report.products import products_of, said_of

if TYPE_CHECKING:
    from blocksight.jobs.export.regions import FoundRegions

FIGURES = ("rank", "with the top 15 %", "model runs", "masks scored", "stored map")
"""Columns of a target after its name and score."""
MEANINGS = {
    "probability": "how sure the model is of this class",
    "score": "the model's output for this class, or a sum of outputs: as it is, and no probability unless in percent",
    "rank": "place of this class among all; 1 is the model's prediction",
    "with the top 15 %": "what becomes of the score if only the 15 % of the picture that matter most to the map stay "
    "visible; the less it falls, the better the map",
    "model runs": "how often the model looked at a masked copy of the picture to make the map",
}
"""What columns mean, for readers who see them for the first time."""
SHARES = {"full": "all", "balanced": "a tenth", "preview": "none"}
"""Masks that a fidelity scores."""


def record_table(rows: Sequence[Mapping[str, Any]], readout: ReadoutName) -> RenderableType:
    """One record's rows: its facts, a line per target, and a line for each side product.

    `readout`: how the output's scores were read.
    Raises UnreconciledError if a side product is damaged.
    """
    first = rows[0]
    table = Table(title=printable(first["key"]), title_justify="left", title_style="bold", pad_edge=False)
    are_classes = all(is_class_score(row) for row in rows if row["map"] is not None)
    columns = (score_name(readout if are_classes else "identity"), *FIGURES)
    for name in ("target", *columns):
        table.add_column(name, no_wrap=name in ("probability", "rank"))  # one word would be cut
    for row in rows:
        if row["map"] is not None:
            table.add_row(*target_cells(row, readout))
    if first["map"] is None:
        return facts_table([(f"rejected ({first['reject_code']})", printable(first["error"]))], printable(first["key"]))
    return Group(table, meanings(columns), *_beside_maps([row for row in rows if row["map"] is not None]))


def meanings(columns: Sequence[str]) -> Table:
    """What the columns of a table mean, those that have a line in `MEANINGS`."""
    return facts_table([(name, MEANINGS[name]) for name in columns if name in MEANINGS])


def _beside_maps(rows: Sequence[Mapping[str, Any]]) -> Iterator[Table]:
    """The side products, by target if there are several."""
    for row in rows:
        found = [(name, printable(text)) for name, text in said_of(products_of(row))]
        if found:
            yield facts_table(found, printable(row["target_name"]) if len(rows) > 1 else None)


def target_cells(row: Mapping[str, Any], readout: ReadoutName) -> list[str]:
    """The target's name and score, and its values of FIGURES."""
    return [
        printable(row["target_name"]),
        target_score_text(row, readout),
        "-" if row["target_rank"] is None else str(row["target_rank"]),
        kept_text(row),
        f"{row['num_forwards']:,}",
        "-" if row["fidelity"] is None else _masks_text(row["fidelity"], row["fidelity_reason"]),
        counted(len(row["map"]), "byte"),
    ]


def kept_text(row: Mapping[str, Any]) -> str:
    """What becomes of the score if only the map's top 15 % stay: `rises`, or `falls by 12.3 %`."""
    if row["metrics"] is None or row["metrics"]["drop"] is None:
        return "not defined: the map is flat" if row["is_flat"] else _without_drop(row)
    return "rises" if row["metrics"]["increase"] else f"falls by {row['metrics']['drop']:.1f} %"


def _without_drop(row: Mapping[str, Any]) -> str:
    """What is known where the score is negative, so that no share of it can be lost."""
    grew = None if row["metrics"] is None else row["metrics"]["increase"]
    return "not defined" if grew is None else "rises" if grew else "falls"


def _masks_text(fidelity: str, reason: str | None) -> str:
    """`all`, or `a tenth: sound` where the job chose."""
    share = SHARES.get(fidelity, fidelity)
    return share if reason in (None, "as asked") else f"{share}: {reason}"


def regions_table(found: "FoundRegions", output: str) -> Table:
    """What `regions` found, and where it is."""
    counts = found.counts
    without = ", ".join(f"{number:,} {reason}" for reason, number in sorted(counts.reasons.items())) or "none"
    there = f", {counts.kept:,} were there" if counts.kept else ""
    return facts_table(
        [
            ("regions", printable(found.rule)),
            ("maps", f"{counts.maps:,} of {counted(counts.records, 'record')}"),
            ("parts", f"{counts.parts:,} in {counted(counts.with_regions, 'map')}"),
            ("without a part", without),
            ("tables", f"{printable(output)}/{found.folder}data/ ({counted(counts.made, 'fragment')} written{there})"),
            ("COCO", ", ".join(f"{printable(output)}/{key}" for key in found.coco)),
        ]
    )
