"""Compares outputs: a table of methods by metrics from stored rows, with bootstrap intervals and Holm's correction."""

import io
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from blocksight.engine.catalog.entries import METRICS
from blocksight.jobs.evaluate.bootstrap import (
    MethodEstimate,
    MetricSums,
    PairedDifference,
    holm,
    key_hashes,
)
from blocksight.jobs.evaluate.shares import differences_of, estimates_of
from blocksight.jobs.evaluate.stored_values import METHOD_COLUMNS, Share, shares_of, tables_of
from blocksight.jobs.ledger.reconcile import read_job_state
from blocksight.jobs.plan.config import ConfigError
from blocksight.jobs.plan.forward_setting import planned_forward, protocol_of, setting_difference
from blocksight.jobs.plan.labels import is_class_number
from blocksight.jobs.plan.preflight import readout_difference
from blocksight.jobs.worker.rows import Output, refuse_other_inputs
from blocksight.storage.stores.opening import open_file

VALUE = np.dtype([("image", np.uint64), ("target", np.uint64), ("value", np.float64)])


@dataclass(frozen=True)
class Method:
    """An explainer with its parameters, in one output."""

    name: str
    """Unique in the table."""
    explainer: str
    parameters: str
    """Digest of parameters, model and blocks."""
    output: str
    forward: str
    """Backend and precision of its forward passes."""


@dataclass(frozen=True)
class Column:
    """One metric under one protocol: values of different protocols are never mixed."""

    metric: str
    protocol: str


@dataclass(frozen=True)
class Cell:
    """A method's mean of a metric, and its difference to the reference on the maps that both have."""

    method: int
    """Index among the methods."""
    column: Column
    estimate: MethodEstimate
    difference: PairedDifference | None
    """None for the reference."""
    corrected_p: float | None
    """Corrected by Holm's method over all differences of the table; None if there is no difference."""


@dataclass(frozen=True)
class Absence:
    """A method without any value of a metric, such as the metric that picked its maps."""

    method: int
    """Index among the methods."""
    column: Column
    """In the table only if another method has values."""
    reason: str
    """The first map's reason."""


@dataclass(frozen=True)
class OutputQuality:
    """What to know of an output before its metrics are read."""

    output: str
    """As the user wrote it."""
    accuracy: tuple[str, ...]
    """How often its model is right; empty where no label is known."""
    flat: str
    """How many of its maps are flat."""
    warnings: tuple[str, ...]
    """Loud sentences about the model and the maps."""


@dataclass(frozen=True)
class Comparison:
    """The table of a comparison."""

    methods: tuple[Method, ...]
    """The first is the reference."""
    columns: tuple[Column, ...]
    cells: tuple[Cell, ...]
    """Method by method within each column."""
    absences: tuple[Absence, ...] = ()
    notes: tuple[str, ...] = ()
    """Warnings about the values."""
    outputs: tuple[OutputQuality, ...] = ()


def compare(outputs: Sequence[Output]) -> Comparison:
    """The table of all methods and metrics that the outputs hold.

    Raises ConfigError if there are no values, UnreconciledError if an object is damaged, and StoreError.
    """
    refuse_other_inputs(outputs)
    methods, num_values, reasons = _methods(outputs)
    if not num_values:
        why = f"every value is undefined ({min(reasons.values())})" if reasons else "run `blocksight explain` first"
        raise ConfigError(f"the outputs hold no value of any metric: {why}")
    sums: dict[Column, MetricSums] = {}
    for share in shares_of(outputs, num_values):
        for column, own in _share_sums(share, methods):
            sums[column] = sums[column] + own if column in sums else own
    columns = sorted(sums, key=lambda column: (list(METRICS).index(column.metric), column.protocol))
    cells = tuple(_cells(columns, sums))
    found = (
        setting_difference({output.name: planned_forward(output.store) for output in outputs}),
        readout_difference({output.name: output.store for output in outputs}),
    )
    absences = tuple(_absences(methods, cells, reasons))
    notes, outputs_quality = tuple(note for note in found if note is not None), tuple(map(_quality, outputs))
    return Comparison(tuple(methods.values()), tuple(columns), cells, absences, notes, outputs_quality)


