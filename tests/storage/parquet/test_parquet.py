"""Parquet files are read without running code, within bounded memory, and only if their footer agrees with them."""

import base64
import io
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow.parquet import encryption

from blocksight.storage.inputs.annotations import read_truth
from blocksight.storage.inputs.tables import read_table, table_facts
from blocksight.storage.outputs.fragments import encode_fragment, read_fragment
from blocksight.storage.outputs.schema import SCHEMA
from blocksight.storage.parquet.reader import parquet_bytes
from blocksight.storage.parquet.thrift import _BYTE, _DOUBLE, _end_of_value, number_at
from blocksight.storage.rejects import RejectCode
from blocksight.storage.stores.store import DamagedError, StoreError
from tests.storage.crafted import (
    DELTA_LENGTHS,
    DELTA_PREFIXES,
    PLAIN,
    RLE_DICTIONARY,
    ZSTD,
    Column,
    cell,
    delta_bomb,
    dictionary,
    number,
    page,
    page_2,
    parquet,
    signed,
)
from tests.storage.memory import MemoryStore

ROOT = Path(__file__).parents[3]
NAME = "tests.runs_code"
IMAGES = [b"one", b"two", b"three", b"four"]


class Trap(pa.ExtensionType):
    """An extension type like Ray's: Arrow calls it with bytes of the file."""

    calls: list[bytes] = []  # noqa: RUF012 - shared by all, as the type is

    def __init__(self, storage: pa.DataType | None = None) -> None:
        super().__init__(storage or pa.binary(), NAME)

    def __arrow_ext_serialize__(self) -> bytes:
        return b""

    @classmethod
    def __arrow_ext_deserialize__(cls, storage_type: pa.DataType, serialized: bytes) -> "Trap":
        cls.calls.append(serialized)
        return cls(storage_type)


@pytest.fixture
def trap():
    """A registered type that notes when Arrow calls it."""
    pa.register_extension_type(Trap())
    Trap.calls.clear()
    yield Trap.calls
    pa.unregister_extension_type(NAME)


def written(schema: pa.Schema | None = None, **columns) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table(columns, schema=schema), sink)
    return sink.getvalue()


def evil(name: str, kind: pa.DataType) -> pa.Field:
    metadata = {"ARROW:extension:name": NAME, "ARROW:extension:metadata": "payload"}
    return pa.field(name, kind, metadata=metadata)


def stored(body: bytes):
    store = MemoryStore()
    store.put("t.parquet", body)
    return store, store.head("t.parquet")


def records(body: bytes):
    store, info = stored(body)
    return list(read_table(store, info, 0, table_facts(store, info).num_rows))


def count(body: bytes) -> int:
    """The number of records; none of them is kept."""
    store, info = stored(body)
    return sum(1 for _ in read_table(store, info, 0, table_facts(store, info).num_rows))


def shown(body: bytes) -> list:
    return [record.reject.code if record.reject else record.data for record in records(body)]


NESTINGS = {
    "itself": lambda name: evil(name, pa.binary()),
    "in a struct": lambda name: pa.field(name, pa.struct([evil("inner", pa.binary())])),
    "in a list": lambda name: pa.field(name, pa.list_(evil("element", pa.binary()))),
    "in a map": lambda name: pa.field(name, pa.map_(pa.string(), evil("value", pa.binary()))),
    "in a list of structs": lambda name: pa.field(name, pa.list_(pa.struct([evil("inner", pa.binary())]))),
}


@pytest.mark.parametrize("nesting", NESTINGS)
def test_an_unused_column_of_an_extension_type_is_ignored_and_named(trap, nesting):
    field = NESTINGS[nesting]("extra")
    schema = pa.schema([pa.field("image", pa.binary()), field])
    body = written(schema, image=IMAGES, extra=pa.nulls(4, field.type))
    pq.ParquetFile(io.BytesIO(body))
    assert trap, "the trap does not work"
    trap.clear()
    assert shown(body) == IMAGES
    assert table_facts(*stored(body)).unread == (f"column extra ({NAME})",)
    assert trap == []


