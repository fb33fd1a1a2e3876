"""The content of a report as plain values; its figures are those of `status`, `compare` and the audit."""

import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import PurePosixPath
from typing import Any

from blocksight.engine.catalog.entries import CONTROLS, METRICS
from blocksight.engine.catalog.readouts import ReadoutName
from blocksight.jobs.audit.examples import read_examples
from blocksight.jobs.audit.result import GATES, Audit, read_audit
from blocksight.jobs.audit.stream import committed, digest_of_fragments
from blocksight.jobs.evaluate.compare import Absence, Cell, Column, Comparison, Output, compare
from blocksight.jobs.evaluate.known_truth import KnownTruth
from blocksight.jobs.evaluate.verdict import verdicts
from blocksight.jobs.ledger.accuracy import is_right
from blocksight.jobs.ledger.reconcile import JobState, final_manifest, read_job_state
from blocksight.jobs.plan.config import ConfigError
from blocksight.jobs.plan.forward_setting import planned_forward
from blocksight.jobs.plan.plan import planned_labels
from blocksight.jobs.plan.preflight import is_class_score, readout_of, stored_preflight, target_score_text
from blocksight.jobs.plan.records import DeadLetter
from blocksight.jobs.plan.text import counted, percent
from blocksight.jobs.report.facts import (
    Fact,
    Share,
    audit_command,
    commands,
    cost_facts,
    model_of,
    provenance_facts,
    run_facts,
    runs_of,
    size,
    workers_of,
)
from blocksight.jobs.report.findings import Findings, class_name, findings_of
from blocksight.jobs.report.galleries import RANKING, Gallery, Picture, ProductPictures, Ref, Rejected, drawn, galleries
from blocksight.jobs.report.galleries import select as select_maps
from blocksight.jobs.report.products import products_of, said_of
from blocksight.storage.inputs.ground_truth import Truth

NO_TRUTH = KnownTruth()
MAX_DEAD = 20
MAX_REASON = 500
MAX_SEARCHED = 300
"""Characters of a name that the search covers."""
RANGES = {"%": 100.0, "0 to 1": 1.0, "0 to 90": 90.0}
"""The end of a metric's axis by its unit; for other units it is the greatest value shown."""


@dataclass(frozen=True)
class Notice:
    """A sentence at the top of the page."""

    text: str
    command: str | None = None
    """The command to run, if any."""


@dataclass(frozen=True)
class Tile:
    """A key figure at the top of the page."""

    value: str
    name: str
    note: str = ""


@dataclass(frozen=True)
class Accounting:
    """Counts of records, rows and units."""

    num_planned: int
    is_exact: bool
    """Whether the planned number was counted, not estimated."""
    num_records: int
    """Committed records: explained and rejected."""
    num_ok: int
    num_rejected: int
    num_rows: int
    num_units: int
    num_committed: int
    num_open: int
    rejects: tuple[Share, ...]
    """Reject codes, the most frequent first, as shares of all rejected records."""
    examples: tuple[Rejected, ...]
    dead: tuple[DeadLetter, ...]
    num_dead: int


@dataclass(frozen=True)
class Estimate:
    """A method's mean of a metric."""

    method: str
    is_control: bool
    cell: Cell


@dataclass(frozen=True)
class Metric:
    """The estimates of one metric under one protocol."""

    name: str
    meaning: str
    better: str
    unit: str
    protocol: str
    end: float
    """The end of the axis, which begins at 0."""
    estimates: tuple[Estimate, ...]
    missing: tuple[Fact, ...]
    """Methods without a value, and why."""

    @property
    def by_method(self) -> Mapping[str, Estimate]:
        """The estimates by their methods' names."""
        return {estimate.method: estimate for estimate in self.estimates}

    def place(self, value: float) -> float:
        """A value's position on the axis, in percent."""
        return 100 * min(1.0, max(0.0, value / self.end))


@dataclass(frozen=True)
class Item:
    """A map in the galleries."""

    number: int
    key: str
    class_name: str
    target: str
    """What is explained, as the rows call it: a class's number, or an expression."""
    label: str | None
    is_right: bool | None
    """Whether the record's prediction is its label; None if that is not known."""
    score: str
    """As `score_text` writes it."""
    galleries: tuple[str, ...]
    ranked: tuple[Fact, ...]
    """Values of the metrics that put it into a gallery."""
    facts: tuple[Fact, ...]
    picture: Picture
    products: tuple[ProductPictures, ...]
    """Pictures of the map's side products, for the first maps only."""

    @property
    def verdict(self) -> str:
        """Whether the record's prediction is its label: `right`, `wrong` or `unknown`."""
        return {True: "right", False: "wrong", None: "unknown"}[self.is_right]

    @property
    def words(self) -> tuple[str, ...]:
        """The words that the search covers."""
        return tuple(clipped(text, MAX_SEARCHED) for text in (self.key, self.class_name, self.label or ""))


