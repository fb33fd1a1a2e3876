"""Reads records from Parquet tables with an image column, by row range, a few rows at a time."""

import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, islice
from typing import Any

import pyarrow as pa

from blocksight.storage.inputs.labels import as_bytes_text, label_of, partition_label
from blocksight.storage.inputs.paused import PausedReader
from blocksight.storage.inputs.records import RawRecord, as_text, too_many_bytes
from blocksight.storage.limits import MAX_CLASSES, MAX_IMAGE_BYTES, MAX_KEY_BYTES
from blocksight.storage.parquet.reader import (
    ColumnPath,
    ParquetTable,
    is_bytes,
    is_number,
    is_temporal_or_decimal,
    parquet_object,
)
from blocksight.storage.rejects import Reject, RejectCode
from blocksight.storage.stores.store import DamagedError, ObjectInfo, ObjectStore

IMAGE, LABEL, KEY, BYTES = "image", "label", "key", "bytes"
USED = (IMAGE, LABEL, KEY)
BATCH_ROWS = 16
"""Rows in memory at once; fewer if they are large."""
HUGGING_FACE = b"huggingface"
"""The footer's key for the features of a data set."""
KEY_WINDOW_BYTES = 64 << 10
LABEL_BATCH_ROWS = 4096
MAX_NAMED = 16
"""Unread columns of one table that are named."""
NUM_SHOWN_COLUMNS = 8
NUM_SHOWN_CHARACTERS = 64
"""Characters of a rejected key that are kept."""


@dataclass(frozen=True)
class TableFacts:
    """The facts in a table's footer."""

    num_rows: int
    unread: tuple[str, ...]
    """Unused columns whose type is never read, with the type."""
    note: str | None = None
    """A sentence on the columns that are not used."""
    number_names: tuple[str, ...] = ()
    """What the labels' numbers are called, as Hugging Face's datasets write it; empty if nothing says it."""


def table_facts(store: ObjectStore, info: ObjectInfo) -> TableFacts:
    """A table's facts, from its footer. Raises DamagedError if it is not a table with images, and StoreError."""
    table, paths = _open_table(store, info)
    used = {path if isinstance(path, str) else path[0] for path in paths}
    kinds = {name: kind for name, kind in table.extensions.items() if name not in used}
    if LABEL in table.names and LABEL not in used:
        kinds[LABEL] = str(table.schema.field(LABEL).type)
    unread = [as_text(f"column {name} ({kind})") for name, kind in kinds.items()]
    more = [f"more columns: {len(unread) - MAX_NAMED}"] if len(unread) > MAX_NAMED else []
    return TableFacts(
        table.num_rows, (*unread[:MAX_NAMED], *more), _note_on(info.key, table.names, used), _number_names(table)
    )