def test_views_are_no_extension_types():
    lists = pa.array([["a"], [], None, ["b", "c"]], pa.list_view(pa.string_view()))
    body = written(image=pa.array(IMAGES, pa.binary_view()), words=lists)
    assert shown(body) == IMAGES
    assert table_facts(*stored(body)).unread == ()


@pytest.mark.parametrize("role", ["image", "label", "key"])
@pytest.mark.parametrize("nesting", NESTINGS)
def test_a_used_column_of_an_extension_type_rejects_the_shard(trap, nesting, role):
    field = NESTINGS[nesting](role)
    fields = {name: pa.field(name, pa.binary()) for name in ("image", "label", "key")} | {role: field}
    columns = {name: IMAGES if name != role else pa.nulls(4, field.type) for name in fields}
    with pytest.raises(DamagedError, match=f"column `{role}` of the extension type {NAME}"):
        records(written(pa.schema(list(fields.values())), **columns))
    assert trap == []


def test_a_hidden_field_beside_the_bytes_rejects_the_shard(trap):
    kind = pa.struct([pa.field("bytes", pa.binary()), evil("more", pa.binary())])
    images = pa.array([{"bytes": one, "more": b"x"} for one in IMAGES], kind)
    with pytest.raises(DamagedError, match="column `image` of the extension type"):
        records(written(pa.schema([pa.field("image", kind)]), image=images))
    assert trap == []


def test_a_fragment_or_ground_truth_with_an_extension_type_is_damaged(trap):
    keyed = SCHEMA.set(0, evil("key", pa.string()).with_nullable(False))
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([], schema=keyed), sink)
    for columns in (None, ["status"]):
        with pytest.raises(DamagedError, match="extension type"):
            read_fragment(sink.getvalue(), columns)
    truth = written(
        pa.schema([evil("key", pa.binary()), ("boxes", pa.list_(pa.list_(pa.float64())))]), key=[], boxes=[]
    )
    store, _ = stored(truth)
    with pytest.raises(StoreError, match="extension type"):
        read_truth(store)
    assert trap == []


def test_types_that_cannot_be_known_are_damage():
    body = written(image=IMAGES)
    good = pq.ParquetFile(io.BytesIO(body)).metadata.metadata[b"ARROW:schema"]
    bad = base64.b64encode(b"x" * len(base64.b64decode(good)))
    with pytest.raises(DamagedError, match="has an unreadable Arrow schema"):
        records(body.replace(good, bad))


@pytest.mark.parametrize(
    "column",
    [
        pa.array(["a", "b", "a", None]).dictionary_encode(),
        pa.array([b"a", b"b", b"a", None]).dictionary_encode(),
        pa.array(["a", "b", "a", None], pa.large_string()),
        pa.array(["a", "b", "a", None], pa.string_view()),
        pa.array([b"a", b"b", b"a", None], pa.binary_view()),
    ],
)
def test_dictionaries_and_large_texts_are_read(column):
    found = records(written(image=pa.array(IMAGES).dictionary_encode(), label=column, key=column))
    assert [(one.key, one.label, one.data) for one in found if one.reject is None] == [
        ("t.parquet/a", "a", b"one"),
        ("t.parquet/b", "b", b"two"),
        ("t.parquet/3", None, b"four"),
    ]


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        (pa.array([1, 2, 3, 4]).dictionary_encode(), [1, 2, 3, 4]),
        (["²", "9" * 5000, "", "x\x00y"], ["²", "9" * 1024 + "…", None, "x\x00y"]),
        (pa.array([0.0, 1.5, float("nan"), None]), [0, "1.5", None, None]),
        (pa.array([2**64 - 1, 0, 1, None], pa.uint64()), [2**64 - 1, 0, 1, None]),
        (pa.array([True, False, None, True]), ["True", "False", None, "True"]),
        (pa.array([b"\xff", b"a", None, b""]), [r"\xff", "a", None, None]),
        (pa.array([1, 2, 3, None]).cast(pa.decimal128(22, 2)), ["1.00", "2.00", "3.00", None]),
        (pa.array([2**62, 0, None, 1], pa.timestamp("ns")), None),
        (pa.array([2**62, 0, None, 1], pa.timestamp("us", "UTC")), None),
        (pa.array([1, 0, None, 2], pa.date32()), ["1970-01-02", "1970-01-01", None, "1970-01-03"]),
        (pa.nulls(4), [None] * 4),
    ],
)
def test_labels_of_any_plain_type_are_read(values, labels):
    found = [record.label for record in records(written(image=IMAGES, label=values))]
    assert len(found) == 4 if labels is None else found == labels