def _quality(output: Output) -> OutputQuality:
    state = read_job_state(output.store, output.plan)
    accuracy = () if state.accuracy is None else state.accuracy.facts
    return OutputQuality(output.name, accuracy, state.flat_fact, state.warnings)


MethodKey = tuple[int, str, str]
"""Index of the output, explainer, digest of its parameters."""


Reasons = Mapping[tuple[MethodKey, Column], str]
"""Why a method lacks a value of a metric for some map."""


def _methods(outputs: Sequence[Output]) -> tuple[dict[MethodKey, Method], int, Reasons]:
    """The methods (controls last and each once), the number of values, and the reasons for missing values."""
    found: Counter[MethodKey] = Counter()
    reasons: dict[tuple[MethodKey, Column], str] = {}
    for number, output in enumerate(outputs):
        for table in tables_of(output):
            counts = table.group_by(METHOD_COLUMNS).aggregate([("value", "count")])  # counts no null
            for row in counts.to_pylist():
                found[number, row["explainer"], row["parameters"]] += row["value_count"]
            reasons = {**_reasons(number, table), **reasons}
    return _named_methods(outputs, found), found.total(), reasons


def _named_methods(outputs: Sequence[Output], found: dict[MethodKey, int]) -> dict[MethodKey, Method]:
    own = [key for key in found if key[1] == outputs[key[0]].plan.identity["explainer"]]
    controls = {key[1]: key for key in reversed(found) if key not in own}  # the first output's
    ordered = [*own, *sorted(controls.values(), key=list(found).index)]
    explainers = [explainer for _, explainer, _ in ordered]
    names: list[str] = []
    for number, explainer, _ in ordered:
        name = explainer if explainers.count(explainer) == 1 else f"{explainer} ({outputs[number].name})"
        names.append(name if name not in names else f"{name} #{len(names) + 1}")
    forwards = [protocol_of(planned_forward(output.store)) for output in outputs]
    return {
        key: Method(name, key[1], key[2], outputs[key[0]].store.uri, forwards[key[0]])
        for key, name in zip(ordered, names, strict=True)
    }


def _reasons(number: int, table: pa.Table) -> Reasons:
    """The reasons for the missing values of a table."""
    missing = table.filter(pc.field("value").is_null()).group_by(["metric", "protocol", *METHOD_COLUMNS])
    return {
        ((number, row["explainer"], row["parameters"]), Column(row["metric"], row["protocol"])): (
            row["reason_min"] or "no reason is stored"
        )
        for row in missing.aggregate([("reason", "min")]).to_pylist()
    }


def _absences(methods: Mapping[MethodKey, Method], cells: Sequence[Cell], reasons: Reasons) -> Iterator[Absence]:
    """The methods that were measured by a metric and have no value of it."""
    present = {(cell.method, cell.column) for cell in cells if cell.estimate.count}
    order = {key: place for place, key in enumerate(methods)}
    for (key, column), reason in reasons.items():
        if key in order and column.metric in METRICS and (order[key], column) not in present:
            yield Absence(order[key], column, reason)


def _share_sums(share: Share, methods: Mapping[MethodKey, Method]) -> Iterator[tuple[Column, MetricSums]]:
    """The sums of every column over one share."""
    order = {key: place for place, key in enumerate(methods)}
    found: dict[Column, dict[int, list[NDArray[Any]]]] = {}
    for number, everything in share:
        table = everything.filter(pc.field("value").is_valid())
        hashes, targets, values = (
            key_hashes(table["key"].to_pylist()),
            _target_numbers(table["target"]),
            table["value"].to_numpy(),
        )
        for column, method, places in _groups(table):
            if (number, *method) not in order:
                continue  # a control that is counted in another output
            block = _block(hashes[places], targets[places], values[places])
            found.setdefault(column, {}).setdefault(order[number, *method], []).append(block)
    for column, blocks in found.items():
        yield column, _sums({place: np.concatenate(own) for place, own in blocks.items()}, len(methods))


