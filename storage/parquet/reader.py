"""Opens and reads every Parquet file, in bounded memory, and without running anything from it.

Arrow passes a file's extension types to registered Python classes. Ray registers some, and one of them unpickles. So
that part of a file is hidden from Arrow: columns are read with the format's own types, and columns of extension types
are found by name. `blocksight.storage.parquet.pages` bounds the decompressed size of the pages.
"""

import base64
import binascii
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property, lru_cache
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from blocksight.storage.limits import MAX_BATCH_BYTES, MAX_FRAGMENT_BYTES, MAX_PARQUET_COLUMNS, MAX_PARQUET_FOOTER_BYTES
from blocksight.storage.parquet.pages import Chunk, ClosedPagesError, GuardedFile, ReadAt
from blocksight.storage.stores.store import DamagedError, ObjectInfo, ObjectStore
from blocksight.storage.stores.windowed_file import WindowedFile

WINDOW_BYTES = WindowedFile.WINDOW
MAGIC = b"PAR1"
TAIL_BYTES = 8
"""The footer's length and the magic."""

ARROW_SCHEMA, HIDDEN_SCHEMA = b"ARROW:schema", b"ARROW-schema"
"""The footer's key for Arrow's types, and the replacement that Arrow ignores."""
EXTENSION, HIDDEN_EXTENSION = b"ARROW:extension:", b"ARROW-extension:"
EXTENSION_NAME_KEY = HIDDEN_EXTENSION + b"name"

UNREPEATED = {"PLAIN", "DELTA_LENGTH_BYTE_ARRAY", "RLE", "BIT_PACKED"}
"""Encodings that repeat no byte of a value; the last two encode levels."""
WIDTHS = {"BOOLEAN": 1, "INT32": 4, "FLOAT": 4, "INT64": 8, "INT96": 8, "DOUBLE": 8}
"""Bytes of a value in memory, by physical type; other types have no fixed width."""
MAX_NAMED = 8
"""Columns that a message names."""
BYTES_PER_VALUE = 16
"""Memory for levels, offsets and validity of one value."""

ColumnPath = str | tuple[str, str]
"""The name of a column, or the names of a struct column and of a field in it."""


def parquet_object(store: ObjectStore, info: ObjectInfo, window_bytes: int = WINDOW_BYTES) -> "ParquetTable":
    """A Parquet object, read in windows of `window_bytes`. Raises DamagedError, and StoreError as `store.read`."""
    file = WindowedFile(store, info, window_bytes)
    return ParquetTable(f"{store.uri}/{info.key}", info.size, file.read_at, window_bytes)


def parquet_bytes(data: bytes, where: str) -> "ParquetTable":
    """A Parquet file in memory; `where` names it in messages. Raises DamagedError."""

    def read_at(start: int, size: int) -> bytes:
        return data[start : start + size]

    return ParquetTable(where, len(data), read_at, WINDOW_BYTES)