def _number_names(table: ParquetTable) -> tuple[str, ...]:
    """The names of a ClassLabel, from the footer; empty for none, and for what cannot be read."""
    try:
        found = json.loads((table.metadata.metadata or {}).get(HUGGING_FACE, b"{}"))
        names = found["info"]["features"][LABEL]["names"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return ()
    is_list = isinstance(names, list) and len(names) <= MAX_CLASSES and all(isinstance(name, str) for name in names)
    return tuple(map(as_text, names)) if is_list else ()


def _note_on(key: str, names: Sequence[str], used: Collection[str]) -> str | None:
    """A sentence on the columns that are not used; None: all are."""
    others = [as_text(name) for name in names if name not in used]
    if not others:
        return None
    more = f" and {len(others) - NUM_SHOWN_COLUMNS} more" if len(others) > NUM_SHOWN_COLUMNS else ""
    label = "" if LABEL in names else f"; the label is read of a column `{LABEL}`, or of --labels"
    return f"{key}: columns that are not read: {', '.join(others[:NUM_SHOWN_COLUMNS])}{more}{label}"


def has_image_column(store: ObjectStore, info: ObjectInfo) -> bool | None:
    """True if a table has the column `image`; None if it cannot be read. Raises StoreError."""
    try:
        return IMAGE in parquet_object(store, info).names
    except DamagedError:
        return None


def read_table(store: ObjectStore, info: ObjectInfo, start: int, stop: int) -> Iterator[RawRecord]:
    """The records of rows [start, stop). Columns: `image` (bytes, or a struct with `bytes`), and `label` and `key`
    if present. Without `key`, the row's number is the key; without `label`, a folder `label=VALUE` gives the label.

    Of two rows with one key the later is rejected, also if the first lies before the range. A range that follows the
    last one goes on from there: its row group is not read again. Raises DamagedError if
    the table cannot be read, MissingError, ChangedError and StoreError.
    """
    rows = PAUSED.take(store, info, start)
    if rows is None or not rows.is_near(start):
        rows = _Rows(store, info, start)
    yield from rows.until(start, stop)
    if stop < rows.num_rows:
        PAUSED.keep(store, info, stop, rows)


class _Rows:
    """The records of a table from one row on, which may rest between two ranges."""

    def __init__(self, store: ObjectStore, info: ObjectInfo, start: int) -> None:
        self._store, self._info, self._position = store, info, start
        self._table, self._paths = _open_table(store, info)
        self.num_rows = self._table.num_rows
        self._records = self._all_records()

    def is_near(self, start: int) -> bool:
        """True if `start` is the next row, or a later one of its row group: that is decoded from its beginning."""
        ends = accumulate(self._table.row_counts)
        return start == self._position or start < next(end for end in ends if end > self._position)

    def until(self, start: int, stop: int) -> Iterator[RawRecord]:
        """The records of rows [start, stop). Behind the last row the table's end is checked."""
        yield from islice(self._records, start - self._position, stop - self._position)
        self._position = stop
        if stop >= self.num_rows:
            yield from self._records

    def _all_records(self) -> Iterator[RawRecord]:
        info, table, paths = self._info, self._table, self._paths
        partition = None if LABEL in table.names else partition_label(info.key)
        seen = _keys_before(self._store, info, self._position) if KEY in paths else set()
        for first, batch in table.rows(paths, BATCH_ROWS, self._position):
            images = _images(batch.column(IMAGE))
            keys = _keys_of(batch, first)
            labels = column_values(batch.column(LABEL)) if LABEL in paths else [partition] * batch.num_rows
            for offset, (key, label) in enumerate(zip(keys, labels, strict=True)):
                record = RawRecord(f"{info.key}/{key}", info.key, first + offset, label_of(label))
                yield _checked(record, key, seen, images, offset)
                seen.add(key)


PAUSED = PausedReader[_Rows]()


def table_labels(store: ObjectStore, info: ObjectInfo, stop: int) -> Iterator[tuple[str, str | int | None]]:
    """Key and label of the records of the first `stop` rows. Raises as `read_table`."""
    table, paths = _open_table(store, info)
    partition = None if LABEL in table.names else partition_label(info.key)
    columns = [name for name in (KEY, LABEL) if name in paths]
    if not columns:
        yield from ((f"{info.key}/{row}", partition) for row in range(min(stop, table.num_rows)))
        return
    for first, batch in table.rows(columns, LABEL_BATCH_ROWS, 0, stop):
        labels = column_values(batch.column(LABEL)) if LABEL in columns else [partition] * batch.num_rows
        for key, label in zip(_keys_of(batch, first), labels, strict=True):
            yield f"{info.key}/{key}", label_of(label)


def _checked(record: RawRecord, key: str, seen: Collection[str], images: pa.Array, offset: int) -> RawRecord:
    """The record with its image, or with the reject of its key. `seen`: the keys of earlier rows."""
    if len(key.encode()) > MAX_KEY_BYTES:
        return _with_long_key(record, key)
    if key in seen:
        return replace(record, reject=Reject(RejectCode.DUPLICATE_KEY, f"key {key!r} occurs earlier in the table"))
    return _with_image(record, images, offset)


def _with_long_key(record: RawRecord, key: str) -> RawRecord:
    reason = f"its key has {len(key.encode())} bytes, at most {MAX_KEY_BYTES} are kept"
    name = f"{record.shard}/{key[:NUM_SHOWN_CHARACTERS]}… (row {record.index})"
    return replace(record, key=name, reject=Reject(RejectCode.KEY_REFUSED, reason))


def _with_image(record: RawRecord, images: pa.Array, offset: int) -> RawRecord:
    cell = images[offset]
    if not cell.is_valid:
        return replace(record, reject=Reject(RejectCode.MISSING_IMAGE, f"the column `{IMAGE}` is null"))
    size = cell.as_buffer().size
    if size > MAX_IMAGE_BYTES:
        return replace(record, reject=too_many_bytes(size))
    return replace(record, data=cell.as_py())


def _images(column: pa.Array) -> pa.Array:
    """The images' bytes; null if a row has no image."""
    plain = column.flatten()[0] if pa.types.is_struct(column.type) else column
    return plain if pa.types.is_fixed_size_binary(plain.type) else plain.cast(pa.binary())


def _keys_before(store: ObjectStore, info: ObjectInfo, stop: int) -> set[str]:
    """The keys of the rows before the range, read in windows that pass the images over."""
    batches = parquet_object(store, info, KEY_WINDOW_BYTES).rows([KEY], BATCH_ROWS, 0, stop) if stop else ()
    return {key for first, batch in batches for key in _keys_of(batch, first)}


def _keys_of(batch: pa.RecordBatch, first: int) -> list[str]:
    """The rows' keys; a row without a key gets its number."""
    numbers = range(first, first + batch.num_rows)
    if KEY not in batch.schema.names:
        return list(map(str, numbers))
    values = column_values(batch.column(KEY))
    return [str(number) if value is None else _text(value) for number, value in zip(numbers, values, strict=True)]


def _text(value: Any) -> str:
    return as_bytes_text(value) if isinstance(value, bytes) else as_text(str(value))


def column_values(column: pa.Array) -> list[Any]:
    """A column's values: numbers unchanged, text as bytes, times and decimals as Arrow's text."""
    return column.cast(_readable(column.type)).to_pylist()


def _readable(kind: pa.DataType) -> pa.DataType:
    """The type whose values are as `column_values` says; text may not be UTF-8."""
    if is_temporal_or_decimal(kind):
        return pa.string()
    if pa.types.is_string(kind):
        return pa.binary()
    if pa.types.is_list(kind):
        return pa.list_(kind.field(0).with_type(_readable(kind.value_type)))
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(_readable(field.type)) for field in kind])
    return kind