def test_a_list_of_one_label_is_that_label():
    body = written(image=IMAGES, label=[[1], [2], [], None])
    assert [record.label for record in records(body)] == [1, 2, None, None]
    assert table_facts(*stored(body)).unread == ()


def test_text_that_is_no_text_is_read_as_codes():
    bad = pa.Array.from_buffers(pa.string(), 4, pa.array([b"\xff", b"a", b"b", b"c"]).buffers())
    found = records(written(image=IMAGES, label=bad, key=bad))
    assert [(one.key, one.label) for one in found][:2] == [(r"t.parquet/\xff", r"\xff"), ("t.parquet/a", "a")]


def test_a_key_that_is_too_long_rejects_its_row():
    found = records(written(image=IMAGES, key=["k" * 5000, "b", "k" * 4096, "k" * 5000]))
    assert [one.reject and one.reject.code for one in found] == [
        RejectCode.KEY_REFUSED,
        None,
        None,
        RejectCode.KEY_REFUSED,
    ]
    assert found[0].key == f"t.parquet/{'k' * 64}… (row 0)"


@pytest.mark.parametrize("name", ["image", "label", "key"])
def test_two_columns_of_one_name_are_named_with_the_file(name):
    columns = {"image": IMAGES, name: IMAGES}
    table = pa.Table.from_arrays([pa.array(IMAGES)] * (len(columns) + 1), [*columns, name])
    sink = io.BytesIO()
    pq.write_table(table, sink)
    with pytest.raises(DamagedError, match=f"t.parquet has 2 columns named `{name}`"):
        records(sink.getvalue())


def test_a_column_whose_name_begins_as_the_images_is_not_read():
    kind = pa.struct([pa.field("bytes", pa.binary())])
    images = pa.array([{"bytes": one} for one in IMAGES], kind)
    table = pa.Table.from_arrays([pa.array([b"no"] * 4), images], ["image.bytes", "image"])
    sink = io.BytesIO()
    pq.write_table(table, sink)
    assert shown(sink.getvalue()) == IMAGES


def test_images_of_other_layouts_of_bytes():
    assert shown(written(image=pa.array([b"ab", b"cd"], pa.binary(2)))) == [b"ab", b"cd"]
    assert shown(written(image=["ab", None])) == [b"ab", RejectCode.MISSING_IMAGE]
    assert shown(written(image=pa.nulls(2))) == [RejectCode.MISSING_IMAGE] * 2


def test_an_image_over_the_cap_rejects_its_row(monkeypatch):
    monkeypatch.setattr("blocksight.storage.inputs.tables.MAX_IMAGE_BYTES", 4)
    assert shown(written(image=[b"12345", b"1234"])) == [RejectCode.TOO_MANY_BYTES, b"1234"]


# ---------------------------------------------------------------- what footers and pages say

GOOD = page(cell(b"abc"), 1)


