"""What a report says, as plain values: every figure is one that `status`, `compare` or the audit gives too."""

import hashlib
import io
import json
import shlex
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import groupby
from pathlib import PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from engine.catalog import CONTROLS, METRICS
from jobs.audit.result import GATES, MEASURES, Audit, Cluster, Effect, Grid, Group, Shortcut, Spread, read_audit
from jobs.compare import Cell, Column, Comparison, Output, compare
from jobs.config import ConfigError
from jobs.plan import MODEL_KEY, Plan
from jobs.progress import clock, counted
from jobs.reconcile import Standing, final_manifest, stand
from jobs.records import DeadLetter
from jobs.report.galleries import RANKING, Gallery, Picture, Ref, Rejected, data_uri, galleries, members, pictures
from jobs.report.galleries import select as select_maps
from jobs.stopping import RUNS_FOLDER
from storage.pictures import colours, resized
from storage.store import MissingError, ObjectStore

MAX_GROUPS, MAX_PAIRS, MAX_CLUSTERED, MAX_SHORTCUTS, MAX_ODDITIES, MAX_NOTES = 12, 8, 8, 12, 8, 20
MAX_DEAD, MAX_RUNS = 20, 10
MEAN_MAP_SIDE = 96
"""Pixels of a group's small picture."""
RANGES = {"%": 100.0, "0 to 1": 1.0, "0 to 90": 90.0}
"""Where the axis of a metric ends, by its unit; of other units, at the greatest value shown."""
RUN_FACTS = ("started", "device", "python", "packages")
"""What a page tells of a run; its host, address and process stay in the bucket."""


@dataclass(frozen=True)
class Notice:
    """A sentence that stands above everything else."""

    text: str
    command: str | None = None
    """The way out."""


@dataclass(frozen=True)
class Fact:
    """A name and what it is."""

    name: str
    value: str
    note: str = ""
    is_code: bool = False


@dataclass(frozen=True)
class Tile:
    """A figure that is worth a glance."""

    value: str
    name: str
    note: str = ""


@dataclass(frozen=True)
class Share:
    """A count as a part of a whole."""

    name: str
    count: int
    share: float
    """0 to 1."""
    note: str = ""


@dataclass(frozen=True)
class Accounting:
    """What became of every record."""

    num_planned: int
    is_exact: bool
    """Whether the planned number was counted, not estimated."""
    num_records: int
    """That stand in the output: explained and rejected."""
    num_ok: int
    num_rejected: int
    num_rows: int
    num_units: int
    num_committed: int
    num_open: int
    rejects: tuple[Share, ...]
    """By code, the most frequent first, as shares of the rejected."""
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
    """What was measured by one metric under one protocol."""

    name: str
    meaning: str
    better: str
    unit: str
    protocol: str
    end: float
    """Of the axis, which begins at 0."""
    estimates: tuple[Estimate, ...]

    def place(self, value: float) -> float:
        """A value's place on the axis in percent."""
        return 100 * min(1.0, max(0.0, value / self.end))


@dataclass(frozen=True)
class Item:
    """A map in the galleries."""

    number: int
    key: str
    class_name: str
    target_index: int
    label: str | None
    score: float
    galleries: tuple[str, ...]
    facts: tuple[Fact, ...]
    picture: Picture


@dataclass(frozen=True)
class Pictured:
    """Something of the audit, with its small picture and the places of its maps in the galleries."""

    about: Any
    picture: str | None
    items: tuple[int, ...] = ()


