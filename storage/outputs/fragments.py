"""Encodes a fragment's rows as the bytes of one Parquet object, always the same bytes, and reads them back."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from blocksight.storage.limits import MAX_FRAGMENT_BYTES
from blocksight.storage.outputs.schema import SCHEMA
from blocksight.storage.parquet.reader import checked_columns, parquet_bytes, parquet_object
from blocksight.storage.parquet.rows import table_of_rows
from blocksight.storage.stores.store import DamagedError, ObjectInfo, ObjectStore

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
    table = checked_columns(parquet_bytes(data, where), schema)
    return table.table(schema.names if columns is None else columns, schema)


def fragment_batches(
    store: ObjectStore, info: ObjectInfo, columns: Sequence[str], batch_rows: int, window_bytes: int
) -> Iterator[pa.RecordBatch]:
    """The rows of a fragment in order, at most `batch_rows` at once, without loading the whole object.

    It is read in windows of `window_bytes`: small windows skip unused columns. Raises DamagedError if it is not a
    fragment of ours, and StoreError.
    """
    wanted = pa.schema([SCHEMA.field(name) for name in columns])
    try:
        table = checked_columns(parquet_object(store, info, window_bytes), SCHEMA)
        for _, batch in table.rows(columns, batch_rows):
            yield batch.select(list(columns)).cast(wanted)
    except (DamagedError, pa.ArrowException) as error:
        raise DamagedError(
            f"{store.uri}/{info.key} is no readable fragment, `blocksight verify` says more: {error}"
        ) from error