def _target_numbers(targets: pa.ChunkedArray) -> NDArray[np.uint64]:
    """A number for each target: a class's own, else a hash of its text."""
    encoded = targets.combine_chunks().dictionary_encode()
    texts = encoded.dictionary.to_pylist()
    hashes = key_hashes(texts)
    numbers = [int(text) if is_class_number(text) else int(own) for text, own in zip(texts, hashes, strict=True)]
    return np.array(numbers, dtype=np.uint64)[encoded.indices.to_numpy(zero_copy_only=False)]


def _block(images: NDArray[np.uint64], targets: NDArray[np.uint64], values: NDArray[np.float64]) -> NDArray[Any]:
    block = np.empty(len(values), VALUE)
    block["image"], block["target"], block["value"] = images, targets, values
    return block


def _groups(table: pa.Table) -> Iterator[tuple[Column, tuple[str, str], NDArray[np.intp]]]:
    """Row numbers by metric, protocol and method."""
    names = ["metric", "protocol", *METHOD_COLUMNS]
    numbered = table.append_column("place", pa.array(np.arange(len(table))))
    for row in numbered.group_by(names).aggregate([("place", "list")]).to_pylist():
        column = Column(row["metric"], row["protocol"])
        yield column, (row["explainer"], row["parameters"]), np.array(row["place_list"])


def _sums(blocks: Mapping[int, NDArray[Any]], num_methods: int) -> MetricSums:
    """One row per image and target, one column per method; NaN where a method has no value."""
    places = np.concatenate([np.stack([own["image"], own["target"]], 1) for own in blocks.values()])
    rows, inverse = np.unique(places, axis=0, return_inverse=True)
    values = np.full((len(rows), num_methods), np.nan)
    start = 0
    for method, own in blocks.items():
        values[inverse.ravel()[start : start + len(own)], method] = own["value"]
        start += len(own)
    return MetricSums.of(rows[:, 0], values)


def _cells(columns: Sequence[Column], sums: Mapping[Column, MetricSums]) -> Iterator[Cell]:
    made = {
        column: (estimates_of(column.metric, sums[column]), [None, *differences_of(column.metric, sums[column])])
        for column in columns
    }
    corrected = iter(holm([d and d.p_value for column in columns for d in made[column][1]]))
    for column in columns:
        for method, (own, difference) in enumerate(zip(*made[column], strict=True)):
            yield Cell(method, column, own, difference, next(corrected))


def rows_of_table(table: Comparison) -> list[dict[str, Any]]:
    """The cells as plain rows for storage."""
    reasons = {(absence.method, absence.column): absence.reason for absence in table.absences}
    return [
        {
            "method": table.methods[cell.method].name,
            "explainer": table.methods[cell.method].explainer,
            "parameters": table.methods[cell.method].parameters,
            "output": table.methods[cell.method].output,
            "forward": table.methods[cell.method].forward,
            "reference": table.methods[0].name,
            "metric": cell.column.metric,
            "protocol": cell.column.protocol,
            "better": METRICS[cell.column.metric].better,
            "mean": cell.estimate.mean,
            "low": cell.estimate.low,
            "high": cell.estimate.high,
            "count": cell.estimate.count,
            "difference": cell.difference and cell.difference.difference,
            "difference_low": cell.difference and cell.difference.low,
            "difference_high": cell.difference and cell.difference.high,
            "p_value": cell.difference and cell.difference.p_value,
            "p_corrected": cell.corrected_p,
            "paired_count": cell.difference and cell.difference.count,
            "reason": reasons.get((cell.method, cell.column)),
        }
        for cell in table.cells
    ]


def store_table(table: Comparison, uri: str, endpoint_url: str | None) -> None:
    """Writes the cells as one Parquet file; replaces an existing one. Raises StoreError."""
    store, name = open_file(uri, endpoint_url)
    body = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows_of_table(table)), body)
    store.put(name, body.getvalue())