@dataclass(frozen=True)
class Findings:
    """What the audit says."""

    audit: Audit
    shortcuts: tuple[Pictured, ...]
    """Of `Shortcut`."""
    reach: float
    """The effects lie within this of 0, in log-odds."""
    gates: tuple[Share, ...]
    measures: tuple[tuple[str, str, Spread], ...]
    """Name, meaning and spread over all maps."""
    everything: tuple[Fact, ...]
    """Small pictures of all maps together: name, data: URI and meaning."""
    groups: tuple[Pictured, ...]
    """Of `Group`: of classes and predictions."""
    pairs: tuple[Pictured, ...]
    """Of `Group`: of a label taken for another class."""
    clusters: tuple[tuple[str, tuple[Pictured, ...]], ...]
    """Class by class, of `Cluster`."""
    oddities: tuple[Pictured, ...]
    """Of `Oddity`."""
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Report:
    """The whole page."""

    title: str
    made: str
    notices: tuple[Notice, ...]
    tiles: tuple[Tile, ...]
    run: tuple[Fact, ...]
    accounting: Accounting
    metrics: tuple[Metric, ...]
    galleries: tuple[Gallery, ...]
    items: tuple[Item, ...]
    num_gone: int
    """Shown maps whose image cannot be read any more."""
    findings: Findings | None
    cost: tuple[Fact, ...]
    provenance: tuple[Fact, ...]
    runs: tuple[tuple[Fact, ...], ...]
    commands: tuple[Fact, ...]


def report_of(
    output: Output,
    endpoint_url: str | None,
    made: datetime,
    digest_of_fragments: Callable[[ObjectStore], str],
    progress: Callable[[str, int], Callable[[], None]],
) -> Report:
    """Reads the output, fragment by fragment, and the images that are shown.

    `digest_of_fragments` is what an audit names as its ground. `progress` begins a step of so many parts and returns
    what is to be called after each. Raises StoreError, and UnreconciledError where something is damaged.
    """
    store, plan = output.store, output.plan
    standing = stand(store, plan)
    audit = read_audit(store)
    is_stale = audit is not None and audit.fragments != digest_of_fragments(store)
    table = _comparison(output)
    metrics = tuple(_metrics(table)) if table else ()
    selection = select_maps(store, plan, _ranked(table), progress("reading rows", len(plan.units)))
    shown = galleries(selection, audit)
    items = tuple(_items(output, endpoint_url, shown, audit, progress))
    places = {Ref(item.key, item.target_index): item.number for item in items}
    findings = _findings(audit, places) if audit else None
    accounting = _accounting(standing, selection.rejected.values)
    return Report(
        title=PurePosixPath(str(plan.identity["data"])).name,
        made=f"{made:%Y-%m-%d %H:%M} UTC",
        notices=tuple(_notices(output, standing, audit, is_stale=is_stale)),
        tiles=tuple(_tiles(accounting, metrics, audit)),
        run=tuple(_run_facts(plan, _model(store))),
        accounting=accounting,
        metrics=metrics,
        galleries=tuple(shown),
        items=items,
        num_gone=sum(item.picture.is_gone for item in items),
        findings=findings,
        cost=tuple(_cost(standing)),
        provenance=tuple(_provenance(standing, _model(store))),
        runs=tuple(_runs(store)),
        commands=tuple(_commands(output, has_audit=audit is not None, has_values=len(metrics) > 2)),
    )


def _notices(output: Output, standing: Standing, audit: Audit | None, *, is_stale: bool) -> Iterator[Notice]:
    name = shlex.quote(output.name)
    num_open = len(standing.open_units)
    if num_open:
        still = f"{counted(num_open, 'unit')} of {len(standing.plan.units):,} still open"
        yield Notice(f"This output is not finished: {still}. The same `explain` goes on from there; then report again.")
    elif final_manifest(output.store) is None:
        way = f"blocksight retry {name}" if standing.dead else f"blocksight finalize {name}"
        yield Notice("This output is not finished: every unit is settled, and no final manifest stands.", way)
    if audit is None:
        yield Notice("These maps were not audited yet: findings, groups and clusters are missing below.", _audit(name))
    elif is_stale:
        yield Notice("The audit below is out of date: it was made from other fragments than stand now.", _audit(name))


def _audit(name: str) -> str:
    return f"blocksight audit {name}"


