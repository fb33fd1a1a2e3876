"""Reads a file of labels (key and label, CSV or Parquet) and finds the label of a record by its key."""

import csv
import hashlib
import io
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import PurePosixPath

import pyarrow as pa

from blocksight.storage.inputs.ground_truth import AmbiguousTruthError, ImageTruth, Truth, parts_of
from blocksight.storage.inputs.labels import as_bytes_text, label_of
from blocksight.storage.inputs.records import as_text
from blocksight.storage.inputs.tables import column_values
from blocksight.storage.limits import MAX_LABEL_FILE_BYTES, MAX_LABEL_ROWS
from blocksight.storage.parquet.reader import ParquetTable, parquet_bytes
from blocksight.storage.parquet.rows import parquet_of_rows
from blocksight.storage.stores.store import DamagedError, ObjectStore, StoreError

KEY, LABEL = "key", "label"
CSV, TABLE = ".csv", ".parquet"
SCHEMA = pa.schema([(KEY, pa.string()), (LABEL, pa.string())])
BATCH_ROWS = 4096


class LabelFile:
    """Labels by key. A key is a file name or the end of a record's path, as in a ground truth."""

    def __init__(self, labels: Mapping[str, str]) -> None:
        """`labels` are texts; numbers are digits."""
        self.labels = labels

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the content in hex; the order of rows does not matter."""
        hashed = hashlib.sha256()
        for key, label in sorted(self.labels.items()):
            hashed.update(f"{len(key)} {key}{len(label)} {label}".encode())
        return hashed.hexdigest()

    @cached_property
    def _names(self) -> Truth:
        return Truth(tuple(ImageTruth(key, ()) for key in sorted(self.labels)))

    def key_of(self, record_key: str) -> str | None:
        """The key that belongs to a record, found as `Truth.find`; None if there is none.

        Raises AmbiguousTruthError if there is more than one.
        """
        image = self._names.find(record_key)
        return image and image.name

    def label_of(self, record_key: str) -> str | None:
        """The record's label; None if no key belongs to it, or more than one."""
        try:
            key = self.key_of(record_key)
        except AmbiguousTruthError:
            return None
        return None if key is None else self.labels[key]

    def as_parquet(self) -> bytes:
        """The labels as a Parquet file, which `read_label_file` reads."""
        rows = ({KEY: key, LABEL: label} for key, label in sorted(self.labels.items()))
        return parquet_of_rows(rows, SCHEMA)


def read_label_file(store: ObjectStore, name: str) -> LabelFile:
    """The labels in a CSV or Parquet file with the columns `key` and `label`. Rows without a label are left out.

    Raises StoreError for another kind of file, a file that is too large, a missing column, and a key with two labels.
    """
    where, suffix = f"{store.uri}/{name}", PurePosixPath(name).suffix.lower()
    if suffix not in (CSV, TABLE):
        raise StoreError(f"{where} holds no labels; wanted a .csv or .parquet file with the columns `key` and `label`")
    body = store.read(name, length=MAX_LABEL_FILE_BYTES + 1)
    if len(body) > MAX_LABEL_FILE_BYTES:
        raise StoreError(f"{where} is larger than the {MAX_LABEL_FILE_BYTES:,} bytes that are read of labels")
    try:
        rows = _csv_rows(body) if suffix == CSV else _table_rows(parquet_bytes(body, where))
        return LabelFile(_checked(rows))
    except (ValueError, csv.Error, DamagedError, pa.ArrowException) as error:
        raise StoreError(f"{where} cannot be read as labels: {error}") from error


def _checked(rows: Iterable[tuple[object, object]]) -> dict[str, str]:
    labels: dict[str, str] = {}
    names: dict[tuple[str, ...], str] = {}  # `./1.png` and `1.png` are one key
    for number, (key, label) in enumerate(rows):
        if number == MAX_LABEL_ROWS:
            raise ValueError(f"it has more than {MAX_LABEL_ROWS:,} rows")
        name, text = _key_text(key, number), label_of(label)
        if not parts_of(name):
            raise ValueError(f"row {number + 1} has no key")
        if text is None:
            continue
        first = labels.setdefault(names.setdefault(parts_of(name), name), str(text))
        if first != str(text):
            raise ValueError(f"key {name!r} has two labels, {first!r} and {str(text)!r}")
    return labels


def _key_text(key: object, number: int) -> str:
    """The key as text; a column of numbers with gaps is floating-point in pandas."""
    if isinstance(key, list | dict | tuple):
        raise ValueError(f"row {number + 1}: its key is no text and no number")  # noqa: TRY004
    if isinstance(key, bytes):
        return as_bytes_text(key)
    whole = int(key) if isinstance(key, float) and key.is_integer() else key
    return "" if whole is None else as_text(str(whole))


def _csv_rows(body: bytes) -> Iterator[tuple[str | None, str | None]]:
    reader = csv.DictReader(io.StringIO(_text(body), newline=""))
    _check_columns(reader.fieldnames or ())
    for number, row in enumerate(reader):
        if None in row:
            raise ValueError(
                f"row {number + 1} has more cells than there are columns: write a label that holds a comma in quotes"
            )
        yield row[KEY], row[LABEL]


def _text(body: bytes) -> str:
    try:
        return body.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start} is no UTF-8: save it as UTF-8") from error


def _table_rows(table: ParquetTable) -> Iterator[tuple[object, object]]:
    _check_columns(table.names)
    for _, batch in table.rows([KEY, LABEL], BATCH_ROWS):
        yield from zip(*(column_values(batch.column(name)) for name in (KEY, LABEL)), strict=True)


def _check_columns(names: Iterable[str]) -> None:
    known = list(names)
    if not {KEY, LABEL} <= set(known):
        commas = ", separated by a comma" if len(known) == 1 else ""
        raise ValueError(f"its columns are {', '.join(known) or 'none'}; wanted `{KEY}` and `{LABEL}`{commas}")
