"""Parquet tables with an image column: read by row range, a few rows at a time."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from storage.limits import MAX_IMAGE_BYTES
from storage.records import RawRecord, WindowedFile, as_text, too_many_bytes
from storage.rejects import Reject, RejectCode
from storage.store import DamagedError, ObjectInfo, ObjectStore, StoreError

IMAGE, LABEL, KEY = "image", "label", "key"
BATCH_ROWS = 16
"""Rows that are in memory at once."""


def count_rows(store: ObjectStore, info: ObjectInfo) -> int:
    """Rows of the table, from its footer. Raises StoreError where it is no table with images."""
    return _open(store, info).metadata.num_rows


def read_table(store: ObjectStore, info: ObjectInfo, start: int, stop: int) -> Iterator[RawRecord]:
    """The records of rows [start, stop): column `image` (bytes, or a struct with `bytes`), and where they
    stand `label` and `key`; without `key` the row's number is the key.

    Of two rows with one key the later is rejected, wherever the range begins. Raises StoreError,
    MissingError, ChangedError and DamagedError.
    """
    file = _open(store, info)
    names = [name for name in (IMAGE, LABEL, KEY) if name in file.schema_arrow.names]
    seen = _keys(file, start) if KEY in names else set()
    for index, row in _rows(file, start, stop, names):
        key = as_text(str(row[KEY])) if row.get(KEY) is not None else str(index)
        record = RawRecord(f"{info.key}/{key}", info.key, index, _label(row.get(LABEL)))
        if key in seen:
            duplicate = Reject(RejectCode.DUPLICATE_KEY, f"key {key!r} stands earlier in the table")
            yield replace(record, reject=duplicate)
        else:
            seen.add(key)
            yield _with_image(record, row[IMAGE])


def _with_image(record: RawRecord, cell: Any) -> RawRecord:
    data = cell.get("bytes") if isinstance(cell, Mapping) else cell
    if data is None:
        return replace(record, reject=Reject(RejectCode.MISSING_IMAGE, f"the column `{IMAGE}` is null"))
    if len(data) > MAX_IMAGE_BYTES:
        return replace(record, reject=too_many_bytes(len(data)))
    return replace(record, data=data)


def _label(value: Any) -> str | int | None:
    plain = value is None or (isinstance(value, int) and not isinstance(value, bool))
    return value if plain else as_text(str(value))


def _keys(file: pq.ParquetFile, stop: int) -> set[str]:
    """The keys of the rows before the range."""
    rows = _rows(file, 0, stop, [KEY])
    return {as_text(str(row[KEY])) if row[KEY] is not None else str(index) for index, row in rows}


def _rows(file: pq.ParquetFile, start: int, stop: int, names: list[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Number and cells of rows [start, stop), from the row groups that hold them alone.

    Raises DamagedError where their bytes are no Parquet.
    """
    try:
        yield from _read_rows(file, start, stop, names)
    except (pa.ArrowException, OSError) as error:
        raise DamagedError(f"rows {start} to {stop} of the table cannot be read: {error}") from error


def _read_rows(file: pq.ParquetFile, start: int, stop: int, names: list[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    groups, first = _groups(file, start, stop)
    index = first
    for batch in file.iter_batches(BATCH_ROWS, row_groups=groups, columns=names, use_threads=False):
        if index + batch.num_rows > start:
            for offset, row in enumerate(batch.to_pylist(), index):
                if start <= offset < stop:
                    yield offset, row
        index += batch.num_rows
        if index >= stop:
            return


def _groups(file: pq.ParquetFile, start: int, stop: int) -> tuple[list[int], int]:
    """The row groups that overlap the range, and the number of the first one's first row."""
    groups, first, row = [], 0, 0
    for group in range(file.metadata.num_row_groups):
        size = file.metadata.row_group(group).num_rows
        if row < stop and row + size > start:
            first = first if groups else row
            groups.append(group)
        row += size
    return groups, first


def _open(store: ObjectStore, info: ObjectInfo) -> pq.ParquetFile:
    where = f"{store.uri}/{info.key}"
    try:
        file = pq.ParquetFile(pa.PythonFile(WindowedFile(store, info), mode="r"))
        schema = file.schema_arrow
    except (pa.ArrowException, ValueError) as error:
        raise DamagedError(f"{where} is no readable Parquet file: {error}") from error
    if IMAGE not in schema.names:
        raise StoreError(f"{where} has no column `{IMAGE}`; its columns: {', '.join(schema.names)}")
    for name in (IMAGE, LABEL, KEY):
        if name in schema.names:
            _check_type(where, name, schema.field(name).type)
    return file


def _check_type(where: str, name: str, kind: pa.DataType) -> None:
    """Plain types alone: an extension type may bring code that runs when a value is read."""
    inner = kind.field("bytes").type if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0 else kind
    plain = _is_bytes(inner) if name == IMAGE else pa.types.is_primitive(kind) or _is_text(kind)
    if not plain:
        wanted = "binary, or a struct with a binary field `bytes`" if name == IMAGE else "numbers or text"
        raise StoreError(f"{where}: column `{name}` is {kind}; wanted {wanted}")


def _is_bytes(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