def _tiles(accounting: Accounting, metrics: Sequence[Metric], audit: Audit | None) -> Iterator[Tile]:
    yield Tile(f"{accounting.num_ok:,}", "explained", f"of {accounting.num_records:,} records that stand")
    yield Tile(f"{accounting.num_rejected:,}", "rejected", "each with its reason")
    if audit is not None:
        tried = counted(len(audit.suspicions), "suspicion")
        yield Tile(f"{len(audit.findings):,}", "findings", f"and {tried} that nothing confirms")
        stopped = sum(audit.gates.values())
        yield Tile(f"{stopped:,}", "alarms", f"of validity gates, over {counted(audit.num_maps, 'map')}")
    for metric in metrics[:1]:
        own = metric.estimates[0].cell.estimate
        if own.mean is not None:
            yield Tile(said(own.mean, metric.unit), f"mean {metric.name}", f"{metric.better} is better")


def said(value: float, unit: str) -> str:
    """A value of a metric with its unit: `57.62 %`, `0.512`."""
    return f"{value:.2f} %" if unit == "%" else f"{value:.3f}"


def _run_facts(plan: Plan, model: Mapping[str, Any]) -> Iterator[Fact]:
    identity = plan.identity
    yield Fact("data", identity["data"], f"{plan.num_objects:,} objects, {size(plan.num_bytes)}, as {plan.layout}")
    weights = identity["weights"] or "packaged"
    yield Fact("model", identity["model"], f"weights: {weights}")
    if model:
        height, width = model["input_size"]
        yield Fact("input", f"{height} x {width} pixels", f"{_resize(identity['resize'])}; {model['num_classes']} classes")
        places = ", ".join(f"{own['name']} ({own['channels']} at {own['height']} x {own['width']})" for own in model["blocks"])
        if places:
            yield Fact("blocks", places, "feature maps that the explainer looks at")
    yield Fact("explainer", identity["explainer"], f"fidelity {identity['fidelity']}, preset {identity['preset']}")
    chosen = ", ".join(f"{name} = {value}" for name, value in sorted(identity["parameters"].items()))
    yield Fact("parameters", chosen or "none")
    yield Fact("target", identity["target"], "the class whose score is explained")
    yield Fact("seed", str(identity["seed"]), "of everything random")
    if identity["limit"] is not None:
        yield Fact("limit", f"{identity['limit']:,} records", "only the first of the data set")


def _resize(how: str) -> str:
    return {"squash": "the whole image is squashed to it", "crop": "the image's centre is cropped to it"}.get(how, how)


def size(num_bytes: float) -> str:
    """`1.2 MiB`."""
    return f"{num_bytes / 2**20:,.1f} MiB" if num_bytes >= 2**19 else f"{num_bytes / 2**10:,.1f} KiB"


def _accounting(standing: Standing, examples: Sequence[Rejected]) -> Accounting:
    num_rejected = standing.total("num_rejected")
    dead = sorted(standing.dead.values(), key=lambda letter: letter.ordinal)
    return Accounting(
        num_planned=standing.plan.num_records,
        is_exact=standing.plan.is_exact,
        num_records=standing.total("num_records"),
        num_ok=standing.total("num_ok"),
        num_rejected=num_rejected,
        num_rows=standing.total("num_rows"),
        num_units=len(standing.plan.units),
        num_committed=len(standing.receipts),
        num_open=len(standing.open_units),
        rejects=tuple(Share(code, count, count / num_rejected) for code, count in standing.rejects.most_common()),
        examples=tuple(examples),
        dead=tuple(dead[:MAX_DEAD]),
        num_dead=len(dead),
    )


def _comparison(output: Output) -> Comparison | None:
    """The methods and metrics that stand in the output, controls included; None: there is no value."""
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
        )


