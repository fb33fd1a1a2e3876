"""Fragments: rows to the bytes of one Parquet object and back, the same bytes for the same rows."""

import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from storage.records import WindowedFile
from storage.schema import SCHEMA
from storage.store import DamagedError, ObjectInfo, ObjectStore

ROW_GROUP_ROWS = 1024
"""Rows per row group: about 6 MB of maps, so that a reader may take a few columns of a few records."""


def encode_fragment(
    rows: Sequence[Mapping[str, Any]], provenance: Mapping[str, str], columns: pa.Schema = SCHEMA
) -> bytes:
    """The Parquet bytes of rows in these columns; `provenance` joins the footer's key-value metadata.

    Only deterministic facts belong in `provenance`: the same rows must give the same bytes.
    Raises pyarrow.ArrowInvalid or ArrowTypeError where a row does not fit the schema.
    """
    schema = columns.with_metadata({**(columns.metadata or {}), **provenance})
    table = pa.Table.from_pylist([dict(row) for row in rows], schema=schema)
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
    """The rows of a fragment, all columns or some. Raises pyarrow.ArrowInvalid where it is no Parquet file,
    and ValueError where its columns are not ours."""
    file = _checked(pq.ParquetFile(io.BytesIO(data)))
    # in this thread: a process that ends while Arrow's first ones are still being started dies of SIGABRT
    return file.read(columns=None if columns is None else list(columns), use_threads=False)


def fragment_batches(
    store: ObjectStore, info: ObjectInfo, columns: Sequence[str], batch_rows: int, window_bytes: int
) -> Iterator[pa.RecordBatch]:
    """The rows of a fragment in order, at most `batch_rows` at once, without ever holding the whole object.

    It is read in windows of so many bytes: small ones leave out what lies between the columns. Raises DamagedError
    where it is no fragment of ours, and StoreError.
    """
    try:
        file = _checked(pq.ParquetFile(pa.PythonFile(WindowedFile(store, info, window_bytes), mode="r")))
        yield from file.iter_batches(batch_rows, columns=list(columns), use_threads=False)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DamagedError(
            f"{store.uri}/{info.key} is no readable fragment, `blocksight verify` says more: {error}"
        ) from error


def _checked(file: pq.ParquetFile) -> pq.ParquetFile:
    """The file, if its columns are ours. Raises ValueError."""
    if not file.schema_arrow.equals(SCHEMA):
        raise ValueError(f"not a fragment of schema version {SCHEMA.metadata[b'blocksight.schema'].decode()}")
    return file