class ParquetTable:
    """A Parquet file whose footer was read and checked.

    `schema` holds the format's own types, without Arrow's additions (extension types, dictionaries, fixed sizes of
    lists).
    """

    def __init__(self, where: str, size: int, read_at: ReadAt, window_bytes: int) -> None:
        self.where, self._window_bytes = where, window_bytes
        self._file = GuardedFile(size, read_at, _read_tail(where, size, read_at))
        with self._as_damaged("is no readable Parquet file"):
            self._arrow = self._open_arrow()
            self.metadata: pq.FileMetaData = self._arrow.metadata
            self.schema: pa.Schema = self._arrow.schema_arrow
            self.names: list[str] = self.schema.names
        self.num_rows: int = self.metadata.num_rows
        self._check_size(size)

    def _open_arrow(self, **options: Any) -> pq.ParquetFile:
        return pq.ParquetFile(
            pa.PythonFile(self._file, mode="r"),
            buffer_size=self._window_bytes,
            pre_buffer=False,
            arrow_extensions_enabled=False,
            **options,
        )

    def _check_size(self, size: int) -> None:
        if self.metadata.num_columns > MAX_PARQUET_COLUMNS:
            raise self._damaged(f"has {self.metadata.num_columns} columns, at most {MAX_PARQUET_COLUMNS} are read")
        if self.num_rows > size:
            raise self._damaged(f"says that it has {self.num_rows} rows in {size} bytes; wanted a byte per row or more")
        if min(self.row_counts, default=0) < 0 or sum(self.row_counts) != self.num_rows:
            raise self._damaged(f"says that it has {self.num_rows} rows, and its row groups {sum(self.row_counts)}")

    @cached_property
    def row_counts(self) -> list[int]:
        """Rows of each row group."""
        return [self.metadata.row_group(group).num_rows for group in range(self.metadata.num_row_groups)]

    @cached_property
    def extensions(self) -> Mapping[str, str]:
        """Columns that are of an extension type or contain one: the type's name by column name."""
        stored = (self.metadata.metadata or {}).get(HIDDEN_SCHEMA)
        if stored is None:
            return {}
        try:
            body = base64.b64decode(stored).replace(EXTENSION, HIDDEN_EXTENSION)
            fields = list(pa.ipc.read_schema(pa.py_buffer(body)))
            found = [(field.name, _extension_name(field)) for field in fields]
        except (pa.ArrowException, OSError, ValueError, binascii.Error) as error:
            raise self._damaged(f"has an unreadable Arrow schema: {error}") from error
        return {name: kind for name, kind in found if kind is not None}

    def refuse_ambiguous(self, names: Sequence[str]) -> None:
        """Raises DamagedError if two columns have one of these names."""
        counts = Counter(self.names)
        for name in names:
            if counts[name] > 1:
                raise self._damaged(f"has {counts[name]} columns named `{name}`; wanted one")

    def refuse_extensions(self, names: Sequence[str]) -> None:
        """Raises DamagedError if one of these columns is of an extension type: reading it might run code."""
        for name in names:
            if name in self.extensions:
                raise self._damaged(f"has a column `{name}` of the extension type {self.extensions[name]}; not read")

    def rows(
        self,
        columns: Sequence[ColumnPath],
        batch_rows: int,
        start: int = 0,
        stop: int | None = None,
        most_bytes: int = MAX_BATCH_BYTES,
    ) -> Iterator[tuple[int, pa.RecordBatch]]:
        """Rows [start, stop) of these columns in batches, each with the number of its first row.

        A batch has at most `batch_rows` rows, and fewer if they might take more than `most_bytes`. Raises
        DamagedError, and StoreError as `store.read`.
        """
        names = [path if isinstance(path, str) else path[0] for path in columns]
        self.refuse_ambiguous(names)
        self.refuse_extensions(names)
        with self._as_damaged("cannot be read"):
            leaves = sorted(leaf for path in columns for leaf in self._leaves(path))
            file = self._open_arrow(metadata=self.metadata, read_dictionary=self._repeated_texts(leaves))
            first = 0
            for group, num_rows in enumerate(self.row_counts):
                if first < (self.num_rows if stop is None else stop) and first + num_rows > start:
                    for at, batch in self._row_group(file, group, leaves, batch_rows, most_bytes):
                        cut = _in_range(batch, first + at, start, stop)
                        if cut[1].num_rows:
                            yield cut
                first += num_rows

    def table(self, columns: Sequence[str], schema: pa.Schema, most_bytes: int = MAX_FRAGMENT_BYTES) -> pa.Table:
        """All rows of these columns, in the types of `schema`.

        Raises DamagedError if they take more than `most_bytes` or have other types.
        """
        wanted = pa.schema([schema.field(name) for name in columns], schema.metadata)
        batches, num_bytes = [], 0
        for _, batch in self.rows(columns, 1 << 16, most_bytes=max(MAX_BATCH_BYTES, most_bytes)):
            num_bytes += batch.nbytes
            if num_bytes > most_bytes:
                raise self._damaged(f"takes more than the {most_bytes} bytes that may be in memory")
            batches.append(batch)
        with self._as_damaged("is not of the types that are written there"):
            bare = pa.schema([field for field in self.schema if field.name in columns])
            found = pa.Table.from_batches(batches, bare).select(list(columns)).cast(wanted)
            found.validate(full=True)  # finds text that is not UTF-8 now, not later in a loop
            return found

    def _row_group(
        self, file: pq.ParquetFile, group: int, leaves: Sequence[int], batch_rows: int, most_bytes: int
    ) -> Iterator[tuple[int, pa.RecordBatch]]:
        """The row group's batches, each with the number of rows before it."""
        reader: Any = file.reader
        self._try_chunks(reader, group, leaves)
        chunks = [self._chunk(group, leaf) for leaf in leaves]
        self._file.expect(chunks)
        num_rows = self._rows_at_once(group, leaves, chunks, batch_rows, most_bytes)
        done = 0
        # in this thread: if a process ends while Arrow starts its first threads, it dies of SIGABRT
        for batch in reader.iter_batches(num_rows, row_groups=[group], column_indices=leaves, use_threads=False):
            yield done, self._without_dictionaries(batch, most_bytes)
            done += batch.num_rows
        if done != self.row_counts[group]:
            raise self._damaged(f"has {done} rows in row group {group}; the footer says {self.row_counts[group]}")

    def _try_chunks(self, reader: Any, group: int, leaves: Sequence[int]) -> None:
        """Lets Arrow open the column chunks without their pages, in a call that catches Arrow's exceptions.

        pyarrow's `row_group().column()` catches none: a column chunk that is encrypted, missing or with statistics
        of another length would end the process.
        """
        self._file.expect(None)
        with suppress(ClosedPagesError):
            next(reader.iter_batches(1, row_groups=[group], column_indices=leaves, use_threads=False), None)

    def _rows_at_once(
        self, group: int, leaves: Sequence[int], chunks: Sequence[Chunk], batch_rows: int, most_bytes: int
    ) -> int:
        """How many rows take at most `most_bytes` for any content of the pages; at least 1. Raises DamagedError."""
        fixed_bytes = row_bytes = 0
        for leaf, chunk in zip(leaves, chunks, strict=True):
            column = self.metadata.schema.column(leaf)
            width = (
                column.length if column.physical_type == "FIXED_LEN_BYTE_ARRAY" else WIDTHS.get(column.physical_type)
            )
            if column.max_repetition_level:
                uncompressed = chunk.uncompressed_bytes if width is None else width * chunk.num_values
                fixed_bytes += uncompressed + BYTES_PER_VALUE * chunk.num_values
            elif width is None and chunk.is_unrepeated:
                fixed_bytes += chunk.uncompressed_bytes
                row_bytes += BYTES_PER_VALUE
            else:
                row_bytes += (chunk.uncompressed_bytes if width is None else width) + BYTES_PER_VALUE
            if max(width or 0, fixed_bytes if column.max_repetition_level else 0) > most_bytes:
                raise self._damaged(
                    f"has values of column `{chunk.where}` in row group {group} that may take more than {most_bytes} "
                    f"bytes; write it with fewer rows per row group"
                )
        return max(1, min(batch_rows, (most_bytes - fixed_bytes) // max(1, row_bytes)))

    def _chunk(self, group: int, leaf: int) -> Chunk:
        column, kind = self.metadata.row_group(group).column(leaf), self.metadata.schema.column(leaf)
        starts = [column.data_page_offset]
        if column.has_dictionary_page and column.dictionary_page_offset:
            starts.append(column.dictionary_page_offset)
        chunk = Chunk(
            column.path_in_schema,
            min(starts),
            column.total_compressed_size,
            column.total_uncompressed_size,
            column.num_values,
            (kind.max_definition_level > 0) + (kind.max_repetition_level > 0),
            column.compression,
            is_unrepeated=not column.has_dictionary_page and set(column.encodings) <= UNREPEATED,
        )
        is_flat = not kind.max_repetition_level
        least = min(chunk.start, chunk.num_bytes, chunk.uncompressed_bytes, chunk.num_values)
        if least < 0 or (is_flat and chunk.num_values != self.row_counts[group]):
            raise self._damaged(
                f"says that column `{chunk.where}` has {chunk.num_values} values in row group {group}, in "
                f"{chunk.num_bytes} bytes from {chunk.start} on; the group has {self.row_counts[group]} rows"
            )
        return chunk

    def _leaves(self, path: ColumnPath) -> Iterator[int]:
        """The numbers of the leaf columns that a column path is stored as."""
        name, *inner = (path,) if isinstance(path, str) else path
        first = 0
        for field in self.schema:
            if field.name == name and not inner:
                yield from range(first, first + _num_leaves(field.type))
            elif field.name == name:
                yield from self._leaves_in_field(first, field, inner[0])
            first += _num_leaves(field.type)

    def _leaves_in_field(self, first: int, field: pa.Field, inner: str) -> Iterator[int]:
        kinds = [field.type.field(number) for number in range(field.type.num_fields)]
        if sum(kind.name == inner for kind in kinds) != 1:
            raise self._damaged(f"has not one field `{inner}` in its column `{field.name}`, which is {field.type}")
        for kind in kinds:
            if kind.name == inner:
                yield from range(first, first + _num_leaves(kind.type))
            first += _num_leaves(kind.type)

    def _repeated_texts(self, leaves: Sequence[int]) -> list[str]:
        """Columns of text inside lists. They are read as dictionaries: a row may repeat one text a million times."""
        columns = [self.metadata.schema.column(leaf) for leaf in leaves]
        return [one.path for one in columns if one.max_repetition_level and one.physical_type == "BYTE_ARRAY"]

    def _without_dictionaries(self, batch: pa.RecordBatch, most_bytes: int) -> pa.RecordBatch:
        """The batch without dictionaries."""
        if not any(_has_dictionary(field.type) for field in batch.schema):
            return batch
        num_bytes = sum(map(_bytes_without_dictionaries, batch.columns))
        if num_bytes > most_bytes:
            raise self._damaged(f"has rows whose lists take {num_bytes} bytes, at most {most_bytes} are read")
        return batch.cast(pa.schema([self.schema.field(name) for name in batch.schema.names]))

    @contextmanager
    def _as_damaged(self, what: str) -> Iterator[None]:
        """Turns Arrow's errors into DamagedError; a lack of memory is raised unchanged."""
        try:
            yield
        except pa.ArrowMemoryError:
            raise
        except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
            raise self._damaged(f"{what}: {error}") from error

    def _damaged(self, what: str) -> DamagedError:
        return DamagedError(f"{self.where} {what}")


def is_plain(kind: pa.DataType) -> bool:
    """True if a type, and each type inside it, is read."""
    types = pa.types
    if types.is_struct(kind) or types.is_map(kind) or _is_list(kind):
        return all(is_plain(kind.field(number).type) for number in range(kind.num_fields))
    if types.is_dictionary(kind):
        return is_plain(kind.value_type)
    return is_number(kind) or is_bytes(kind) or is_temporal_or_decimal(kind) or types.is_null(kind)


def is_number(kind: pa.DataType) -> bool:
    """True for integers, floating-point numbers and booleans, which are read unchanged."""
    return pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)


def is_temporal_or_decimal(kind: pa.DataType) -> bool:
    """True for types that are read as Arrow's text of the value."""
    return pa.types.is_decimal(kind) or (pa.types.is_temporal(kind) and not pa.types.is_interval(kind))


def is_bytes(kind: pa.DataType) -> bool:
    """True for bytes and text."""
    types = pa.types
    return (
        types.is_binary(kind)
        or types.is_large_binary(kind)
        or types.is_fixed_size_binary(kind)
        or types.is_string(kind)
        or types.is_large_string(kind)
        or types.is_binary_view(kind)
        or types.is_string_view(kind)
    )


def _is_list(kind: pa.DataType) -> bool:
    types = pa.types
    is_view = types.is_list_view(kind) or types.is_large_list_view(kind)
    return is_view or types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)