@dataclass(frozen=True)
class Report:
    """The whole page."""

    title: str
    """The data set's name."""
    subtitle: str
    made: str
    """The time at which it was made, UTC."""
    notices: tuple[Notice, ...]
    tiles: tuple[Tile, ...]
    run: tuple[Fact, ...]
    accounting: Accounting
    quality: tuple[Fact, ...]
    """How often the model is right, and how many maps are flat."""
    metrics: tuple[Metric, ...]
    verdicts: tuple[str, ...]
    """On how many metrics the method beats the controls, and where one is better."""
    missing: tuple[Fact, ...]
    """Metrics for which no method has a value, and why."""
    galleries: tuple[Gallery, ...]
    items: tuple[Item, ...]
    has_boxes: bool
    """Whether the objects' boxes are drawn."""
    num_gone: int
    """Shown maps whose image can no longer be read."""
    findings: Findings | None
    cost: tuple[Fact, ...]
    provenance: tuple[Fact, ...]
    runs: tuple[tuple[Fact, ...], ...]
    commands: tuple[Fact, ...]


def report_of(
    output: Output,
    endpoint_url: str | None,
    made: datetime,
    progress: Callable[[str, int], Callable[[], None]],
    known: KnownTruth = NO_TRUTH,
) -> Report:
    """Reads the output, fragment by fragment, and the images that are shown.

    `known`: the ground truth whose boxes are drawn. `progress` takes a step's verb and number of parts, and returns a
    function to call after each part. Raises StoreError, and UnreconciledError if the output is damaged.
    """
    store, plan = output.store, output.plan
    job_state = read_job_state(store, plan)
    audit = read_audit(store)
    is_stale = audit is not None and audit.fragments != digest_of_fragments(committed(store, plan))
    table = _comparison(output)
    metrics = tuple(_metrics(table)) if table else ()
    selection = select_maps(store, plan, _ranked(table), progress("read", len(plan.units)))
    shown = galleries(selection, audit)
    items = tuple(_items(output, endpoint_url, shown, audit, progress, known.truth))
    places = {Ref(item.key, item.target): item.number for item in items}
    findings = findings_of(audit, places, read_examples(store, audit.findings)) if audit else None
    accounting = _accounting(job_state, selection.rejected.values)
    return Report(
        title=PurePosixPath(plan.identity["data"]).name or plan.identity["data"],
        subtitle=f"{plan.identity['explainer']} maps of {plan.identity['model']}",
        made=f"{made:%Y-%m-%d %H:%M} UTC",
        notices=(
            *_notices(output, job_state, audit, is_stale=is_stale),
            *([] if known.note is None else [Notice(f"{known.note[0].upper()}{known.note[1:]}.")]),
        ),
        has_boxes=known.truth is not None,
        tiles=tuple(_tiles(accounting, job_state, metrics, audit)),
        run=tuple(
            run_facts(
                plan,
                model_of(store),
                selection.selected_by,
                planned_forward(store),
                stored_preflight(store),
                planned_labels(store),
            )
        ),
        accounting=accounting,
        quality=tuple(_quality(job_state)),
        metrics=metrics,
        verdicts=verdicts(table) if table else (),
        missing=tuple(_missing(table)) if table else (),
        galleries=tuple(shown),
        items=items,
        num_gone=sum(item.picture.is_gone for item in items),
        findings=findings,
        cost=tuple(cost_facts(job_state, workers_of(store))),
        provenance=tuple(provenance_facts(job_state, model_of(store))),
        runs=tuple(runs_of(store)),
        commands=tuple(commands(output, has_audit=audit is not None, has_values=len(metrics) > 2)),
    )


def _quality(job_state: JobState) -> Iterator[Fact]:
    if job_state.accuracy is not None:
        right, *guesses = job_state.accuracy.facts
        yield Fact("accuracy", right, "; ".join(guesses))
    if job_state.num_maps:
        yield Fact("flat maps", job_state.flat_fact, "a flat map has one value everywhere: it says nothing")


