"""The tables that `evaluate`, `compare` and `versus` print: metrics with their intervals."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from blocksight.engine.catalog import entries
from blocksight.jobs.cli.tables import facts_table, grid_table, interval_text, quality_rows
from blocksight.jobs.evaluate.verdict import CERTAIN, verdicts
from blocksight.jobs.plan.text import counted, printable

if TYPE_CHECKING:
    from blocksight.jobs.evaluate.compare import Cell, Column, Comparison  # which needs scipy
    from blocksight.jobs.plan.records import Evaluated

CELL_WIDTH = 25
MAX_REASON = 500


def evaluation_table(done: "Sequence[Evaluated]", place: str) -> RenderableType:
    """The number of measured values, and why some values are not defined."""
    reasons = sum((Counter(own.reasons) for own in done), Counter())
    num_values = sum(own.num_values for own in done)
    rows = [("values", f"{num_values - sum(reasons.values()):,} of this run")]
    rows += [("not defined", f"{count:,}: {printable(reason)}") for reason, count in reasons.most_common(5)]
    if done and not num_values:
        rows.append(("", "`explain` measured all of it already, or no record is in the sample"))
    return facts_table([*rows, ("files", printable(f"{place}data"))])


def comparison_table(table: "Comparison", width: int) -> RenderableType:
    """Methods by metrics, in tables that fit the width: means (the best is bold), then differences."""
    cells = {(cell.column, cell.method): cell for cell in table.cells}
    longest = max(len(method.name) for method in table.methods)
    abreast = max(1, (width - longest - 4) // (CELL_WIDTH + 3))
    blocks = [table.columns[start : start + abreast] for start in range(0, len(table.columns), abreast)]
    shown: list[RenderableType] = [
        facts_table(quality_rows(own.accuracy, own.flat, own.warnings), printable(own.output)) for own in table.outputs
    ]
    shown += [_comparison_block(table, block, cells, _mean_cell) for block in blocks]
    shown.append("mean [95 % interval over images] maps; the best mean is bold")
    shown += _footnotes(table)
    shown += [printable(note) for note in table.notes]
    if len(table.methods) > 1:
        first, others = printable(table.methods[0].name), range(1, len(table.methods))
        measured = [column for column in table.columns if any(_is_measured(cells[column, number]) for number in others)]
        blocks = [measured[start : start + abreast] for start in range(0, len(measured), abreast)]
        shown += [_comparison_block(table, block, cells, _difference_cell) for block in blocks]
        shown.append(f"difference to {first} [95 % interval] on the maps that both have; * p < 0.05 after Holm")
    shown.append(facts_table([("verdict", printable(sentence)) for sentence in verdicts(table)]))
    return Group(*shown)


def _footnotes(table: "Comparison") -> Iterator[str]:
    """Says why methods have no value of some metrics: a line for each method and reason."""
    for number, ((method, reason), metrics) in enumerate(_missing(table).items(), 1):
        names = ", ".join(dict.fromkeys(metrics))
        yield f"({number}) {printable(table.methods[method].name)} has no {names}: {printable(reason[:MAX_REASON])}"


def _missing(table: "Comparison") -> dict[tuple[int, str], list[str]]:
    """The metrics without a value, by method and reason."""
    found: dict[tuple[int, str], list[str]] = {}
    for one in table.absences:
        found.setdefault((one.method, one.reason), []).append(one.column.metric)
    return found


def _comparison_block(
    table: "Comparison", columns: "Sequence[Column]", cells: "Mapping[Any, Cell]", say: "Callable[[Cell, bool], str]"
) -> Table:
    shown = Table(pad_edge=False)
    numbers = {own: number for number, own in enumerate(_missing(table), 1)}
    marks = {(one.column, one.method): f"- ({numbers[one.method, one.reason]})" for one in table.absences}
    shown.add_column("method", no_wrap=True)
    for column in columns:
        better = entries.METRICS[column.metric].better
        shown.add_column(f"{column.metric}\n{better} is better\n{column.protocol[:8]}", min_width=CELL_WIDTH)
    for number, method in enumerate(table.methods):
        own = [cells[column, number] for column in columns]
        texts = (
            marks.get((cell.column, number)) or say(cell, cell.estimate.mean == _best(cell, cells)) for cell in own
        )
        shown.add_row(printable(method.name), *texts)
    return shown


def _best(cell: "Cell", cells: "Mapping[Any, Cell]") -> float | None:
    means = [other.estimate.mean for other in cells.values() if other.column == cell.column]
    pick = min if entries.METRICS[cell.column.metric].better == "lower" else max
    return pick((mean for mean in means if mean is not None), default=None)


def _mean_cell(cell: "Cell", is_best: bool) -> str:
    own = cell.estimate
    if own.mean is None:
        return "-"
    text = escape(f"{own.mean:.4g}{interval_text(own.low, own.high)} {own.count:,}")
    return f"[bold]{text}[/bold]" if is_best else text


def _is_measured(cell: "Cell") -> bool:
    """Whether the method has a difference to the first one."""
    return cell.difference is not None and cell.difference.difference is not None


def _difference_cell(cell: "Cell", is_best: bool) -> str:  # noqa: ARG001 - as `_mean_cell`
    own = cell.difference
    if own is None or own.difference is None:
        return "-"
    mark = "*" if cell.corrected_p is not None and cell.corrected_p < CERTAIN else ""
    return escape(f"{own.difference:+.4g}{mark}{interval_text(own.low, own.high)}")


def difference_table(summary: "Mapping[str, Any]", place: str) -> RenderableType:
    """The summary of a difference: shared records, right and wrong predictions, and how far the maps moved."""
    counts, shares, rule = summary["counts"], summary["shares"], summary["looks_elsewhere"]
    rows = [
        *(
            (name.upper(), f"{summary[name]['output']}: {summary[name]['model']}, {summary[name]['explainer']}")
            for name in "ab"
        ),
        ("compared", f"{counted(counts['records_compared'], 'record')}, {counted(counts['rows'], 'row')}"),
        *([("note", summary["note"])] if summary["note"] else []),
        *_left_out(counts, [summary[name]["target"] for name in ("a", "b")]),
        ("A to B", ", ".join(f"{count:,} {name}" for name, count in summary["confusion"].items() if count)),
        *((name, _share(shares[name])) for name in ("regressed", "improved")),
        ("looks elsewhere", f"{_share(shares['looks_elsewhere'])}: {rule['rule']} ({rule['threshold']:.3f})"),
        ("regressed: elsewhere", _share(shares["elsewhere_of_regressed"])),
        ("others: elsewhere", _share(shares["elsewhere_of_others"])),
        ("difference", _share(summary["elsewhere_gap"], sign="+")),
    ]
    means = [
        [name, "-" if own["mean"] is None else f"{own['mean']:.4g}{interval_text(own['low'], own['high'])}", meaning]
        for name, meaning in summary["meanings"].items()
        if (own := summary["means"].get(name)) is not None
    ]
    means_table = grid_table(["measure", "mean [95 % interval over records]", "meaning"], means)
    facts = facts_table([(name, printable(text)) for name, text in rows], "A against B")
    return Group(facts, means_table, facts_table([("files", printable(f"{place.rstrip('/')}/data"))]))


def _share(own: "Mapping[str, Any]", sign: str = "") -> str:
    """`12.0 % [10.1, 14.2]`."""
    if own["mean"] is None:
        return "-"
    ends = "" if own["low"] is None else f" [{100 * own['low']:.1f}, {100 * own['high']:.1f}]"
    return f"{100 * own['mean']:{sign}.1f} %{ends}"


def _left_out(counts: "Mapping[str, Any]", targets: Sequence[str]) -> list[tuple[str, str]]:
    """Says what could not be compared, what to do, and what may not be comparable."""
    go_on = "still open: the same `explain` goes on from there"
    reasons = {
        "records_with_other_targets": (
            "record",
            f"with no common target (A: {targets[0]}, B: {targets[1]}): explain "
            "both with --target label, or with the same class numbers",
        ),
        "records_with_other_image": ("record", "whose image has changed between the two"),
        "records_only_in_a": ("record", "explained in A alone"),
        "records_only_in_b": ("record", "explained in B alone"),
        "rejected_in_a": ("record", "rejected in A"),
        "rejected_in_b": ("record", "rejected in B"),
        "open_units_of_a": ("unit", f"of A {go_on}"),
        "open_units_of_b": ("unit", f"of B {go_on}"),
        "rows_with_a_flat_map": ("row", "with a flat map, of which no map is compared"),
    }
    found = [
        ("left out", f"{counted(counts[name], noun)} {text}") for name, (noun, text) in reasons.items() if counts[name]
    ]
    other_names = counts["rows_with_other_target_name"]
    names = f"the target of {counted(other_names, 'row')} has another name in B: are the classes the same?"
    return [*found, *([("note", names)] if other_names else [])]