def _ranked(table: Comparison | None) -> list[Column]:
    """The column of each ranking metric under which most maps of the output's own method were measured."""
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
) -> Iterator[Item]:
    """The maps of all galleries in the order in which they are first met."""
    reasons: dict[Ref, list[str]] = {}
    for gallery in shown:
        for ref in gallery.refs:
            reasons.setdefault(ref, []).append(gallery.name)
    update = progress("drawing maps", len(reasons))
    drawn = {
        Ref(row["key"], row["target_index"]): (row, picture)
        for row, picture in pictures(output.store, output.plan, endpoint_url, reasons, update)
    }
    details = _details(audit)
    titles = {gallery.name: gallery.title for gallery in shown}
    for number, ref in enumerate(ref for ref in reasons if ref in drawn):
        row, picture = drawn[ref]
        why = Fact("shown as", ", ".join(titles[name].lower() for name in reasons[ref]))
        yield Item(
            number,
            ref.key,
            class_name(row["target_name"], ref.target_index),
            ref.target_index,
            row["label_name"],
            row["score"],
            tuple(reasons[ref]),
            (*_row_facts(row), *details.get(ref, ()), why),
            picture,
        )


def class_name(name: str | None, index: int) -> str:
    """A class by its name, or by its number where the model knows none."""
    return name or f"class {index}"


def _details(audit: Audit | None) -> dict[Ref, list[Fact]]:
    """What the audit says of single maps."""
    found: dict[Ref, list[Fact]] = {}
    for one in audit.oddities if audit else ():
        found.setdefault(Ref(one.key, one.target_index), []).append(Fact(one.reason, one.detail))
    return found


def _row_facts(row: Mapping[str, Any]) -> Iterator[Fact]:
    yield Fact("record", row["key"])
    yield Fact("explained class", class_name(row["target_name"], row["target_index"]), f"number {row['target_index']}")
    yield Fact("score", f"{row['score']:.3f}", f"probability, rank {row['target_rank'] + 1} of the model's classes")
    yield Fact("label", row["label_name"] or "not known")
    metrics = row["metrics"] or {}
    if metrics.get("drop") is not None:
        grew = "; the score grew" if metrics["increase"] else ""
        yield Fact("drop", said(metrics["drop"], "%"), f"lower is better{grew}")
    yield Fact("image", f"{row['width']} x {row['height']} pixels", f"{row['format']}, {size(row['num_bytes'])}")
    flags = [name for name in ("flat", "saturated") if row[f"is_{name}"]]
    if flags:
        yield Fact("the map is", ", ".join(flags), "; ".join(GATES[flag] for flag in flags))
    if row["fidelity"] is not None:
        yield Fact("fidelity", row["fidelity"], row["fidelity_reason"])
    yield Fact("masked forwards", f"{row['num_forwards']:,}")


def _findings(audit: Audit, places: Mapping[Ref, int]) -> Findings:
    def items_of(refs: Sequence[Ref]) -> tuple[int, ...]:
        return tuple(places[ref] for ref in refs if ref in places)

    by_kind = {kind: list(own) for kind, own in groupby(audit.groups, lambda group: group.kind)}
    everything = by_kind.get("all", [])[:1]
    predicted = {group.predicted: group for group in by_kind.get("predicted", [])}
    classes = (by_kind.get("class") or by_kind.get("predicted") or [])[:MAX_GROUPS]
    shortcuts = audit.shortcuts[:MAX_SHORTCUTS]
    return Findings(
        audit=audit,
        shortcuts=tuple(
            Pictured(one, _class_map(one, predicted, audit.clusters), items_of(members(one))) for one in shortcuts
        ),
        reach=_reach(shortcuts),
        gates=tuple(
            Share(name, count, count / max(1, audit.num_maps), GATES.get(name, ""))
            for name, count in audit.gates.items()
        ),
        measures=tuple(
            (name, meaning, everything[0].spreads[name])
            for name, meaning in MEASURES.items()
            if everything and name in everything[0].spreads
        ),
        everything=tuple(fact for group in everything for fact in _overall(group)),
        groups=tuple(Pictured(group, map_picture(group.mean_map)) for group in classes),
        pairs=tuple(Pictured(group, map_picture(group.mean_map)) for group in by_kind.get("pair", [])[:MAX_PAIRS]),
        clusters=tuple(_clusters(audit.clusters, items_of)),
        oddities=tuple(
            Pictured(one, None, items_of([Ref(one.key, one.target_index)])) for one in audit.oddities[:MAX_ODDITIES]
        ),
        notes=audit.notes[:MAX_NOTES],
    )


