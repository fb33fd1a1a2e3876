"""An inventory of S3 in place of a listing: the live objects below the data; what is wrong is one sentence."""

import csv
import gzip
import io
import json
from urllib.parse import quote_plus

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from blocksight.storage.inputs import inventory
from blocksight.storage.inputs.inventory import inventory_objects
from blocksight.storage.stores.store import DamagedError, StoreError
from tests.storage.memory import MemoryStore

SCHEMA = "Bucket, Key, VersionId, IsLatest, IsDeleteMarker, Size, ETag"
NAMES = ("bucket", "key", "version_id", "is_latest", "is_delete_marker", "size", "e_tag")
MANIFEST = "inv/data/daily/manifest.json"


def row(key, size=7, *, bucket="data", latest=True, deleted=False, etag="D41D8CD98F00B204E9800998ECF8427E"):
    return (bucket, key, "v1", latest, deleted, size, etag)


ROWS = [
    row("d/é a+b.png"),
    row("d/b.png", 9),
    row("d/b.png", 8, latest=False),
    row("d/gone.png", None, deleted=True, etag=""),
    row("d/folder/", 0),
    row("elsewhere/x.png"),
    row("d/a/1.png", 1 << 33),
]
LIVE = [("a/1.png", 1 << 33), ("b.png", 9), ("é a+b.png", 7)]


class Reports(MemoryStore):
    """The bucket that S3 writes inventories to."""

    @property
    def uri(self):
        return "s3://reports"


def csv_bytes(rows) -> bytes:
    body = io.StringIO()
    texts = {True: "true", False: "false", None: ""}
    for bucket, key, version, latest, deleted, size, etag in rows:
        fields = (bucket, quote_plus(key), version, texts[latest], texts[deleted], "" if size is None else size, etag)
        csv.writer(body, quoting=csv.QUOTE_ALL, lineterminator="\n").writerow(fields)
    return body.getvalue().encode()


def packed(rows) -> bytes:
    """As several members, which is one file for gzip."""
    return b"".join(gzip.compress(csv_bytes([one])) for one in rows)


def parquet_bytes(rows) -> bytes:
    body = io.BytesIO()
    pq.write_table(
        pa.table({name: list(values) for name, values in zip(NAMES, zip(*rows, strict=True), strict=True)}), body
    )
    return body.getvalue()


FORMATS = {"csv": ("CSV", csv_bytes), "csv.gz": ("CSV", packed), "parquet": ("Parquet", parquet_bytes)}


def reports(suffix, *files, **changes) -> Reports:
    """A bucket with a manifest of these files; `changes` are of the manifest."""
    file_format, written = FORMATS[suffix]
    store, named = Reports(), []
    for number, rows in enumerate(files):
        body = rows if isinstance(rows, bytes) else written(rows)
        store.put(f"inv/data/{number}.{suffix}", body)
        named.append({"key": f"inv/data/{number}.{suffix}", "size": len(body), "MD5checksum": "0" * 32})
    manifest = {
        "sourceBucket": "data",
        "destinationBucket": "arn:aws:s3:::reports",
        "version": "2016-11-30",
        "creationTimestamp": "1514944800000",
        "fileFormat": file_format,
        "fileSchema": SCHEMA if file_format == "CSV" else "message s3.inventory { }",
        "files": named,
    }
    store.put(MANIFEST, json.dumps({**manifest, **changes}).encode())
    return store


def found_in(store, data="s3://data/d"):
    return inventory_objects(store, MANIFEST, data)


@pytest.mark.parametrize("suffix", FORMATS)
def test_the_live_objects_below_the_data_are_listed(suffix):
    found = found_in(reports(suffix, ROWS[:3], ROWS[3:], [row("d/b.png", 9)]))
    assert [(info.key, info.size) for info in found] == LIVE
    assert {info.etag for info in found} == {'"d41d8cd98f00b204e9800998ecf8427e"'}


def test_a_whole_bucket_may_be_the_data():
    assert "d/b.png" in [info.key for info in found_in(reports("csv", ROWS), "s3://data")]


@pytest.mark.parametrize("suffix", FORMATS)
def test_long_files_are_read_piece_by_piece(suffix, monkeypatch):
    monkeypatch.setattr(inventory, "WINDOW_BYTES", 11)
    monkeypatch.setattr(inventory, "BATCH_ROWS", 2)
    assert [(info.key, info.size) for info in found_in(reports(suffix, ROWS))] == LIVE


CHANGES = {
    "another bucket": ({"sourceBucket": "other"}, "inventory of the bucket 'other', and the data are s3://data/d"),
    "another target": ({"destinationBucket": "arn:aws:s3:::secret"}, "in the bucket 'secret', and lies in 'reports'"),
    "ORC": ({"fileFormat": "ORC"}, "format ORC, which is not read: ask S3 for Parquet or CSV"),
    "no version": ({"fileSchema": "Bucket, Key, Size"}, "has no ETag: add it to the fields"),
    "no files": ({"files": None}, "is no manifest of an S3 inventory"),
    "other columns": ({"fileSchema": f"{SCHEMA}, StorageClass"}, "has a row of 7 fields, and its manifest 8"),
    "a file that is gone": ({"files": [{"key": "x.csv", "size": 3}]}, "x.csv is not there"),
    "a file cut short": ({"files": [{"key": "inv/data/0.csv", "size": 3}]}, "names it with 3: the inventory is not"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_manifest_that_does_not_fit_is_refused_with_both_sides(change):
    changes, expected = CHANGES[change]
    with pytest.raises(StoreError, match=expected):
        found_in(reports("csv", ROWS, **changes))


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        (row("d/a.png", bucket="other"), "of the bucket 'other', and its manifest is of 'data'"),
        (row("d/a.png", None), "'d/a.png' without its size or version"),
        (row("d/a.png", etag=""), "'d/a.png' without its size or version"),
    ],
)
def test_a_row_that_does_not_fit_is_refused(suffix, wrong, expected):
    with pytest.raises(DamagedError, match=expected):
        found_in(reports(suffix, [*ROWS, wrong]))


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_file_of_other_bytes_is_refused(suffix):
    with pytest.raises(DamagedError, match=r"inv/data/0"):
        found_in(reports(suffix, b"\x1f\x8bno such file\n"))


def test_an_inventory_without_an_object_below_the_data_is_refused():
    with pytest.raises(StoreError, match="lists 7 rows, and none is an object below s3://data/none"):
        found_in(reports("csv", ROWS), "s3://data/none")


def test_what_is_read_is_bounded(monkeypatch):
    cut = packed(ROWS)[:-9]
    with pytest.raises(DamagedError, match="ends early"):
        found_in(reports("csv.gz", cut))
    monkeypatch.setattr(inventory, "MAX_BATCH_BYTES", 0)
    with pytest.raises(DamagedError, match="unpacks to more than 64 times"):
        found_in(reports("csv.gz", gzip.compress(csv_bytes(ROWS * 2_000))))
    monkeypatch.setattr(inventory, "MAX_INVENTORY_LINE_BYTES", 50)
    with pytest.raises(DamagedError, match="a line of more than 50 bytes"):
        found_in(reports("csv", b"x" * 51))
    monkeypatch.setattr(inventory, "MAX_DOCUMENT_BYTES", 50)
    with pytest.raises(DamagedError, match="larger than 50 bytes"):
        found_in(reports("csv", ROWS))
