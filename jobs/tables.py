"""What the command line prints: tables for people, with every string from data made harmless."""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, fields
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from engine import catalog
from jobs.config import JobConfig
from jobs.estimate import estimate
from jobs.learned import wanted_images
from jobs.measured import recall
from jobs.plan import Plan
from jobs.products import products_of, said_of
from jobs.progress import clock, counted
from jobs.receipts import metric_means
from jobs.reconcile import Standing
from jobs.records import DeadLetter, UnitFailure
from jobs.run import RunOutcome
from jobs.setting import PlannedForward
from jobs.units import Workforce

if TYPE_CHECKING:
    from jobs.audit.result import Audit, Shortcut  # which needs pyarrow
    from jobs.bench import Benchmark  # which needs torch, too slow for a --help
    from jobs.compare import Cell, Column, Comparison  # which needs scipy
    from jobs.evaluation import Evaluated

MEBIBYTE = 1 << 20


def plain(text: object) -> str:
    """Text that may come from a stranger, with control characters and those that turn its direction as codes."""
    return "".join(char if char.isprintable() else f"\\x{ord(char):02x}" for char in str(text))


def printable(text: object) -> str:
    """The same, safe on a terminal: markup is text too."""
    return escape(plain(text))


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
    forwards, num_bytes, seconds = cost.forwards_per_record, cost.num_bytes, cost.seconds(num_workers)
    basis = cost.basis
    timing = "a guess: `blocksight bench` measures it"
    measured = recall(job, "cuda" if workforce.on_gpu else "cpu")
    if measured is not None:
        forwards, num_bytes = measured.forwards_per_record, measured.bytes_per_record * plan.num_records
        seconds = measured.seconds_per_record * plan.num_records / num_workers
        basis = timing = f"measured by `bench` here on {measured.day}"
    workers = counted(num_workers, "GPU" if workforce.on_gpu else "CPU core")
    about = "" if plan.is_exact else "about "
    ignored = ", ".join(f"{count} {printable(kind)}" for kind, count in sorted(plan.ignored.items()))
    rows = [
        ("input", f"{plan.num_objects:,} objects, {_size(plan.num_bytes)}, as {plan.layout}"),
        ("ignored", ignored or "nothing"),
        *(("unreadable", f"{printable(key)}: {printable(why)}") for key, why in plan.troubles.items()),
        ("records", f"{about}{plan.num_records:,}"),
        ("units", f"{len(plan.units):,}"),
        *_first_pass(job, plan.num_records),
        ("forwards", f"about {forwards * plan.num_records:,.0f} ({forwards:,.0f} a record, {basis})"),
        ("time", f"about {clock(seconds)} on {workers} ({timing})"),
        ("output", f"about {_size(num_bytes)}"),
        ("fingerprint", plan.fingerprint[:16]),
    ]
    return _facts(rows, "plan (nothing was computed or written)")


def _first_pass(job: JobConfig, num_records: int) -> list[tuple[str, str]]:
    wanted = min(wanted_images(job), num_records)
    said = f"{job.explainer} learns from {counted(wanted, 'image')}, once, before the first unit"
    return [("first pass", said)] if wanted else []