def _overall(group: Group) -> Iterator[Fact]:
    yield Fact("mean", map_picture(group.mean_map), "where the maps look on average")
    yield Fact("variance", map_picture(group.variance_map), "where they differ from each other")


def _class_map(one: Shortcut, predicted: Mapping[str | None, Group], clusters: Sequence[Cluster]) -> str | None:
    """The small picture of what the candidate came from."""
    for cluster in clusters:
        if cluster.target_index == one.target_index and one.source == f"cluster {cluster.number}":
            return map_picture(cluster.mean_map)
    group = predicted.get(one.target_name)
    return map_picture(group.mean_map) if group else None


def _reach(shortcuts: Sequence[Shortcut]) -> float:
    effects: list[Effect | None] = [effect for one in shortcuts for effect in (one.blanked, one.pasted)]
    ends = [abs(end) for effect in effects if effect for end in (effect.low, effect.high, effect.mean)]
    return max(ends, default=0.0) or 1.0


def _clusters(
    clusters: Sequence[Cluster], items_of: Callable[[Sequence[Ref]], tuple[int, ...]]
) -> Iterator[tuple[str, tuple[Pictured, ...]]]:
    for number, (target, own) in enumerate(groupby(clusters, lambda cluster: cluster.target_index)):
        if number == MAX_CLUSTERED:
            return
        found = list(own)
        drawn = (
            Pictured(one, map_picture(one.mean_map), items_of([Ref(key, target) for key in one.examples]))
            for one in found
        )
        yield class_name(found[0].target_name, target), tuple(drawn)


def map_picture(grid: Grid) -> str:
    """A pooled map as a data: URI of a PNG of `MEAN_MAP_SIDE` pixels, from its own least to its greatest value."""
    low, high = float(grid.min()), float(grid.max())
    scaled: NDArray[np.floating] = (grid - low) / (high - low) if high > low else np.zeros_like(grid)
    buffer = io.BytesIO()
    Image.fromarray(colours(resized(scaled, (MEAN_MAP_SIDE, MEAN_MAP_SIDE)))).quantize(64).save(buffer, "PNG")
    return data_uri(buffer.getvalue(), "image/png")


def place_of(box: Sequence[float]) -> str:
    """A region in words: `top left`, `middle`, `most of the picture`."""
    left, top, right, bottom = box
    if (right - left) * (bottom - top) > 0.6:
        return "most of the picture"
    across = _third((left + right) / 2, ("left", "", "right"))
    down = _third((top + bottom) / 2, ("top", "", "bottom"))
    return f"{down} {across}".strip() or "middle"


def _third(value: float, names: Sequence[str]) -> str:
    return names[min(2, int(3 * value))]


