"""What the command line prints: tables for people, with every string from data made harmless."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, fields
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from engine import catalog
from jobs.config import JobConfig
from jobs.estimate import estimate
from jobs.plan import Plan
from jobs.progress import clock
from jobs.receipts import metric_means
from jobs.reconcile import Standing
from jobs.records import DeadLetter, UnitFailure
from jobs.run import RunOutcome
from jobs.units import Workforce

if TYPE_CHECKING:
    from jobs.compare import Cell, Column, Comparison  # which needs scipy, too slow for a --help
    from jobs.evaluation import Evaluated

MEBIBYTE = 1 << 20


def printable(text: object) -> str:
    """Text that may come from a stranger, safe on a terminal: control characters as codes, markup as text."""
    plain = "".join(char if char.isprintable() else f"\\x{ord(char):02x}" for char in str(text))
    return escape(plain)


def _facts(rows: Sequence[tuple[str, str]], title: str | None = None) -> Table:
    table = Table(title=title, show_header=False, box=None, title_justify="left", title_style="bold")
    table.add_column(style="dim")
    table.add_column()
    for name, value in rows:
        table.add_row(name, value)
    return table


def _size(num_bytes: float) -> str:
    return f"{num_bytes / MEBIBYTE:,.1f} MiB"


def plan_table(job: JobConfig, plan: Plan, workforce: Workforce) -> Table:
    """Units, records and the first estimate."""
    num_workers = workforce.num_workers
    cost = estimate(job, plan.num_records, on_gpu=workforce.on_gpu)
    workers = "GPUs (a guess)" if workforce.on_gpu else "CPU cores; a GPU is far faster"
    about = "" if plan.is_exact else "about "
    basis = "measured on photographs" if cost.is_measured else "a guess: not measured for this model"
    ignored = ", ".join(f"{count} {printable(kind)}" for kind, count in sorted(plan.ignored.items()))
    rows = [
        ("input", f"{plan.num_objects:,} objects, {_size(plan.num_bytes)}, as {plan.layout}"),
        ("ignored", ignored or "nothing"),
        ("records", f"{about}{plan.num_records:,}"),
        ("units", f"{len(plan.units):,}"),
        ("forwards", f"about {cost.num_forwards:,} ({cost.forwards_per_record:,.0f} a record, {basis})"),
        ("time", f"about {clock(cost.seconds(num_workers))} on {num_workers} {workers}"),
        ("output", f"about {_size(cost.num_bytes)}"),
        ("fingerprint", plan.fingerprint[:16]),
    ]
    return _facts(rows, "plan (nothing was computed or written)")


def standing_table(output: str, standing: Standing) -> Table:
    """How far a job is."""
    units = len(standing.plan.units)
    rejects = ", ".join(f"{count} {code}" for code, count in sorted(standing.rejects.items()))
    timed = [receipt for receipt in standing.receipts.values() if receipt.explain_seconds]  # a rebuilt one is not
    seconds = sum(receipt.explain_seconds or 0.0 for receipt in timed)
    forwards = sum(receipt.num_forwards for receipt in timed)
    rate = f", {forwards / seconds:,.0f} a second of a worker" if seconds else ""
    about = "" if standing.plan.is_exact else "about "
    of_all = f" of {about}{standing.plan.num_records:,}" if standing.open_units else ""
    rows = [
        ("output", printable(output)),
        ("units", f"{len(standing.receipts):,} of {units:,} committed" + _dead(standing)),
        ("records", f"{standing.total('num_records'):,}{of_all}"),
        ("explained", f"{standing.total('num_ok'):,}"),
        ("rejected", f"{standing.total('num_rejected'):,}" + (f" ({rejects})" if rejects else "")),
        ("forwards", f"{standing.total('num_forwards'):,}{rate}"),
        ("size", _size(standing.total("num_bytes"))),
        *_metric_rows(metric_means(standing.receipts.values())),
    ]
    return _facts(rows)


def _dead(standing: Standing) -> str:
    if not standing.dead:
        return ""
    causes = Counter(letter.cause for letter in standing.dead.values())
    return f", {len(standing.dead)} dead ({', '.join(f'{count} {cause}' for cause, count in causes.most_common())})"


def letter_line(letter: DeadLetter) -> str:
    """One line for a unit that was given up."""
    where = f"unit {letter.ordinal} ({printable(letter.inputs)})"
    return f"{where} is dead, {letter.cause} at {letter.stage}: {printable(letter.error)}"


def outcome_table(job: JobConfig, outcome: RunOutcome) -> Table:
    """What a run left behind."""
    table = standing_table(job.output, outcome.standing)
    if outcome.ran.seconds:
        table.add_row("this run", f"{clock(outcome.ran.seconds)} of explaining")
    elif outcome.manifest is not None:
        table.add_row("this run", "nothing to do: the job is complete")
    if outcome.standing.receipts:
        table.add_row("read it", printable(_reading(job)))
    return table


def _reading(job: JobConfig) -> str:
    """The line of Python that reads the output."""
    data = f"{job.output.rstrip('/')}/data"
    if job.endpoint_url is None or not data.startswith("s3://"):
        return f"pyarrow.parquet.read_table({data!r})"
    return f"pandas.read_parquet({data!r}, storage_options={{'endpoint_url': {job.endpoint_url!r}}})"


def _metric_rows(means: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, str]]:
    rows = []
    for name, value in means.items():
        metric, _, protocol = name.partition("@")
        better = catalog.METRICS[metric].better
        said = f"{value['mean']:.2f} % over {value['count']:,} maps ({better} is better, protocol {protocol})"
        rows.append((metric, said))
    return rows


def failure_line(failure: UnitFailure) -> str:
    """One line for a unit that was not committed."""
    where = f"unit {failure.ordinal} ({printable(failure.inputs)})"
    return f"{where} failed at {failure.stage}: {printable(failure.error)}"


def catalog_table(what: str) -> RenderableType:
    """One of the engine's lists."""
    if what == "metrics":
        return _grid(
            ["metric", "meaning", "unit", "better", "cost"],
            [[name, own.meaning, own.unit, own.better, own.cost] for name, own in catalog.METRICS.items()],
        )
    if what == "models":
        return _grid(
            ["model", "meaning", "needs"],
            [[name, own.meaning, own.needs] for name, own in catalog.MODELS.items()],
        )
    explainers = _grid(
        ["explainer", "needs", "cost", "source"],
        [[name, own.needs, own.cost, own.source] for name, own in catalog.EXPLAINERS.items()],
    )
    chosen = {name: own.parameters for name, own in catalog.EXPLAINERS.items() if fields(own.parameters)}
    return Group(explainers, *(_parameters(name, kind) for name, kind in chosen.items()))