@lru_cache
def stored_types(schema: pa.Schema) -> pa.Schema:
    """The `ParquetTable.schema` of a file that is written with this schema."""
    sink = pa.BufferOutputStream()
    pq.write_table(schema.empty_table(), sink)
    return parquet_bytes(sink.getvalue().to_pybytes(), "a table of ours").schema


def checked_columns(table: ParquetTable, schema: pa.Schema) -> ParquetTable:
    """The table, unchanged. Raises DamagedError if its columns are not exactly those of `schema`."""
    if not table.schema.equals(stored_types(schema)):
        odd = sorted(set(table.names) ^ set(schema.names))[:MAX_NAMED] or ["their types or order"]
        raise DamagedError(f"{table.where} has other columns than those that are written there: {', '.join(odd)}")
    table.refuse_extensions(table.names)
    return table


def _read_tail(where: str, size: int, read_at: ReadAt) -> bytes:
    """The footer and the bytes after it, with Arrow's types hidden. Raises DamagedError."""
    last = read_at(max(0, size - TAIL_BYTES), TAIL_BYTES)
    length = int.from_bytes(last[:4], "little")
    if len(last) < TAIL_BYTES or last[4:] != MAGIC or length + TAIL_BYTES + len(MAGIC) > size:
        raise DamagedError(f"{where} is no readable Parquet file: it does not end as one")
    if length > MAX_PARQUET_FOOTER_BYTES:
        raise DamagedError(
            f"{where} has a footer of {length} bytes, at most {MAX_PARQUET_FOOTER_BYTES} are read; write it with fewer "
            f"row groups or columns"
        )
    footer = read_at(size - TAIL_BYTES - length, length)
    if len(footer) != length:
        raise DamagedError(f"{where} is no readable Parquet file: its footer ends early")
    return footer.replace(ARROW_SCHEMA, HIDDEN_SCHEMA) + last


