"""Encodes a fragment's rows as the bytes of one Parquet object, always the same bytes, and reads them back."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from blocksight.storage.limits import MAX_FRAGMENT_BYTES
from blocksight.storage.outputs.schema import EVALUATION, SCHEMA
from blocksight.storage.parquet.reader import checked_columns, parquet_bytes, parquet_object
from blocksight.storage.parquet.rows import table_of_rows
from blocksight.storage.stores.store import DamagedError, ObjectInfo, ObjectStore

Rows = TypeVar("Rows", pa.Table, pa.RecordBatch)

LABEL_RANK = "label_rank"
OF_TARGET = ("target", "target_formula")
"""Columns that outputs had none of while every target was a class: its number is both."""
OF_SIGN = ("map_negative", "map_negative_low", "map_negative_high")
"""Columns that outputs had none of while all maps were of what speaks for a target."""
SCHEMA_4 = pa.schema([field for field in SCHEMA if field.name not in (*OF_TARGET, *OF_SIGN)])
"""The columns of outputs whose targets were all classes."""
SCHEMA_3 = pa.schema([field for field in SCHEMA_4 if field.name != LABEL_RANK])
"""The columns of outputs from before the schema's version 4: no rank of the label, and ranks from 0."""
EVALUATION_4 = pa.schema(
    [
        field.with_nullable(False) if field.name == "target_index" else field
        for field in EVALUATION
        if field.name not in OF_TARGET
    ]
)
"""The columns of evaluations whose targets were all classes."""
OLDER: Mapping[pa.Schema, Sequence[pa.Schema]] = {SCHEMA: (SCHEMA_4, SCHEMA_3), EVALUATION: (EVALUATION_4,)}
"""Columns of older versions, which readers fill up."""

ROW_GROUP_ROWS = 1024
"""Rows per row group: about 6 MB of maps, so a reader can load a few columns of a few records."""


def encode_fragment(
    rows: Sequence[Mapping[str, Any]], provenance: Mapping[str, str], columns: pa.Schema = SCHEMA
) -> bytes:
    """The Parquet bytes of rows in these columns; `provenance` is added to the footer's key-value metadata.

    A class without a text is its own target. `provenance` may hold only deterministic facts: the same rows must give
    the same bytes. Raises as `table_of_rows`.
    """
    schema = columns.with_metadata({**(columns.metadata or {}), **provenance})
    table = table_of_rows([_with_target(row, columns) for row in rows], schema)
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


def _with_target(row: Mapping[str, Any], columns: pa.Schema) -> Mapping[str, Any]:
    """The row; a class is its own target, if nothing else is said."""
    index = row.get("target_index")
    missing = [name for name in OF_TARGET if name in columns.names and row.get(name) is None]
    return {**row, **dict.fromkeys(missing, str(index))} if missing and index is not None else row


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
    stored = _stored(table.names, schema)
    checked_columns(table, stored)
    if stored is schema:
        return table.table(wanted.names, schema)
    return _upgraded(table.table(_stored_names(wanted, stored), schema), wanted, stored)


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
        columns_there = _stored(table.names, SCHEMA)
        checked_columns(table, columns_there)
        stored = _stored_names(wanted, columns_there)
        for _, batch in table.rows(stored, batch_rows):
            found = batch.select(stored).cast(pa.schema([SCHEMA.field(name) for name in stored]))
            yield found if columns_there is SCHEMA else _upgraded(found, wanted, columns_there)
    except (DamagedError, pa.ArrowException) as error:
        raise DamagedError(
            f"{store.uri}/{info.key} is no readable fragment, `blocksight verify` says more: {error}"
        ) from error


def _stored(names: Sequence[str], schema: pa.Schema) -> pa.Schema:
    """The columns that a file with these names should have: those of `schema`, or of an older version."""
    older = (own for own in OLDER.get(schema, ()) if set(own.names) == set(names))
    lacking = set(schema.names) - set(names)
    if schema not in OLDER and lacking and lacking <= set(OF_TARGET):  # tables of commands, made while all were classes
        return pa.schema([field for field in schema if field.name not in lacking])
    return next(older, schema)


def _stored_names(wanted: pa.Schema, stored: pa.Schema) -> list[str]:
    """The stored columns from which `_upgraded` makes the wanted ones."""
    there = [name for name in wanted.names if name in stored.names]
    needs_class = len(there) < len(wanted.names) and any(name in OF_TARGET for name in wanted.names)
    return [*there, "target_index"] if needs_class and "target_index" not in there else there


def _upgraded(rows: Rows, wanted: pa.Schema, stored: pa.Schema) -> Rows:
    """Rows of an older version in today's columns: a class is its own target, ranks from 1, the label's unknown."""

    def column(name: str) -> pa.Array | pa.ChunkedArray:
        if name in OF_TARGET and name not in stored.names:
            return rows.column("target_index").cast(pa.string())
        if name not in stored.names:
            return pa.nulls(rows.num_rows, wanted.field(name).type)
        is_from_0 = name == "target_rank" and LABEL_RANK not in stored.names
        return _from_1(rows.column(name)) if is_from_0 else rows.column(name)

    return type(rows).from_arrays([column(name) for name in wanted.names], schema=wanted)


def _from_1(ranks: pa.Array | pa.ChunkedArray) -> pa.Array | pa.ChunkedArray:
    return pc.add(ranks, pa.scalar(1, pa.int32()))  # pyright: ignore[reportAttributeAccessIssue]
