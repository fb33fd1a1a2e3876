"""Reads the values of metrics from outputs, and shares them out so that all of an image are in one share."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from blocksight.engine.saliency import FLAT, NEGATIVE
from blocksight.jobs.evaluate.bootstrap import key_hashes
from blocksight.jobs.evaluate.evaluation import evaluation_folders, fragment_key, value_tables
from blocksight.jobs.ledger.output import fragment_of, values_in
from blocksight.jobs.plan.records import Unit
from blocksight.jobs.worker.rows import Output
from blocksight.storage.outputs.schema import METRICS as METRICS_STRUCT
from blocksight.storage.outputs.schema import OK

STORED_COLUMNS = ["key", "target", "status", "explainer", "parameters", "metrics"]
METHOD_COLUMNS = ["explainer", "parameters"]
VALUE_COLUMNS = ["key", "target", *METHOD_COLUMNS, "metric", "protocol", "value", "reason"]
RECORDS_AT_ONCE = 20_000
"""Of outputs that are cut into the same units, whose values are summed up unit by unit; whole units, at least one."""
MAX_VALUES_IN_MEMORY = 20_000_000
"""Of outputs that are cut in different ways. More are read in several passes, each over another share of the images."""


Share = Iterator[tuple[int, pa.Table]]
"""Values with the index of their output; all of an image."""


def shares_of(outputs: Sequence[Output], num_values: int) -> Iterator[Share]:
    """The values, share by share: of the same units in all outputs, else of images with the same remainder."""
    if len({_cut(output) for output in outputs}) == 1:
        found = [_StoredValues(output) for output in outputs]
        for some in _grouped(outputs[0].plan.units):
            yield ((number, table) for number, own in enumerate(found) for at in some for table in own.of(at))
        return
    num_shares = -(-num_values // MAX_VALUES_IN_MEMORY)
    for which in range(num_shares):
        yield (
            (number, _with_remainder(table, which, num_shares))
            for number, output in enumerate(outputs)
            for table in tables_of(output)
        )


def _cut(output: Output) -> tuple[Any, ...]:
    """How an output's records are cut into units: equal for outputs whose units hold the same records."""
    units = output.plan.units
    return tuple((tuple(info.key for info in unit.objects), unit.start, unit.stop) for unit in units)


def _grouped(units: Sequence[Unit]) -> Iterator[list[int]]:
    """Places of consecutive units, as many as hold `RECORDS_AT_ONCE`."""
    some, num_records = list[int](), 0
    for place, unit in enumerate(units):
        if some and num_records + unit.num_records > RECORDS_AT_ONCE:
            yield some
            some, num_records = [], 0
        some.append(place)
        num_records += unit.num_records
    if some:
        yield some


class _StoredValues:
    """The values of an output, unit by unit."""

    def __init__(self, output: Output) -> None:
        self.store, self.units, self.folders = output.store, output.plan.units, evaluation_folders(output.store)
        self.keys = {info.key for prefix in ("data/", *self.folders) for info in output.store.list(prefix)}

    def of(self, place: int) -> Iterator[pa.Table]:
        """Those of `explain`, then of each evaluation, of the unit at this place of the plan."""
        unit = self.units[place]
        if unit.fragment_key in self.keys:
            yield _metric_rows(fragment_of(self.store, unit.fragment_key, STORED_COLUMNS))
        for folder in self.folders:
            if fragment_key(folder, unit) in self.keys:
                yield values_in(self.store, fragment_key(folder, unit)).select(VALUE_COLUMNS)


def _with_remainder(table: pa.Table, which: int, num_shares: int) -> pa.Table:
    """The rows of images whose hash leaves this remainder."""
    hashes = key_hashes(table["key"].to_pylist())
    return table.filter(pa.array(hashes % np.uint64(num_shares) == which))


def tables_of(output: Output) -> Iterator[pa.Table]:
    """All values, one table per fragment: those of `explain`, then of each evaluation; all with equal columns."""
    committed = {info.key for info in output.store.list("data/")}
    for unit in output.plan.units:
        if unit.fragment_key in committed:
            yield _metric_rows(fragment_of(output.store, unit.fragment_key, STORED_COLUMNS))
    for folder in evaluation_folders(output.store):
        for table in value_tables(output.store, folder):
            yield table.select(VALUE_COLUMNS)


def _metric_rows(rows: pa.Table) -> pa.Table:
    """Drop and Increase of a fragment's explained rows, one value per row."""
    sound = rows.filter(pc.field("status") == OK)
    metrics = sound["metrics"].combine_chunks().flatten()
    fields = dict(zip((field.name for field in METRICS_STRUCT), metrics, strict=True))
    increase = pc.multiply(fields["increase"].cast(pa.float64()), 100.0)  # pyright: ignore[reportAttributeAccessIssue]
    values = {"drop": fields["drop"], "increase": increase}
    nothing = pa.scalar(None, pa.string())
    is_flat = pc.if_else(fields["increase"].is_null(), FLAT, NEGATIVE)  # pyright: ignore[reportAttributeAccessIssue]
    reasons = pc.if_else(fields["drop"].is_null(), is_flat, nothing)  # pyright: ignore[reportAttributeAccessIssue]
    parts = []
    for name, own in values.items():
        part = sound.select(["key", "target", *METHOD_COLUMNS])
        part = part.append_column("metric", pa.array([name] * len(sound), pa.string()))
        part = part.append_column("protocol", fields["protocol"])
        part = part.append_column("value", own)
        parts.append(part.append_column("reason", reasons))
    return pa.concat_tables(parts)