def test_files_by_hand_are_read():
    assert shown(parquet(Column([GOOD], 1), Column([GOOD, GOOD], 2))) == [b"abc"] * 3
    entries = dictionary(cell(b"abc") + cell(b"de"), 2)
    indices = page(b"\1" + b"\3\2", 2, RLE_DICTIONARY)  # a bit each: 0 and 1
    column = Column([entries, indices], 2, (PLAIN, RLE_DICTIONARY), dictionary_bytes=len(entries))
    assert shown(parquet(column)) == [b"abc", b"de"]
    body = b"".join([number(128), number(4), number(1), signed(3)]) + b"abc"
    assert shown(parquet(Column([page(body, 1, DELTA_LENGTHS)], 1, (DELTA_LENGTHS,)))) == [b"abc"]
    empty = b"".join([number(128), number(4), number(100), signed(0), signed(0), bytes(4)])
    assert shown(parquet(Column([page(empty, 100, DELTA_LENGTHS)], 100, (DELTA_LENGTHS,)))) == [b""] * 100


def test_a_number_of_a_page_header_has_ten_bytes_at_most():
    assert number_at(b"\xff" * 9 + b"\x01", 0) == (2**64 - 1, 10)
    with pytest.raises(ValueError, match="more than ten bytes"):
        number_at(b"\xff" * 10, 0)


def test_a_field_that_is_passed_by_has_its_length():
    assert [_end_of_value(b"\x85\x01", at, kind, 0) for at, kind in ((0, _BYTE), (0, _DOUBLE), (0, 5))] == [1, 8, 2]


def test_values_that_share_their_beginnings_are_read():
    """Several blocks of prefixes and suffixes, the last of them cut short."""
    images = [b"%06d" % number * (1 + number % 3) for number in range(1000)]
    sink = io.BytesIO()
    encoding = {"image": "DELTA_BYTE_ARRAY"}
    pq.write_table(pa.table({"image": images}), sink, use_dictionary=False, column_encoding=encoding)
    assert shown(sink.getvalue()) == images


DELTA = delta_bomb(400_000_000)
PACKED = pa.Codec("zstd").compress(DELTA, asbytes=True)