def standing_table(output: str, standing: Standing, forward: PlannedForward | None = None) -> Table:
    """How far a job is."""
    units = len(standing.plan.units)
    rejects = ", ".join(f"{count} {code}" for code, count in sorted(standing.rejects.items()))
    timed = [receipt for receipt in standing.receipts.values() if receipt.explain_seconds]  # a rebuilt one is not
    seconds = sum(receipt.explain_seconds or 0.0 for receipt in timed)
    forwards = sum(receipt.num_forwards for receipt in timed)
    ways = "; ".join(sorted({receipt.forward for receipt in timed if receipt.forward and receipt.num_forwards}))
    rate = f", {forwards / seconds:,.0f} a second of a worker" + (f" ({ways})" if ways else "") if seconds else ""
    about = "" if standing.plan.is_exact else "about "
    of_all = f" of {about}{standing.plan.num_records:,}" if standing.open_units else ""
    rows = [
        ("output", printable(output)),
        *((name, printable(standing.plan.identity[name])) for name in ("data", "model")),
        ("units", f"{len(standing.receipts):,} of {units:,} committed" + _dead(standing)),
        ("records", f"{standing.total('num_records'):,}{of_all}"),
        ("explained", f"{standing.total('num_ok'):,}"),
        ("rejected", f"{standing.total('num_rejected'):,}" + (f" ({rejects})" if rejects else "")),
        ("forwards", f"{standing.total('num_forwards'):,}{rate}"),
        *([("masks", f"scored by {forward}")] if forward is not None else []),
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
    table = standing_table(job.output, outcome.standing, outcome.forward)
    if outcome.ran.seconds:
        table.add_row("this run", f"{clock(outcome.ran.seconds)}, workers busy {outcome.ran.busy:.0%} of it")
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
        [[_listed(name, own), own.needs, own.cost, own.source] for name, own in catalog.EXPLAINERS.items()],
    )
    chosen = {name: own for name, own in catalog.EXPLAINERS.items() if fields(own.parameters)}
    return Group(explainers, *_legend(), *(_parameters(name, own) for name, own in chosen.items()))


RECONSTRUCTED = "a reconstruction from the abstract: no code was at hand, and the authors may have chosen otherwise"
"""Of a method that stands marked in the list."""


def _listed(name: str, entry: catalog.ExplainerEntry) -> str:
    """A name as the list shows it."""
    return f"{name}{'(...)' if entry.wraps else ''}{' *' if entry.is_reconstruction else ''}"


def _legend() -> Iterator[str]:
    """What the marks in the list of explainers mean."""
    usual = ", ".join(f"{name}({own.wraps})" for name, own in catalog.EXPLAINERS.items() if own.wraps)
    yield "(...) wraps another explainer, such as ucag(sise) or ucag(smoothgrad(gradcam)); where none is named:"
    yield f"    {usual}"
    yield f"* {RECONSTRUCTED}"
    yield "-p NAME=VALUE sets a parameter, -p base.NAME=VALUE one of what is wrapped; --preset sets the others"
    yield "    as below: where fast says nothing, as in paper"


def _parameters(explainer: str, entry: catalog.ExplainerEntry) -> Table:
    """Parameters with what each preset makes of them; one column where the presets are the same."""
    rows, hints = [], get_type_hints(entry.parameters)
    for field in fields(entry.parameters):
        paper = "" if field.default is MISSING else _value(field.default)
        fast = _value(entry.fast[field.name]) if field.name in entry.fast else ""
        rows.append([field.name, paper, *([fast] if entry.fast else []), _meaning(field, hints[field.name])])
    presets = ["paper", "fast"] if entry.fast else ["default"]
    return _grid([f"{explainer}: -p NAME=VALUE", *presets, "meaning"], rows)


def _meaning(field: Field[Any], hint: Any) -> str:
    """The help of a parameter, and the words that it may be where the help does not name them."""
    said, words = str(field.metadata["help"]), list(_words(hint))
    missing = [word for word in words if not re.search(rf"\b{re.escape(word)}\b", said) and word != field.default]
    return f"{said} ({', '.join(words)})" if missing else said


def _words(hint: Any) -> Iterator[str]:
    """The literal words of a type."""
    if get_origin(hint) is Literal:
        yield from (word for word in get_args(hint) if isinstance(word, str))
    else:
        for inner in get_args(hint):
            yield from _words(inner)


def _value(value: Any) -> str:
    """A parameter's value as it is given with -p."""
    if isinstance(value, tuple):
        return ",".join(value) if all(isinstance(one, str) for one in value) else json.dumps(value)
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def _grid(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(show_lines=False, pad_edge=False)
    for name in head:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*(printable(cell) for cell in row))
    return table


