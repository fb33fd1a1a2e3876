"""What a comparison says in sentences: on how many metrics each method beats the controls, and where one beats it."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from blocksight.engine.catalog.entries import CONTROLS, METRICS
from blocksight.jobs.plan.text import counted

if TYPE_CHECKING:
    from blocksight.jobs.evaluate.compare import Cell, Column, Comparison  # which needs scipy

NO_CONTROLS = (
    "no control was measured: `blocksight evaluate OUTPUT --controls` tells whether a method beats a random map"
)

CERTAIN = 0.05
"""Largest corrected p-value of a difference that is no chance."""

Cells = Mapping[tuple[int, "Column"], "Cell"]


def verdicts(table: "Comparison") -> tuple[str, ...]:
    """A verdict for each method by its means, and a sentence for each metric on which a control is better."""
    controls = [place for place, method in enumerate(table.methods) if method.explainer in CONTROLS]
    if not controls:
        return (NO_CONTROLS,)
    cells = {(cell.method, cell.column): cell for cell in table.cells if cell.estimate.mean is not None}
    own = [place for place in range(len(table.methods)) if place not in controls]
    return tuple(sentence for method in own for sentence in _of_method(table, cells, method, controls))


def _of_method(table: "Comparison", cells: Cells, method: int, controls: Sequence[int]) -> Iterator[str]:
    """The verdict, then the sentences. None of both if no metric measured the method and a control."""
    rivals = {
        column: [cells[control, column] for control in controls if (control, column) in cells]
        for column in table.columns
        if (method, column) in cells
    }
    rivals = {column: own for column, own in rivals.items() if own}
    if not rivals:
        return
    name = table.methods[method].name
    beaten = [column for column, own in rivals.items() if all(_is_better(cells[method, column], one) for one in own)]
    yield f"{name} beats all controls on {len(beaten)} of {counted(len(rivals), 'metric')}"
    for column, own in rivals.items():
        below = [one for one in own if _is_better(one, cells[method, column])]
        if below:
            yield _below(table, cells[method, column], below)


def _below(table: "Comparison", cell: "Cell", better: "Sequence[Cell]") -> str:
    """`gradcam is worse than random on insertion: 0.21 against 0.25 (higher is better)`."""
    name, column = table.methods[cell.method].name, cell.column
    names = " and ".join(table.methods[one.method].name for one in better)
    figures = " and ".join(f"{one.estimate.mean:.4g}" for one in better)
    unsure = next((f"; {doubt}" for one in better if (doubt := _doubt(cell, one))), "")
    return (
        f"{name} is worse than {names} on {column.metric}: {cell.estimate.mean:.4g} against {figures} "
        f"({METRICS[column.metric].better} is better{unsure})"
    )


def _is_better(cell: "Cell", other: "Cell") -> bool:
    """True if the cell's mean is better; both have one."""
    one, two = cell.estimate.mean or 0.0, other.estimate.mean or 0.0
    return one < two if METRICS[cell.column.metric].better == "lower" else one > two


def _doubt(cell: "Cell", better: "Cell") -> str:
    """Why the better mean may be chance; empty if it is not.

    The first method is compared on the same maps, as in the table of differences; others by their intervals.
    """
    if cell.method == 0 and better.corrected_p is not None:
        return "" if better.corrected_p < CERTAIN else "the difference may be chance"
    return "" if _is_apart(cell, better) else "the intervals overlap"


def _is_apart(cell: "Cell", other: "Cell") -> bool:
    """True if both have intervals, and they share no value."""
    ends = (cell.estimate.low, cell.estimate.high, other.estimate.low, other.estimate.high)
    if any(end is None for end in ends):
        return False
    low, high, other_low, other_high = (end or 0.0 for end in ends)
    return high < other_low or other_high < low
