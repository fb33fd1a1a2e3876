"""Encodes a fragment's rows as the bytes of one Parquet object, always the same bytes, and reads them back."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from blocksight.storage.limits import MAX_FRAGMENT_BYTES
from blocksight.storage.outputs.schema import SCHEMA
from blocksight.storage.parquet.reader import checked_columns, parquet_bytes, parquet_object
from blocksight.storage.parquet.rows import table_of_rows
from blocksight.storage.stores.store import DamagedError, ObjectInfo, ObjectStore

Rows = TypeVar("Rows", pa.Table, pa.RecordBatch)

LABEL_RANK = "label_rank"
SCHEMA_3 = pa.schema([field for field in SCHEMA if field.name != LABEL_RANK])
"""The columns of outputs from before the schema's version 4: no rank of the label, and ranks from 0."""

ROW_GROUP_ROWS = 1024
"""Rows per row group: about 6 MB of maps, so a reader can load a few columns of a few records."""


def encode_fragment(
    rows: Sequence[Mapping[str, Any]], provenance: Mapping[str, str], columns: pa.Schema = SCHEMA
) -> bytes:
    """The Parquet bytes of rows in these columns; `provenance` is added to the footer's key-value metadata.

    `provenance` may hold only deterministic facts: the same rows must give the same bytes.
    Raises as `table_of_rows`.
    """
    schema = columns.with_metadata({**(columns.metadata or {}), **provenance})
    table = table_of_rows(rows, schema)
    sink = pa.BufferOutputStream()
    pq.write_table(
        table,
        sink,
        row_group_size=ROW_GROUP_ROWS,
        compression="zstd",
        use_dictionary=[name for name in columns.names if name != "map"],  # pyright: ignore[reportArgumentType]
        store_schema=True,
    )
    return sink.getvalue().to_pybytes()


def read_fragment(data: bytes, columns: Sequence[str] | None = None) -> pa.Table:
    """The rows of a fragment, all columns or some. Raises DamagedError if the bytes are not a fragment of ours, or
    decompress to more than `MAX_FRAGMENT_BYTES`."""
    return read_rows(data, SCHEMA, "the fragment", columns)


def read_rows(data: bytes, schema: pa.Schema, where: str, columns: Sequence[str] | None = None) -> pa.Table:
    """The rows of an output's table with the columns of `schema`, all columns or some. `where` names it in messages.

    Raises DamagedError as `read_fragment`.
    """
    if len(data) > MAX_FRAGMENT_BYTES:
        raise DamagedError(f"{where} has {len(data)} bytes or more, at most {MAX_FRAGMENT_BYTES} are read")
    table = parquet_bytes(data, where)
    wanted = schema if columns is None else pa.schema([schema.field(name) for name in columns], schema.metadata)
    if schema is not SCHEMA or LABEL_RANK in table.names:
        return checked_columns(table, schema).table(wanted.names, schema)
    return _upgraded(checked_columns(table, SCHEMA_3).table(_stored_names(wanted), schema), wanted)


def fragment_batches(
    store: ObjectStore, info: ObjectInfo, columns: Sequence[str], batch_rows: int, window_bytes: int
) -> Iterator[pa.RecordBatch]:
    """The rows of a fragment in order, at most `batch_rows` at once, without loading the whole object.

    It is read in windows of `window_bytes`: small windows skip unused columns. Raises DamagedError if it is not a
    fragment of ours, and StoreError.
    """
    wanted = pa.schema([SCHEMA.field(name) for name in columns])
    try:
        table = parquet_object(store, info, window_bytes)
        is_now = LABEL_RANK in table.names
        checked_columns(table, SCHEMA if is_now else SCHEMA_3)
        stored = list(wanted.names if is_now else _stored_names(wanted))
        for _, batch in table.rows(stored, batch_rows):
            found = batch.select(stored).cast(pa.schema([SCHEMA.field(name) for name in stored]))
            yield found if is_now else _upgraded(found, wanted)
    except (DamagedError, pa.ArrowException) as error:
        raise DamagedError(
            f"{store.uri}/{info.key} is no readable fragment, `blocksight verify` says more: {error}"
        ) from error


def _stored_names(wanted: pa.Schema) -> list[str]:
    """Those of the wanted columns that a fragment of `SCHEMA_3` has."""
    return [name for name in wanted.names if name != LABEL_RANK]


def _upgraded(rows: Rows, wanted: pa.Schema) -> Rows:
    """Rows of a fragment of `SCHEMA_3` in today's columns: ranks from 1, the label's rank unknown."""

    def column(name: str) -> pa.Array | pa.ChunkedArray:
        if name == LABEL_RANK:
            return pa.nulls(rows.num_rows, pa.int32())
        own = rows.column(name)
        if name != "target_rank":
            return own
        return pc.add(own, pa.scalar(1, pa.int32()))  # pyright: ignore[reportAttributeAccessIssue]

    return type(rows).from_arrays([column(name) for name in wanted.names], schema=wanted)