def _cost(standing: Standing) -> Iterator[Fact]:
    timed = [receipt for receipt in standing.receipts.values() if receipt.explain_seconds]  # a rebuilt one is not
    seconds = sum(receipt.explain_seconds or 0.0 for receipt in timed)
    forwards, num_ok = standing.total("num_forwards"), standing.total("num_ok")
    each = f"{forwards / num_ok:,.0f} a record" if num_ok else ""
    yield Fact("masked forwards", f"{forwards:,}", each)
    if seconds:
        records = sum(receipt.num_records for receipt in timed)
        yield Fact("worker time", f"{clock(seconds)} h:min:s" if seconds >= 3600 else f"{clock(seconds)} min:s",
                   f"explaining {counted(records, 'record')}, all workers together")
        yield Fact("throughput", f"{records / seconds:,.2f} records/s", f"of one worker; {seconds / records:,.2f} s a record")
        rate = sum(receipt.num_forwards for receipt in timed) / seconds
        if rate:
            yield Fact("masked forwards/s", f"{rate:,.0f}", "of one worker")
    workers = {receipt.worker for receipt in timed if receipt.worker}
    if workers:
        yield Fact("workers", f"{len(workers):,}", "processes that committed fragments")
    ways = Counter(receipt.forward for receipt in timed if receipt.forward)
    for way, count in ways.most_common():
        yield Fact("forward pass", way, counted(count, "unit"))
    num_bytes, num_rows = standing.total("num_bytes"), standing.total("num_rows")
    each = f"{size(num_bytes / num_rows)} a row" if num_rows else ""
    yield Fact("output", size(num_bytes), each)


def _model(store: ObjectStore) -> Mapping[str, Any]:
    """What the model is; empty before it was loaded."""
    try:
        return json.loads(store.read(MODEL_KEY))
    except MissingError:
        return {}


def _provenance(standing: Standing, model: Mapping[str, Any]) -> Iterator[Fact]:
    identity = standing.plan.identity
    yield Fact("plan fingerprint", standing.plan.fingerprint, "hash of all that changes the result", is_code=True)
    if model:
        yield Fact("weights sha256", model["weights_sha256"], "over all weights and buffers", is_code=True)
    hashes = [receipt.sha256 for receipt in sorted(standing.receipts.values(), key=lambda own: own.ordinal)]
    digest = hashlib.sha256("\n".join(hashes).encode()).hexdigest()
    said = f"sha256 over the sha256 of {counted(len(hashes), 'fragment')}, in the plan's order"
    yield Fact("fragments", digest, said, is_code=True)
    yield Fact("code version", str(identity["code"]), "raised whenever the same input would give other bytes")
    yield Fact("schema version", str(identity["schema"]), f"map codec {identity['codec']}")


def _runs(store: ObjectStore) -> Iterator[tuple[Fact, ...]]:
    """The latest runs, newest first; of each only what tells no place and no secret."""
    keys = sorted((info.key for info in store.list(RUNS_FOLDER) if info.key.endswith("/run.json")), reverse=True)
    for key in keys[:MAX_RUNS]:
        try:
            facts = json.loads(store.read(key))
            packages = ", ".join(f"{name} {version}" for name, version in facts["packages"].items())
        except (ValueError, KeyError, AttributeError, MissingError):  # no run depends on what was noted of it
            continue
        yield tuple(
            Fact(name, packages if name == "packages" else str(facts[name])) for name in RUN_FACTS if name in facts
        )


def _commands(output: Output, *, has_audit: bool, has_values: bool) -> Iterator[Fact]:
    name, uri = shlex.quote(output.name), output.store.uri
    where = _sql_text(f"{uri}/data/*.parquet")
    yield Fact(
        "classes by Drop, in DuckDB",
        _duckdb(
            f"SELECT target_name, count(*) AS maps, avg(score) AS score, avg(metrics.drop) AS mean_drop FROM {where} "
            "WHERE status = 'ok' GROUP BY ALL ORDER BY mean_drop DESC"
        ),
    )
    if has_audit:
        rows = _sql_text(f"{uri}/audit/rows/*.parquet")
        yield Fact(
            "the oddest maps, in DuckDB",
            _duckdb(f"SELECT key, target_name, score, strangeness FROM {rows} ORDER BY strangeness DESC LIMIT 20"),
        )
    yield Fact("one record, as a picture", f"blocksight show {name} KEY")
    if not has_values:
        yield Fact("more metrics", f"blocksight evaluate {name} --controls")
    if not has_audit:
        yield Fact("shortcuts, groups, oddities", _audit(name))


def _sql_text(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _duckdb(sql: str) -> str:
    return f"duckdb -c {shlex.quote(sql)}"