def _open_table(store: ObjectStore, info: ObjectInfo) -> tuple[ParquetTable, list[ColumnPath]]:
    """The table and the columns of image, label and key. Raises DamagedError."""
    table = parquet_object(store, info)
    if IMAGE not in table.names:
        names = ", ".join(map(as_text, table.names))
        raise DamagedError(f"{table.where} has no column `{IMAGE}`; its columns: {names}; rename the one with images")
    used = [name for name in USED if name in table.names]
    table.refuse_ambiguous(used)
    table.refuse_extensions(used)
    paths: list[ColumnPath] = [_image_path(table)]
    if LABEL in used and _is_label(table.schema.field(LABEL).type):
        paths.append(LABEL)
    if KEY in used:
        kind = table.schema.field(KEY).type
        if not _is_value(kind):
            raise DamagedError(f"{table.where}: column `{KEY}` is {kind}; wanted numbers or text")
        paths.append(KEY)
    return table, paths


def _image_path(table: ParquetTable) -> ColumnPath:
    kind = table.schema.field(IMAGE).type
    inner = [one for one in kind if one.name == BYTES] if pa.types.is_struct(kind) else []
    if is_bytes(kind) or pa.types.is_null(kind):
        return IMAGE
    if len(inner) == 1 and (is_bytes(inner[0].type) or pa.types.is_null(inner[0].type)):
        return IMAGE, BYTES
    raise DamagedError(
        f"{table.where}: column `{IMAGE}` is {kind}; wanted binary, or a struct with a binary field `{BYTES}`"
    )


def _is_label(kind: pa.DataType) -> bool:
    """True for a value, and for lists and structs of them."""
    if pa.types.is_list(kind) or pa.types.is_struct(kind):
        return all(_is_label(kind.field(number).type) for number in range(kind.num_fields))
    return _is_value(kind)


def _is_value(kind: pa.DataType) -> bool:
    return is_bytes(kind) or is_number(kind) or is_temporal_or_decimal(kind) or pa.types.is_null(kind)