def _extension_name(field: pa.Field) -> str | None:
    """The name of the extension type of a field, or of a field inside it; None if there is none."""
    name = (field.metadata or {}).get(EXTENSION_NAME_KEY)
    if name is not None:
        return name.decode("utf-8", "backslashreplace")
    kind: pa.DataType = field.type
    if pa.types.is_dictionary(kind):
        return _extension_name(pa.field("", kind.value_type))
    inner = (kind.field(number) for number in range(kind.num_fields))
    found = next((name for one in inner if (name := _extension_name(one)) is not None), None)
    return found if found is not None or is_plain(kind) else str(kind)


def _num_leaves(kind: pa.DataType) -> int:
    """How many leaf columns a type is stored as."""
    return sum(_num_leaves(kind.field(number).type) for number in range(kind.num_fields)) or 1


def _has_dictionary(kind: pa.DataType) -> bool:
    fields = (kind.field(number).type for number in range(kind.num_fields))
    return pa.types.is_dictionary(kind) or any(map(_has_dictionary, fields))


def _bytes_without_dictionaries(values: pa.Array) -> int:
    """Bytes of the dictionaries' texts once each value has its own copy."""
    kind = values.type
    if pa.types.is_dictionary(kind):
        lengths = pc.binary_length(values.dictionary).take(values.indices)  # pyright: ignore[reportAttributeAccessIssue]
        return pc.sum(lengths.cast(pa.int64())).as_py() or 0  # pyright: ignore[reportAttributeAccessIssue]
    if pa.types.is_struct(kind):
        return sum(_bytes_without_dictionaries(values.field(number)) for number in range(kind.num_fields))
    return _bytes_without_dictionaries(values.values) if _is_list(kind) or pa.types.is_map(kind) else 0


def _in_range(batch: pa.RecordBatch, first: int, start: int, stop: int | None) -> tuple[int, pa.RecordBatch]:
    """The number of the first row in [start, stop), and the batch's rows in that range."""
    skipped = max(0, start - first)
    end = batch.num_rows if stop is None else min(batch.num_rows, stop - first)
    return first + skipped, batch.slice(skipped, max(0, end - skipped))
