"""The list of a plan's units as a Parquet file: written and read in columns, so that no object takes a dictionary."""

import hashlib
from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from blocksight.jobs.plan.records import Unit
from blocksight.storage.inputs.survey import Layout
from blocksight.storage.limits import MAX_BATCH_BYTES, MAX_UNFOLDING
from blocksight.storage.parquet.reader import checked_columns, parquet_bytes
from blocksight.storage.stores.object_columns import SCHEMA as OBJECTS
from blocksight.storage.stores.object_columns import ObjectCollector, ObjectColumns

OBJECT = pa.struct([("key", pa.string()), ("size", pa.int64()), ("etag", pa.string())])
UNITS_SCHEMA = pa.schema(
    [
        ("ordinal", pa.int32()),
        ("unit_id", pa.string()),
        ("layout", pa.string()),
        ("start", pa.int64()),
        ("stop", pa.int64()),
        ("num_records", pa.int64()),
        ("objects", pa.list_(OBJECT)),
    ]
)
VALUES = UNITS_SCHEMA.names[:-1]
"""All columns but the objects."""

GROUP_OBJECTS = 1 << 14
"""Objects from which a row group is full, unless there would be more than `MOST_GROUPS`: each is in the footer."""
MOST_GROUPS = 1_000


def units_bytes(units: Sequence[Unit]) -> bytes:
    """The units as a Parquet file, in their order."""
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(sink, UNITS_SCHEMA, compression="zstd") as writer:
        for some in _groups(units):
            writer.write_table(_table(some))
    return sink.getvalue().to_pybytes()


def units_name(body: bytes) -> str:
    """The name of a file with these bytes: two drivers that plan at the same time cannot mix their lists."""
    return f"units-{hashlib.sha256(body).hexdigest()[:16]}.parquet"


def read_units(body: bytes, spread: bool) -> tuple[Unit, ...]:
    """The units of such a file. `spread`: as `Unit.is_spread`. Raises DamagedError and ValueError.

    Values and objects may be missing, wrong or null: `check_units` finds that.
    """
    most_bytes = MAX_UNFOLDING * len(body) + MAX_BATCH_BYTES
    table = checked_columns(parquet_bytes(body, "the list of units"), UNITS_SCHEMA)
    found = table.table(UNITS_SCHEMA.names, UNITS_SCHEMA, most_bytes)
    counts = pc.fill_null(pc.list_value_length(found["objects"]), 0).to_pylist()  # pyright: ignore[reportAttributeAccessIssue]
    objects = ObjectColumns(_object_batches(found["objects"]))
    rows = found.select(VALUES).to_pylist()
    del found
    edges = pairwise(accumulate(counts, initial=0))
    return tuple(
        Unit(**{**row, "layout": Layout(row["layout"])}, objects=objects[start:stop], is_spread=spread)
        for row, (start, stop) in zip(rows, edges, strict=True)
    )


def _object_batches(lists: pa.ChunkedArray) -> Iterator[pa.RecordBatch]:
    """The objects of all lists, joined. An object that is null has null for each value."""
    for chunk in lists.chunks:
        columns: Any = chunk.flatten().flatten()
        arrays = [column.cast(field.type) for column, field in zip(columns, OBJECTS, strict=True)]
        yield pa.RecordBatch.from_arrays(arrays, schema=OBJECTS)


def _groups(units: Sequence[Unit]) -> Iterator[Sequence[Unit]]:
    """The units in runs, each of a row group; one run without a unit if there is none."""
    full = max(GROUP_OBJECTS, sum(len(unit.objects) for unit in units) // MOST_GROUPS)
    first = count = 0
    for place, unit in enumerate(units):
        count += len(unit.objects)
        if count >= full:
            yield units[first : place + 1]
            first, count = place + 1, 0
    if first < len(units) or not units:
        yield units[first:]


def _table(units: Sequence[Unit]) -> pa.Table:
    ends = pa.array(accumulate((len(unit.objects) for unit in units), initial=0), pa.int32())
    collector = ObjectCollector()
    for unit in units:
        collector.extend(unit.objects)
    columns = pa.Table.from_batches(collector.objects().batches(), OBJECTS).cast(pa.schema(list(OBJECT))).columns
    objects = pa.StructArray.from_arrays([column.combine_chunks() for column in columns], fields=list(OBJECT))
    arrays = [pa.array([getattr(unit, name) for unit in units], UNITS_SCHEMA.field(name).type) for name in VALUES]
    return pa.Table.from_arrays([*arrays, pa.ListArray.from_arrays(ends, objects)], schema=UNITS_SCHEMA)
