"""Tables for the command line; strings from data are printed without control characters."""

from collections.abc import Sequence

from rich.table import Table

from blocksight.jobs.plan.text import printable

MEBIBYTE = 1 << 20


def facts_table(rows: Sequence[tuple[str, str]], title: str | None = None) -> Table:
    table = Table(title=title, show_header=False, box=None, title_justify="left", title_style="bold")
    table.add_column(style="dim")
    table.add_column()
    for name, value in rows:
        table.add_row(name, value)
    return table


def quality_rows(accuracy: Sequence[str], flat: str, warnings: Sequence[str]) -> list[tuple[str, str]]:
    """How often the model is right, how many maps are flat, and loud sentences about both."""
    right = list(zip(("accuracy", ""), accuracy, strict=False))
    loud = [("[bold red]warning[/]", f"[bold red]{printable(sentence)}[/]") for sentence in warnings]
    return [*right, ("flat maps", flat), *loud]


def size_text(num_bytes: float) -> str:
    return f"{num_bytes / MEBIBYTE:,.1f} MiB"


def grid_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(show_lines=False, pad_edge=False)
    for name in head:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*(printable(cell) for cell in row))
    return table


def interval_text(low: float | None, high: float | None) -> str:
    return "" if low is None or high is None else f" [{low:.3g}, {high:.3g}]"