def _notices(output: Output, job_state: JobState, audit: Audit | None, *, is_stale: bool) -> Iterator[Notice]:
    yield from map(Notice, job_state.warnings)
    name = shlex.quote(output.name)
    num_open = len(job_state.open_units)
    if num_open:
        still = f"{counted(num_open, 'unit')} of {len(job_state.plan.units):,} still open"
        yield Notice(f"This output is not finished: {still}. The same `explain` goes on from there; then report again.")
    elif final_manifest(output.store, job_state.plan) is None:
        command = f"blocksight retry {name}" if job_state.dead else f"blocksight finalize {name}"
        yield Notice("This output is not finished: no unit is open, but there is no final manifest.", command)
    if audit is None:
        yield Notice(
            "These maps are not audited yet: findings, groups and clusters are missing below.", audit_command(name)
        )
    elif is_stale:
        yield Notice("The audit below is out of date: the output has other fragments now.", audit_command(name))


def _tiles(
    accounting: Accounting, job_state: JobState, metrics: Sequence[Metric], audit: Audit | None
) -> Iterator[Tile]:
    yield Tile(f"{accounting.num_ok:,}", "explained", f"of {counted(accounting.num_records, 'committed record')}")
    yield Tile(f"{accounting.num_rejected:,}", "rejected", "each with its reason")
    accuracy = job_state.accuracy
    if accuracy is not None and accuracy.num_records:
        of = f"{accuracy.num_right:,} of {counted(accuracy.num_records, 'record')}"
        yield Tile(percent(accuracy.share), "right", f"{of}; chance is {percent(accuracy.chance)}")
    if job_state.num_flat:
        yield Tile(
            f"{job_state.num_flat:,}", "flat maps" if job_state.num_flat > 1 else "flat map", job_state.flat_fact
        )
    if audit is not None:
        number, noun = counted(len(audit.findings), "finding").split()
        suspicions, rest = counted(len(audit.suspicions), "suspicion"), len(audit.not_confirmed)
        yield Tile(number, noun, f"and {suspicions}; {rest:,} tested, not confirmed")
        number, noun = counted(sum(audit.gates.values()), "alarm").split()
        yield Tile(number, noun, f"of validity gates, over {counted(audit.num_maps, 'map')}")
    for metric in metrics[:1]:
        own = metric.estimates[0].cell.estimate
        if own.mean is not None:
            yield Tile(with_unit(own.mean, metric.unit), f"mean {metric.name}", f"{metric.better} is better")


def clipped(text: str, most: int) -> str:
    """The text, cut to at most `most` characters; an ellipsis marks the cut."""
    return text if len(text) <= most else f"{text[: most - 1]}…"


def with_unit(value: float, unit: str) -> str:
    """A value of a metric with its unit: `57.62 %`, `0.512`."""
    return f"{value:.2f} %" if unit == "%" else f"{value:.3f}"


def _accounting(job_state: JobState, examples: Sequence[Rejected]) -> Accounting:
    num_rejected = job_state.total("num_rejected")
    dead = sorted(job_state.dead.values(), key=lambda letter: letter.ordinal)
    return Accounting(
        num_planned=job_state.plan.num_records,
        is_exact=job_state.plan.is_exact,
        num_records=job_state.total("num_records"),
        num_ok=job_state.total("num_ok"),
        num_rejected=num_rejected,
        num_rows=job_state.total("num_rows"),
        num_units=len(job_state.plan.units),
        num_committed=len(job_state.receipts),
        num_open=len(job_state.open_units),
        rejects=tuple(Share(code, count, count / num_rejected) for code, count in job_state.rejects.most_common()),
        examples=tuple(examples),
        dead=tuple(dead[:MAX_DEAD]),
        num_dead=len(dead),
    )


def _comparison(output: Output) -> Comparison | None:
    """The comparison of the output's methods, controls included; None if it has no value."""
    try:
        return compare([output])
    except ConfigError:
        return None


def _metrics(table: Comparison) -> Iterator[Metric]:
    for column in table.columns:
        entry = METRICS[column.metric]
        own = [cell for cell in table.cells if cell.column == column and cell.estimate.mean is not None]
        highest = max((cell.estimate.high or cell.estimate.mean or 0.0 for cell in own), default=0.0)
        yield Metric(
            column.metric,
            entry.meaning,
            entry.better,
            entry.unit,
            column.protocol,
            RANGES.get(entry.unit) or highest or 1.0,
            tuple(
                Estimate(method.name, method.explainer in CONTROLS, cell)
                for cell, method in ((cell, table.methods[cell.method]) for cell in own)
            ),
            tuple(_absence(one, table.methods[one.method].name) for one in table.absences if one.column == column),
        )


def _missing(table: Comparison) -> Iterator[Fact]:
    for one in table.absences:
        if one.column not in table.columns:
            yield _absence(one, f"{one.column.metric} of {table.methods[one.method].name}")


def _absence(one: Absence, name: str) -> Fact:
    return Fact(name, "no value", clipped(one.reason, MAX_REASON))