LIES = {
    "rows without bytes": (lambda: parquet(Column([GOOD], 5000)), "5000 rows in"),
    "rows of the groups": (lambda: parquet(Column([GOOD], 1), num_rows=2), "2 rows, and its row groups 1"),
    "negative rows": (lambda: parquet(Column([GOOD], -1), Column([GOOD, GOOD], 2)), "1 rows, and its row groups 1"),
    "fewer values than rows": (lambda: parquet(Column([GOOD], 1, num_values=2)), "the group has 1 rows"),
    "fewer rows than the footer has": (
        lambda: parquet(Column([GOOD], 2)),
        "has 1 rows in row group 0; the footer says 2",
    ),
    "more values than the footer has": (lambda: parquet(Column([page(cell(b"a") * 2, 2)], 1)), "the footer says 1"),
    "pages beyond the footer's sizes": (
        lambda: parquet(Column([GOOD], 1, unfolded=6)),
        "to 7 bytes or more",
    ),
    "a page of the largest size": (
        lambda: parquet(Column([page(cell(b"abc"), 1, unfolded=2**31 - 1)], 1, codec=ZSTD, unfolded=2**40)),
        "decompresses to 2147483647 bytes",
    ),
    "a negative page": (lambda: parquet(Column([page(cell(b"abc"), 1, unfolded=-1)], 1)), "wanted a number from 0"),
    "stored larger than unfolded": (
        lambda: parquet(Column([page(cell(bytes(100_000)), 1, unfolded=1)], 1, unfolded=200_000)),
        "stored",
    ),
    "entries without bytes": (
        lambda: parquet(
            Column(
                [one := dictionary(cell(b"a"), 2**31 - 1), GOOD], 1, (PLAIN, RLE_DICTIONARY), dictionary_bytes=len(one)
            )
        ),
        "a dictionary of 2147483647 entries",
    ),
    "a dictionary that is denied": (
        lambda: parquet(Column([dictionary(cell(b"a"), 1), page(b"\1\2\0", 1, RLE_DICTIONARY)], 1)),
        "a dictionary of 1 entries",
    ),
    "an encoding that is denied": (lambda: parquet(Column([page(b"", 1, DELTA_PREFIXES)], 1)), "in encoding 7"),
    "lengths without texts": (
        lambda: parquet(Column([page(DELTA, 1, DELTA_LENGTHS)], 1, (DELTA_LENGTHS,))),
        "holds 400000000 values",
    ),
    "the same, compressed": (
        lambda: parquet(Column([page(PACKED, 1, DELTA_LENGTHS, len(DELTA))], 1, (DELTA_LENGTHS,), ZSTD, 1 << 20)),
        "holds 400000000 values",
    ),
    "the same, of the second kind": (
        lambda: parquet(Column([page_2(PACKED, 1, DELTA_LENGTHS, len(DELTA))], 1, (DELTA_LENGTHS,), ZSTD, 1 << 20)),
        "holds 400000000 values",
    ),
    "prefixes without texts": (
        lambda: parquet(Column([page(DELTA, 1, DELTA_PREFIXES)], 1, (DELTA_PREFIXES,))),
        "holds 400000000 values",
    ),
    "suffixes without prefixes": (
        lambda: parquet(
            Column(
                [page(number(128) + number(4) + number(1) + signed(0) + DELTA, 1, DELTA_PREFIXES)], 1, (DELTA_PREFIXES,)
            )
        ),
        "holds 400000000 values",
    ),
    "parts of a block": (
        lambda: parquet(
            Column([page(number(2**31) + number(2**26) + number(1) + signed(0), 1, DELTA_LENGTHS)], 1, (DELTA_LENGTHS,))
        ),
        "in blocks of 67108864 parts",
    ),
    "no header": (lambda: parquet(Column([b"\xff" * 40], 1)), "page"),
    "a cut header": (lambda: parquet(Column([GOOD[:3]], 1)), "page|EOF|deserialize"),
}


@pytest.mark.parametrize("lie", LIES)
def test_what_a_footer_or_a_page_says_is_checked(lie):
    make, reason = LIES[lie]
    with pytest.raises(DamagedError, match=reason):
        records(make())


class Keys(encryption.KmsClient):
    """Does not encrypt the key: it is stored in the file."""

    def wrap_key(self, key_bytes: bytes, master_key_identifier: str) -> bytes:
        return base64.b64encode(key_bytes)


def encrypted(**columns) -> bytes:
    """A file whose footer is plain and whose column `image` is encrypted."""
    table, sink = pa.table(columns), io.BytesIO()
    asked = encryption.EncryptionConfiguration("footer", column_keys={"column": ["image"]}, plaintext_footer=True)
    made = encryption.CryptoFactory(lambda _: Keys()).file_encryption_properties(
        encryption.KmsConnectionConfig(), asked
    )
    with pq.ParquetWriter(sink, table.schema, encryption_properties=made) as writer:
        writer.write_table(table)
    return sink.getvalue()


def with_short_statistics(**columns) -> bytes:
    """A file whose first column has a list of one count of levels instead of two."""
    body = written(**columns)
    footer, tail = body[:-8], body[-8:]
    two, one = bytes.fromhex("192602"), bytes.fromhex("1916")  # a list of two 64-bit numbers, and one of the second
    assert footer.count(two) == 1
    length = int.from_bytes(tail[:4], "little") - 1
    return footer.replace(two, one) + length.to_bytes(4, "little") + tail[4:]


@pytest.mark.parametrize(("make", "reason"), [(encrypted, "decrypt"), (with_short_statistics, "size mismatch")])
def test_a_column_that_arrow_cannot_take_is_damage_and_ends_no_process(make, reason):
    body = make(image=[b"one", None])
    assert table_facts(*stored(body)).num_rows == 2
    with pytest.raises(DamagedError, match=reason):
        records(body)