CELL_WIDTH = 25
MAX_REASON = 500
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


SHOWN = 10
"""Of a long list; all stands in the files."""


def audit_table(audit: "Audit", place: str) -> RenderableType:
    """What an audit found: counts, gates, then what is wrong, the surest first."""
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
        ("stands in", printable(place)),
    ]
    odd = [[one.key, one.target_name, one.label or "-", one.reason, one.detail] for one in audit.oddities[:SHOWN]]
    shown: list[RenderableType] = [_facts(rows, "audit")]
    for name, shortcuts in (("FINDING", audit.findings), ("suspicion", audit.suspicions)):
        shown += [_shortcut_lines(name, one) for one in shortcuts[:SHOWN]]
    if odd:
        shown.append(_grid(["odd", "explained class", "label", "why", ""], odd))
    return Group(*shown)


def _shortcut_lines(name: str, one: "Shortcut") -> str:
    left, top, right, bottom = (f"{100 * edge:.0f}" for edge in one.box)
    where = f"the region {left}-{right} % from the left, {top}-{bottom} % from the top"
    return (
        f"[bold]{name}[/bold]: {printable(one.target_name)} looks at {where} in {one.share:.0%} of its maps: "
        f"{printable(one.why)} (such as {printable(one.members[0])})"
    )