def _parameters(explainer: str, kind: type) -> Table:
    rows = []
    for field in fields(kind):
        default = field.default if field.default is not MISSING else ""
        rows.append([field.name, str(default), str(field.metadata["help"])])
    return _grid([f"{explainer}: -p NAME=VALUE", "default", "meaning"], rows)


def _grid(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(show_lines=False, pad_edge=False)
    for name in head:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*(escape(cell) for cell in row))
    return table


CELL_WIDTH = 25
CERTAIN = 0.05


def evaluation_table(done: "Sequence[Evaluated]", place: str) -> RenderableType:
    """What a run of `evaluate` measured, and why some values are not defined."""
    reasons = sum((Counter(own.reasons) for own in done), Counter())
    num_values = sum(own.num_values for own in done)
    rows = [("values", f"{num_values - sum(reasons.values()):,} of this run")]
    rows += [("not defined", f"{count:,}: {printable(reason)}") for reason, count in reasons.most_common(5)]
    if done and not num_values:
        rows.append(("", "`explain` measured all of it already, or no record is in the sample"))
    return _facts([*rows, ("all stand in", printable(f"{place}data"))])


def comparison_table(table: "Comparison", width: int) -> RenderableType:
    """Methods by metrics, as many abreast as the width allows: means, then differences; the best mean is bold."""
    cells = {(cell.column, cell.method): cell for cell in table.cells}
    longest = max(len(method.name) for method in table.methods)
    abreast = max(1, (width - longest - 4) // (CELL_WIDTH + 3))
    blocks = [table.columns[start : start + abreast] for start in range(0, len(table.columns), abreast)]
    shown: list[RenderableType] = [_comparison_block(table, block, cells, _mean_cell) for block in blocks]
    shown.append("mean [95 % interval over images] maps; the best mean is bold")
    if len(table.methods) > 1:
        first = printable(table.methods[0].name)
        shown += [_comparison_block(table, block, cells, _difference_cell) for block in blocks]
        shown.append(f"difference to {first} [95 % interval] on the maps that both have; * p < 0.05 after Holm")
    return Group(*shown)


def _comparison_block(
    table: "Comparison", columns: "Sequence[Column]", cells: "Mapping[Any, Cell]", say: "Callable[[Cell, bool], str]"
) -> Table:
    shown = Table(pad_edge=False)
    shown.add_column("method", no_wrap=True)
    for column in columns:
        better = catalog.METRICS[column.metric].better
        shown.add_column(f"{column.metric}\n{better} is better\n{column.protocol[:8]}", min_width=CELL_WIDTH)
    for number, method in enumerate(table.methods):
        own = [cells[column, number] for column in columns]
        shown.add_row(printable(method.name), *(say(cell, cell.estimate.mean == _best(cell, cells)) for cell in own))
    return shown


def _best(cell: "Cell", cells: "Mapping[Any, Cell]") -> float | None:
    means = [other.estimate.mean for other in cells.values() if other.column == cell.column]
    pick = min if catalog.METRICS[cell.column.metric].better == "lower" else max
    return pick((mean for mean in means if mean is not None), default=None)


def _mean_cell(cell: "Cell", is_best: bool) -> str:
    own = cell.estimate
    if own.mean is None:
        return "-"
    text = escape(f"{own.mean:.4g}{_interval(own.low, own.high)} {own.count:,}")
    return f"[bold]{text}[/bold]" if is_best else text


def _difference_cell(cell: "Cell", is_best: bool) -> str:  # noqa: ARG001 - as `_mean_cell`
    own = cell.difference
    if own is None or own.difference is None:
        return "-"
    mark = "*" if cell.corrected_p is not None and cell.corrected_p < CERTAIN else ""
    return escape(f"{own.difference:+.4g}{mark}{_interval(own.low, own.high)}")


def _interval(low: float | None, high: float | None) -> str:
    return "" if low is None or high is None else f" [{low:.3g}, {high:.3g}]"


def record_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """One record's rows: its facts, then a line per target."""
    first = rows[0]
    table = Table(title=printable(first["key"]), title_justify="left", title_style="bold")
    for name in ("target", "score", "rank", "Drop", "grew", "forwards", "map bytes"):
        table.add_column(name)
    for row in rows:
        if row["map"] is not None:
            table.add_row(*target_cells(row))
    if first["map"] is None:
        return _facts([(f"rejected ({first['reject_code']})", printable(first["error"]))], printable(first["key"]))
    return table


def target_cells(row: Mapping[str, Any]) -> list[str]:
    """Target by name, score, rank, Drop, whether the score grew, forwards, bytes of the map."""
    return [
        printable(row["target_name"]),
        f"{row['score']:.3f}",
        str(row["target_rank"]),
        f"{row['metrics']['drop']:.1f} %",
        "yes" if row["metrics"]["increase"] else "no",
        f"{row['num_forwards']:,}",
        f"{len(row['map']):,}",
    ]