def _ranked(table: Comparison | None) -> list[Column]:
    """For each ranking metric, the column with the most values of the output's own method."""
    own = [cell for cell in table.cells if cell.method == 0] if table else []
    found: dict[str, Cell] = {}
    for cell in own:
        name = cell.column.metric
        if name in RANKING and cell.estimate.count > (found[name].estimate.count if name in found else 0):
            found[name] = cell
    return [found[name].column for name in RANKING if name in found]


def _items(
    output: Output,
    endpoint_url: str | None,
    shown: Sequence[Gallery],
    audit: Audit | None,
    progress: Callable[[str, int], Callable[[], None]],
    truth: Truth | None,
) -> Iterator[Item]:
    """The maps of all galleries, in the order of their first appearance."""
    reasons: dict[Ref, list[str]] = {}
    for gallery in shown:
        for ref in gallery.refs:
            reasons.setdefault(ref, []).append(gallery.name)
    update = progress("draw", len(reasons))
    found = dict(drawn(output, endpoint_url, tuple(reasons), update, truth))
    details, ranked, readout = _details(audit), _ranked_by(shown), readout_of(output.store)
    titles = {gallery.name: gallery.title for gallery in shown}
    for number, ref in enumerate(ref for ref in reasons if ref in found):
        row = found[ref].row
        why = Fact("shown as", ", ".join(titles[name].lower() for name in reasons[ref]))
        yield Item(
            number,
            ref.key,
            row["target_name"] or f"class {ref.target}",
            ref.target,
            row["label_name"],
            is_right([row]),
            target_score_text(row, readout),
            tuple(reasons[ref]),
            tuple(ranked.get(ref, {}).values()),
            (*_row_facts(row, ranked.get(ref, {}), readout), *details.get(ref, ()), why),
            found[ref].picture,
            found[ref].products,
        )


def _ranked_by(shown: Sequence[Gallery]) -> dict[Ref, dict[str, Fact]]:
    """The values of the ranking metrics, by map and metric."""
    found: dict[Ref, dict[str, Fact]] = {}
    for gallery in shown:
        if gallery.metric is not None:
            metric = METRICS[gallery.metric]
            for ref, value in gallery.values.items():
                fact = Fact(gallery.metric, with_unit(value, metric.unit), f"{metric.better} is better")
                found.setdefault(ref, {})[gallery.metric] = fact
    return found


def _details(audit: Audit | None) -> dict[Ref, list[Fact]]:
    """The audit's oddities as facts, by map."""
    found: dict[Ref, list[Fact]] = {}
    for one in audit.oddities if audit else ():
        found.setdefault(Ref(one.key, str(one.target_index)), []).append(Fact(one.reason, one.detail))
    return found


def _target_facts(row: Mapping[str, Any], readout: ReadoutName) -> Iterator[Fact]:
    index, rank = row["target_index"], row["target_rank"]
    if index is None:
        yield Fact("explained target", row["target_name"], row["target"])
    else:
        yield Fact("explained class", class_name(row["target_name"], index), f"number {index}")
    kind = "the model's output itself" if readout == "identity" else "probability"
    kind = kind if is_class_score(row) else f"the value of {row['target_formula']}"
    place = "" if rank is None else f", rank {rank} of the model's classes"
    yield Fact("score", f"{row['score']:.3f}", f"{kind}{place}")


def _row_facts(row: Mapping[str, Any], ranked: Mapping[str, Fact], readout: ReadoutName) -> Iterator[Fact]:
    yield Fact("record", row["key"])
    yield from _target_facts(row, readout)
    verdict = {True: "the prediction is right", False: "the prediction is wrong", None: ""}[is_right([row])]
    yield Fact("label", row["label_name"] or "not known", verdict)
    metrics = row["metrics"] or {}
    if metrics.get("drop") is not None:
        grew = "; the score grew" if metrics["increase"] else ""
        yield Fact("drop", with_unit(metrics["drop"], "%"), f"lower is better{grew}")
    yield from (fact for name, fact in ranked.items() if name != "drop")
    yield Fact("image", f"{row['width']} x {row['height']} pixels", f"{row['format']}, {size(row['num_bytes'])}")
    flags = [name for name in ("flat", "saturated") if row[f"is_{name}"]]
    if flags:
        yield Fact("the map is", ", ".join(flags), "; ".join(GATES[flag] for flag in flags))
    yield from (Fact(name, text) for name, text in said_of(products_of(row)))
    if row["fidelity"] is not None:
        yield Fact("fidelity", row["fidelity"], row["fidelity_reason"])
    yield Fact("masked forwards", f"{row['num_forwards']:,}")