def test_a_footer_over_the_cap_is_refused_unread(monkeypatch):
    body = written(image=IMAGES)
    monkeypatch.setattr("blocksight.storage.parquet.reader.MAX_PARQUET_FOOTER_BYTES", 100)
    with pytest.raises(DamagedError, match=r"a footer of .* bytes, at most 100 are read"):
        records(body)


@pytest.mark.parametrize("length", [2**32 - 1, 2**20])
def test_a_footer_that_is_longer_than_its_file_is_none(length):
    with pytest.raises(DamagedError, match="does not end as one"):
        records(b"PAR1" + bytes(100) + length.to_bytes(4, "little") + b"PAR1")


@pytest.mark.parametrize("tail", [bytes(4) + b"PARE", b"\xff\xff\xff\0PAR2"])
def test_a_file_that_does_not_end_as_parquet_is_none(tail):
    with pytest.raises(DamagedError, match="does not end as one"):
        records(bytes(1 << 12) + tail)


def test_columns_over_the_cap_are_refused(monkeypatch):
    monkeypatch.setattr("blocksight.storage.parquet.reader.MAX_PARQUET_COLUMNS", 2)
    assert shown(written(image=IMAGES, a=IMAGES)) == IMAGES
    with pytest.raises(DamagedError, match="has 3 columns, at most 2"):
        records(written(image=IMAGES, a=IMAGES, b=IMAGES))


def test_pages_that_must_be_held_together_are_counted_together(monkeypatch):
    columns = {"image": [bytes(3000)] * 2, "label": ["x" * 3000] * 2}
    monkeypatch.setattr("blocksight.storage.parquet.pages.MAX_PAGES_BYTES", 20_000)
    assert len(records(written(**columns))) == 2
    monkeypatch.setattr("blocksight.storage.parquet.pages.MAX_PAGES_BYTES", 5_000)
    with pytest.raises(DamagedError, match=r"image, label: pages of .* at most 5000 may"):
        records(written(**columns))


def test_rows_at_once_follow_from_what_they_may_take():
    body = written(image=[bytes([number]) * 1000 for number in range(100)], small=range(100))
    table = parquet_bytes(body, "t")

    def sizes(columns, most_bytes):
        return [batch.num_rows for _, batch in table.rows(columns, 16, most_bytes=most_bytes)]

    assert max(sizes(["image"], 2**30)) == 16
    assert max(sizes(["image"], 1000)) == 1
    assert max(sizes(["small"], 100)) == 4
    assert [first for first, _ in table.rows(["small"], 16, 30, 50)] == [30, 32, 48]


def test_lists_that_repeat_one_long_text_are_refused():
    texts = pa.array([["x" * 10_000] * 1000], pa.list_(pa.string()))
    table = parquet_bytes(written(texts=texts), "t")
    assert len(next(table.rows(["texts"], 1))[1]["texts"][0]) == 1000
    with pytest.raises(DamagedError, match="lists take 10000000 bytes, at most 1000000"):
        list(table.rows(["texts"], 1, most_bytes=1_000_000))
    with pytest.raises(DamagedError, match="may take more than 1000 bytes"):
        list(table.rows(["texts"], 1, most_bytes=1000))


def test_a_table_is_read_up_to_its_bound(monkeypatch):
    body = encode_fragment([], {})
    assert read_fragment(body).num_rows == 0
    monkeypatch.setattr("blocksight.storage.outputs.fragments.MAX_FRAGMENT_BYTES", len(body) - 1)
    with pytest.raises(DamagedError, match=f"the fragment has {len(body)} bytes or more"):
        read_fragment(body)
    table = parquet_bytes(written(a=["x" * 1000] * 100), "t")
    schema = pa.schema([("a", pa.string())])
    assert table.table(["a"], schema).num_rows == 100
    with pytest.raises(DamagedError, match="more than the 50000 bytes that may be in memory"):
        table.table(["a"], schema, most_bytes=50_000)


