"""Reads an inventory of S3 in place of a listing: a manifest, and the CSV or Parquet files that it names.

Both come from strangers: documents, lines and what is unpacked have limits, and only files of the manifest's own bucket
are read.
"""

import csv
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any
from urllib.parse import unquote_plus

from blocksight.storage.limits import MAX_BATCH_BYTES, MAX_DOCUMENT_BYTES, MAX_INVENTORY_LINE_BYTES, MAX_UNFOLDING
from blocksight.storage.parquet.reader import parquet_object
from blocksight.storage.stores.locations import S3
from blocksight.storage.stores.object_columns import ObjectCollector, ObjectColumns
from blocksight.storage.stores.s3_replies import version
from blocksight.storage.stores.split_listing import ListingProgress
from blocksight.storage.stores.store import DamagedError, ObjectInfo, ObjectStore, StoreError

ARN = "arn:aws:s3:::"
COLUMNS = {
    "bucket": "Bucket",
    "key": "Key",
    "size": "Size",
    "etag": "ETag",
    "is_latest": "IsLatest",
    "is_delete_marker": "IsDeleteMarker",
}
"""Columns that are read, as CSV calls them; Parquet writes them in small letters, with `_` between words."""
NEEDED = ("bucket", "key", "size", "etag")
PARQUET_NAMES = {"etag": "e_tag"}
WHOLE = re.compile("[0-9]{1,18}")
BATCH_ROWS = 1 << 14
WINDOW_BYTES = 8 << 20
ROWS_PER_LINE = 10_000
"""Rows between two looks at whether it is time to say how far it is."""

Row = Mapping[str, Any]
"""Values by the names of `COLUMNS`; a column that is not there is left out."""


@dataclass(frozen=True)
class Inventory:
    """A manifest that was read and checked."""

    uri: str
    bucket: str
    """Whose objects are listed."""
    file_format: str
    columns: tuple[str, ...]
    """Of a CSV file, in their order, in small letters; empty for Parquet."""
    files: tuple[tuple[str, int], ...]
    """Key and bytes of each file, in the manifest's bucket."""


def inventory_objects(manifests: ObjectStore, key: str, data: str) -> ObjectColumns:
    """The objects below `data`, an s3:// URI, that an inventory lists; keys are below `data`, in order, each once.

    `manifests`: the bucket that holds the manifest `key` and its files. Versions that are not the latest, and delete
    markers, are left out. Raises StoreError for an inventory of another bucket, or without an object below `data`, and
    DamagedError.
    """
    inventory = _read_manifest(manifests, key)
    bucket, _, prefix = data.removeprefix(S3).partition("/")
    if inventory.bucket != bucket or not data.startswith(S3):
        raise StoreError(
            f"{inventory.uri} is an inventory of the bucket {inventory.bucket!r}, and the data are {data}: name an "
            "inventory of the data's bucket, or leave --inventory out"
        )
    start = f"{prefix.rstrip('/')}/" if prefix else ""
    found, num_rows = ObjectCollector(), 0
    progress = ListingProgress(inventory.uri)
    for row in _rows(manifests, inventory):
        num_rows += 1
        if num_rows % ROWS_PER_LINE == 0:
            progress.add(ROWS_PER_LINE)
        if _is_live(row) and row["key"].startswith(start) and not row["key"].endswith("/"):
            found.add(row["key"].removeprefix(start), row["size"], version(row["etag"]))
    objects = found.objects().in_order()
    if not objects:
        raise StoreError(
            f"{inventory.uri} lists {num_rows:,} rows, and none is an object below {data}: name an inventory that "
            "covers the data, or leave --inventory out"
        )
    return _each_once(objects)


def _each_once(objects: ObjectColumns) -> ObjectColumns:
    if all(one.key != other.key for one, other in pairwise(objects)):
        return objects
    found, before = ObjectCollector(), None
    for info in objects:
        if info.key != before:
            found.add(info.key, info.size, info.etag)
        before = info.key
    return found.objects()


def _is_live(row: Row) -> bool:
    return row.get("is_latest") is not False and row.get("is_delete_marker") is not True


def _read_manifest(store: ObjectStore, key: str) -> Inventory:
    """Raises DamagedError if it is no manifest, and StoreError for a format that is not read."""
    uri = f"{store.uri}/{key}"
    body = store.read(key, length=MAX_DOCUMENT_BYTES + 1)
    if len(body) > MAX_DOCUMENT_BYTES:
        raise DamagedError(f"{uri} is larger than {MAX_DOCUMENT_BYTES:,} bytes, and no manifest of an inventory")
    try:
        found = json.loads(body)
        bucket, target = str(found["sourceBucket"]), str(found["destinationBucket"]).removeprefix(ARN)
        file_format, schema = str(found["fileFormat"]), str(found["fileSchema"])
        files = tuple((str(one["key"]), int(one["size"])) for one in found["files"])
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        raise DamagedError(
            f"{uri} is no manifest of an S3 inventory ({type(error).__name__}): name its manifest.json"
        ) from error
    own, _, _ = uri.removeprefix(S3).partition("/")
    if target != own:
        raise StoreError(
            f"{uri} names files in the bucket {target!r}, and lies in {own!r}: files are read from the manifest's own "
            "bucket alone; name the manifest where S3 wrote it"
        )
    if file_format not in ("CSV", "Parquet"):
        raise StoreError(f"{uri} names files of the format {file_format}, which is not read: ask S3 for Parquet or CSV")
    columns = tuple(name.strip().lower() for name in schema.split(",")) if file_format == "CSV" else ()
    return Inventory(uri, bucket, file_format, columns, files)