def comparison_table(table: "Comparison", width: int) -> RenderableType:
    """Methods by metrics, as many abreast as the width allows: means, then differences; the best mean is bold."""
    cells = {(cell.column, cell.method): cell for cell in table.cells}
    longest = max(len(method.name) for method in table.methods)
    abreast = max(1, (width - longest - 4) // (CELL_WIDTH + 3))
    blocks = [table.columns[start : start + abreast] for start in range(0, len(table.columns), abreast)]
    shown: list[RenderableType] = [_comparison_block(table, block, cells, _mean_cell) for block in blocks]
    shown.append("mean [95 % interval over images] maps; the best mean is bold")
    shown += _footnotes(table)
    shown += [printable(note) for note in table.notes]
    if len(table.methods) > 1:
        first = printable(table.methods[0].name)
        shown += [_comparison_block(table, block, cells, _difference_cell) for block in blocks]
        shown.append(f"difference to {first} [95 % interval] on the maps that both have; * p < 0.05 after Holm")
    return Group(*shown)


def _footnotes(table: "Comparison") -> Iterator[str]:
    """Why methods have no value of some metrics: a line for each method and reason."""
    for number, ((method, reason), metrics) in enumerate(_missing(table).items(), 1):
        names = ", ".join(dict.fromkeys(metrics))
        yield f"({number}) {printable(table.methods[method].name)} has no {names}: {printable(reason[:MAX_REASON])}"


def _missing(table: "Comparison") -> dict[tuple[int, str], list[str]]:
    """The metrics of which a method has no value, by method and reason."""
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
        better = catalog.METRICS[column.metric].better
        shown.add_column(f"{column.metric}\n{better} is better\n{column.protocol[:8]}", min_width=CELL_WIDTH)
    for number, method in enumerate(table.methods):
        own = [cells[column, number] for column in columns]
        said = (marks.get((cell.column, number)) or say(cell, cell.estimate.mean == _best(cell, cells)) for cell in own)
        shown.add_row(printable(method.name), *said)
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


def difference_table(said: "Mapping[str, Any]", place: str) -> RenderableType:
    """What a difference says: how much two outputs share, who is right, how far maps moved, and what goes with it."""
    counts, shares, rule = said["counts"], said["shares"], said["looks_elsewhere"]
    rows = [
        *((name.upper(), f"{said[name]['output']}: {said[name]['model']}, {said[name]['explainer']}") for name in "ab"),
        ("compared", f"{counted(counts['records_compared'], 'record')}, {counted(counts['rows'], 'row')}"),
        *([("note", said["note"])] if said["note"] else []),
        *_left_out(counts, [said[name]["target"] for name in ("a", "b")]),
        ("A to B", ", ".join(f"{count:,} {name}" for name, count in said["confusion"].items() if count)),
        *((name, _share(shares[name])) for name in ("regressed", "improved")),
        ("looks elsewhere", f"{_share(shares['looks_elsewhere'])}: {rule['rule']} ({rule['threshold']:.3f})"),
        ("regressed: elsewhere", _share(shares["elsewhere_of_regressed"])),
        ("others: elsewhere", _share(shares["elsewhere_of_others"])),
        ("difference", _share(said["elsewhere_gap"], sign="+")),
    ]
    means = [
        [name, "-" if own["mean"] is None else f"{own['mean']:.4g}{_interval(own['low'], own['high'])}", meaning]
        for name, meaning in said["meanings"].items()
        if (own := said["means"].get(name)) is not None
    ]
    means_table = _grid(["measure", "mean [95 % interval over records]", "meaning"], means)
    facts = _facts([(name, printable(text)) for name, text in rows], "A against B")
    return Group(facts, means_table, _facts([("rows stand in", printable(f"{place.rstrip('/')}/data"))]))


def _share(own: "Mapping[str, Any]", sign: str = "") -> str:
    """`12.0 % [10.1, 14.2]`."""
    if own["mean"] is None:
        return "-"
    ends = "" if own["low"] is None else f" [{100 * own['low']:.1f}, {100 * own['high']:.1f}]"
    return f"{100 * own['mean']:{sign}.1f} %{ends}"


def _left_out(counts: "Mapping[str, Any]", targets: Sequence[str]) -> list[tuple[str, str]]:
    """What could not be compared, and what to do."""
    go_on = "still open: the same `explain` goes on from there"
    said = {
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
        "rows_with_other_target_name": ("row", "whose target has another name in B: are the classes the same?"),
    }
    return [
        ("left out", f"{counted(counts[name], noun)} {text}") for name, (noun, text) in said.items() if counts[name]
    ]


EFFICIENCY = "the time that the bare model would need for as many forwards, over all that is taken"


def benchmark_table(job: JobConfig, found: "Benchmark") -> RenderableType:
    """The rate of the bare model, what the explainer makes of it, and what a data set costs."""
    own, cost = found.efficiency, found.cost
    worker = "core" if found.device == "cpu" else "GPU"
    money = f", {cost.money:,.2f} at the given price" if cost.money is not None else ""
    rows = [
        ("model", f"{printable(job.model)}, {job.explainer} on {printable(found.hardware)}"),
        ("masks are scored by", str(found.setting)),
        ("bare model", ", ".join(f"{rate:,.0f}/s at {size}" for size, rate in own.bare_rates.items())),
        ("bare, in turns", f"{own.best_bare_rate:,.1f} forwards/s of a {worker}"),
        ("explainer", f"{own.forward_rate:,.1f} masked forwards/s, {own.forwards_per_image:,.0f} an image"),
        ("efficiency", "no masked forwards" if own.efficiency is None else f"{own.efficiency:.3f}: {EFFICIENCY}"),
        ("images", f"{1 / own.seconds_per_image:,.3g} a second of a {worker}, {found.bytes_per_map:,} bytes a map"),
        (
            f"{cost.records:,} images",
            f"{_hours(cost.hours)} hours on {counted(cost.workers, worker)}, {_hours(cost.worker_hours)} "
            f"{worker}-hours, {_size(cost.num_bytes)}{money} (reckoned from the rate)",
        ),
    ]
    probed = _grid(
        ["tried", "forwards/s", "score error", ""],
        [
            [str(one.setting), _rate(one.forwards_per_second), f"{one.score_error:.2g}", one.refused or ""]
            for one in found.probed
        ],
    )
    return Group(_facts(rows, "bench"), probed, *([_race_table(found.race)] if found.race else []))


def _rate(per_second: float | None) -> str:
    return "not timed" if per_second is None else f"{per_second:,.0f}"


def _hours(hours: float) -> str:
    return f"{hours:,.0f}" if hours >= 100 else f"{hours:.3g}"


def _race_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    return _grid(
        ["one image, in turns", "job", "how", "forwards", "forwards/s", "seconds", "we are ahead"],
        [
            [
                row["name"],
                row["job"],
                row["how"],
                f"{row['forwards']:,}",
                f"{row['forwards_per_second']:,.1f}",
                f"{row['forwards'] / row['forwards_per_second']:,.1f}",
                f"{row['we_are_ahead']:.2f} x",
            ]
            for row in rows
        ],
    )


def curve_table(rows: Sequence[Mapping[str, Any]]) -> RenderableType:
    """The fidelity curve: to full SISE, then what is lost against it."""
    shown = _grid(
        ["method", "forwards", "images", "blocks", "Spearman", "SSIM", "IoU 15 %", "ins - del", "Drop", "EBPG", ""],
        [
            [
                row["method"],
                f"{row['forwards']:,.0f}",
                str(row["images"]),
                *(_mean(row, name) for name in ("block_correlation", "spearman", "ssim", "iou_15")),
                *(_loss(row, name) for name in ("insertion_minus_deletion", "drop", "ebpg")),
                "no loss" if row.get("loses_nothing") else "",
            ]
            for row in rows
        ],
    )
    return Group(
        shown,
        "blocks: correlation of the block maps with full SISE's. From `ins - del` on: full SISE's mean, and for the "
        "others the paired difference to it with its 95 % interval; no loss: these lie within 0.01 and 1 point.",
    )


def _mean(row: Mapping[str, Any], name: str) -> str:
    mean = row[name][0]
    return "-" if mean is None else f"{mean:.3f}"


def _loss(row: Mapping[str, Any], name: str) -> str:
    paired = row.get(f"{name}_difference")
    if paired is None:
        return _mean(row, name)
    mean, low, high = paired
    return "-" if mean is None else f"{mean:+.3f}{_interval(low, high)}"


FIGURES = ("score", "rank", "Drop", "grew", "forwards", "fidelity", "map bytes")
"""What is shown of a target beside its name."""


def record_table(rows: Sequence[Mapping[str, Any]]) -> RenderableType:
    """One record's rows: its facts, a line per target, and a line for each thing that was found beside its map.

    Raises UnreconciledError where such a thing is damaged.
    """
    first = rows[0]
    table = Table(title=printable(first["key"]), title_justify="left", title_style="bold")
    for name in ("target", *FIGURES):
        table.add_column(name)
    for row in rows:
        if row["map"] is not None:
            table.add_row(*target_cells(row))
    if first["map"] is None:
        return _facts([(f"rejected ({first['reject_code']})", printable(first["error"]))], printable(first["key"]))
    return Group(table, *_beside_maps([row for row in rows if row["map"] is not None]))


def _beside_maps(rows: Sequence[Mapping[str, Any]]) -> Iterator[Table]:
    """What was found beside the maps, target by target where there are several."""
    for row in rows:
        found = [(name, printable(text)) for name, text in said_of(products_of(row))]
        if found:
            yield _facts(found, printable(row["target_name"]) if len(rows) > 1 else None)


def target_cells(row: Mapping[str, Any]) -> list[str]:
    """The target by name, and its FIGURES."""
    return [
        printable(row["target_name"]),
        f"{row['score']:.3f}",
        str(row["target_rank"]),
        f"{row['metrics']['drop']:.1f} %",
        "yes" if row["metrics"]["increase"] else "no",
        f"{row['num_forwards']:,}",
        "-" if row["fidelity"] is None else f"{row['fidelity']}: {row['fidelity_reason']}",
        f"{len(row['map']):,}",
    ]