# ---------------------------------------------------------------- memory

CAP = 8 << 20
"""Bytes of an image in the process below. Bounds are multiples of it; it is small, so that bombs are quick."""

MEASURE = """
import resource, sys
import blocksight.storage.limits as limits

factor = {cap} / limits.MAX_IMAGE_BYTES
for name in ("MAX_IMAGE_BYTES", "MAX_PAGES_BYTES", "MAX_BATCH_BYTES", "MAX_FRAGMENT_BYTES"):
    setattr(limits, name, int(getattr(limits, name) * factor))

from blocksight.storage.stores.store import StoreError
from tests.storage.parquet.test_parquet import BOMBS, count

def used():
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("VmData"))

bodies = {{name: make() for name, make in BOMBS.items()}}
most = used() + 8 * {cap}
resource.setrlimit(resource.RLIMIT_DATA, (most, most))
for name, body in bodies.items():
    try:
        print(name, "|", count(body), "rows")
    except StoreError as error:
        print(name, "|", error)
"""


def packed(body: bytes) -> bytes:
    return pa.Codec("zstd").compress(body, asbytes=True)


def zstd(*bodies: bytes, unfolded: int | None = None) -> bytes:
    """A row group for each body, which is one cell."""
    columns = []
    for body in bodies:
        value = cell(body)
        one = page(packed(value), 1, unfolded=len(value))
        columns.append(Column([one], 1, codec=ZSTD, unfolded=len(value) + 100 if unfolded is None else unfolded))
    return parquet(*columns)


def repeated(body: bytes, num_rows: int) -> bytes:
    """All rows refer to one entry of a dictionary."""
    value = cell(body)
    entries = dictionary(packed(value), 1, len(value))
    indices = b"\1" + number(num_rows << 1) + b"\0"
    pages = [entries, page(packed(indices), num_rows, RLE_DICTIONARY, len(indices))]
    return parquet(Column(pages, num_rows, (PLAIN, RLE_DICTIONARY), ZSTD, len(value) + 200, len(entries)))


BOMBS = {
    "one cell": lambda: zstd(bytes(40 * CAP)),
    "a cell that is barely too large": lambda: zstd(bytes(CAP + 1)),
    "a cell behind a footer that lies": lambda: zstd(bytes(40 * CAP), unfolded=1 << 40),
    "many groups": lambda: zstd(*[bytes(CAP)] * 40),
    "a dictionary": lambda: repeated(bytes(CAP), 200),
    "a dictionary at its bound": lambda: repeated(bytes(3 * CAP // 2 - 1000), 5),
    "a dictionary that is too large": lambda: repeated(bytes(40 * CAP), 200),
    "lengths": lambda: parquet(Column([page(DELTA, 1, DELTA_LENGTHS)], 1, (DELTA_LENGTHS,))),
}


def test_bombs_stay_within_eight_times_the_cap():
    """The process may not allocate more. Without a check it dies, or reports that memory is short."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE.format(cap=CAP)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    found = dict(line.split(" | ", 1) for line in done.stdout.splitlines())
    assert set(found) == set(BOMBS), done.stdout + done.stderr
    assert found["one cell"].endswith(f"decompresses to {40 * CAP + 4} bytes, at most {3 * CAP // 2} are read")
    assert found["a cell that is barely too large"] == "1 rows"
    assert f"decompresses to {40 * CAP + 4} bytes" in found["a cell behind a footer that lies"]
    assert found["many groups"] == "40 rows"
    assert found["a dictionary"] == "200 rows"
    assert found["a dictionary at its bound"] == "5 rows"
    assert f"decompresses to {40 * CAP + 4}" in found["a dictionary that is too large"]
    assert "holds 400000000 values" in found["lengths"]