def _rows(store: ObjectStore, inventory: Inventory) -> Iterator[Row]:
    """The rows of all files. Raises StoreError for one of another bucket, or without size or version."""
    for key, size in inventory.files:
        info = store.head(key)
        if info is None or info.size != size:
            there = "is not there" if info is None else f"has {info.size:,} bytes"
            raise StoreError(
                f"{store.uri}/{key} {there}, and {inventory.uri} names it with {size:,}: the inventory is not whole; "
                "take another one"
            )
        is_csv = inventory.file_format == "CSV"
        for row in _csv_rows(store, info, inventory) if is_csv else _parquet_rows(store, info):
            if row["bucket"] != inventory.bucket:
                raise DamagedError(
                    f"{store.uri}/{key} lists an object of the bucket {row['bucket']!r}, and its manifest is of "
                    f"{inventory.bucket!r}"
                )
            if _is_live(row) and (row["size"] is None or row["size"] < 0 or not row["etag"]):
                raise DamagedError(f"{store.uri}/{key} lists {row['key']!r} without its size or version")
            yield row


def _needed(names: Iterable[str], name_of: Callable[[str], str], uri: str) -> dict[str, str]:
    """The name in a file of each column that is read, by ours. Raises StoreError if one that is needed is missing."""
    there = set(names)
    missing = [COLUMNS[name] for name in NEEDED if name_of(name) not in there]
    if missing:
        raise StoreError(f"{uri} has no {', '.join(missing)}: add it to the fields of the inventory, and take the next")
    return {name: name_of(name) for name in COLUMNS if name_of(name) in there}


def _parquet_rows(store: ObjectStore, info: ObjectInfo) -> Iterator[Row]:
    table = parquet_object(store, info)
    names = _needed(table.names, lambda name: PARQUET_NAMES.get(name, name), f"{store.uri}/{info.key}")
    for _, batch in table.rows([*names.values()], BATCH_ROWS):
        columns = {name: batch.column(stored).to_pylist() for name, stored in names.items()}
        for values in zip(*columns.values(), strict=True):
            row = dict(zip(columns, values, strict=True))
            size = row["size"] if type(row["size"]) is int else None
            yield row | {name: _text(row[name]) for name in ("bucket", "key", "etag")} | {"size": size}


def _text(value: Any) -> str:
    return value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else str(value or "")


def _csv_rows(store: ObjectStore, info: ObjectInfo, inventory: Inventory) -> Iterator[Row]:
    """Rows of a CSV file, which has no header and whose keys are encoded as in a URL."""
    uri = f"{store.uri}/{info.key}"
    names = _needed(inventory.columns, lambda name: COLUMNS[name].lower(), inventory.uri)
    places = {name: inventory.columns.index(stored) for name, stored in names.items()}
    for fields in _csv_fields(store, info):
        if len(fields) != len(inventory.columns):
            raise DamagedError(f"{uri} has a row of {len(fields)} fields, and its manifest {len(inventory.columns)}")
        row: dict[str, Any] = {name: fields[place] for name, place in places.items()}
        row |= {name: row[name] == "true" for name in ("is_latest", "is_delete_marker") if row.get(name)}
        size = int(row["size"]) if WHOLE.fullmatch(row["size"]) else None
        yield row | {"size": size, "key": unquote_plus(row["key"], errors="surrogateescape")}


def _csv_fields(store: ObjectStore, info: ObjectInfo) -> Iterator[Sequence[str]]:
    try:
        yield from csv.reader(_lines(store, info))
    except csv.Error as error:
        raise DamagedError(f"{store.uri}/{info.key} is no CSV: {error}") from error


def _lines(store: ObjectStore, info: ObjectInfo) -> Iterator[str]:
    """The lines of a text file, unpacked if it is named so. Raises DamagedError."""
    uri = f"{store.uri}/{info.key}"
    rest = b""
    for data in _unpacked(store, info) if info.key.endswith(".gz") else _windows(store, info):
        *lines, rest = (rest + data).split(b"\n")
        if len(rest) > MAX_INVENTORY_LINE_BYTES:
            raise DamagedError(f"{uri} has a line of more than {MAX_INVENTORY_LINE_BYTES:,} bytes")
        yield from (line.decode("utf-8", "surrogateescape") for line in lines if line.strip())
    if rest.strip():
        yield rest.decode("utf-8", "surrogateescape")


def _windows(store: ObjectStore, info: ObjectInfo) -> Iterator[bytes]:
    for start in range(0, info.size, WINDOW_BYTES):
        yield store.read(info.key, etag=info.etag, start=start, length=WINDOW_BYTES)


def _unpacked(store: ObjectStore, info: ObjectInfo) -> Iterator[bytes]:
    """What a gzip file holds, at most `MAX_UNFOLDING` times its size. Raises DamagedError."""
    uri, left = f"{store.uri}/{info.key}", MAX_UNFOLDING * info.size + MAX_BATCH_BYTES
    unpacking = zlib.decompressobj(wbits=zlib.MAX_WBITS | 16)
    try:
        for data in _windows(store, info):
            while data:
                if unpacking.eof:  # a file may hold several members
                    unpacking = zlib.decompressobj(wbits=zlib.MAX_WBITS | 16)
                made = unpacking.decompress(data, WINDOW_BYTES)
                data = unpacking.unused_data if unpacking.eof else unpacking.unconsumed_tail
                left -= len(made)
                if left < 0:
                    raise DamagedError(f"{uri} unpacks to more than {MAX_UNFOLDING} times its size")
                yield made
    except zlib.error as error:
        raise DamagedError(f"{uri} is no gzip file: {error}") from error
    if not unpacking.eof:
        raise DamagedError(f"{uri} ends early")
