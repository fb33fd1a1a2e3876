"""Tar shards: records, hostile members, breaks, and byte ranges that add up."""

import io
import tarfile
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.rejects import RejectCode
from storage.tars import read_tar, sample_tar, tar_offset_after
from tests.storage.memory import MemoryStore


def archive(members, *, kind=tarfile.PAX_FORMAT, end=True) -> bytes:
    """A tar of (name, bytes) members, or of ready TarInfo objects."""
    buffer = io.BytesIO()
    tar = tarfile.TarFile(fileobj=buffer, mode="w", format=kind)
    for name, body in members:
        info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
        info.size = len(body) if info.isreg() else 0
        tar.addfile(info, io.BytesIO(body))
    if end:
        tar.close()
    return buffer.getvalue()


def read(body: bytes, start=0, stop=None):
    store = MemoryStore()
    store.put("s.tar", body)
    info = store.head("s.tar")
    return list(read_tar(store, info, start, info.size if stop is None else stop))


def codes(records):
    return [str(record.reject.code) if record.reject else "ok" for record in records]


GOOD = [
    ("a/1.jpg", b"one"),
    ("a/1.cls", b"7"),
    ("a/2.png", b"two"),
    ("a/2.json", b"{}"),
    ("b/3.cls", b"cat"),
    ("b/3.JPEG", b"three"),
]


def test_records_with_labels():
    found = read(archive(GOOD))
    assert [(record.key, record.index, record.label, record.data) for record in found] == [
        ("s.tar/a/1", 0, 7, b"one"),
        ("s.tar/a/2", 1, None, b"two"),
        ("s.tar/b/3", 2, "cat", b"three"),
    ]


@pytest.mark.parametrize("kind", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_long_names_of_both_dialects(kind):
    name = "folder/" + "n" * 200 + ".jpg"
    found = read(archive([("x.jpg", b"1"), (name, b"2")], kind=kind))
    assert found[1].key == f"s.tar/{name[:-4]}"
    assert found[1].data == b"2"


def odd(name, **fields):
    info = tarfile.TarInfo(name)
    for field, value in fields.items():
        setattr(info, field, value)
    return info


@pytest.mark.parametrize(
    "member",
    [
        odd("../up.jpg"),
        odd("/abs.jpg"),
        odd("a/../../b.jpg"),
        odd("link.jpg", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
        odd("hard.jpg", type=tarfile.LNKTYPE, linkname="a/1.jpg"),
        odd("dev.jpg", type=tarfile.CHRTYPE),
        odd("bell\x07.jpg"),
        odd("n" * 600 + ".jpg"),
    ],
    ids=["up", "absolute", "inside", "symlink", "hardlink", "device", "control", "long"],
)
def test_odd_members_are_records_with_a_reason(member):
    found = read(archive([("a/1.jpg", b"one"), (member, b"x"), ("a/2.jpg", b"two")]))
    assert codes(found) == ["ok", "member_refused", "ok"]
    assert len(found[1].key) < 600
    assert [record.index for record in found] == [0, 1, 2]


def test_duplicates_adjacent_or_not():
    found = read(archive([("1.jpg", b"a"), ("1.jpg", b"b"), ("2.jpg", b"c"), ("1.png", b"d")]))
    assert codes(found) == ["ok", "duplicate_key", "ok", "duplicate_key"]
    assert found[0].data == b"a"


def test_records_without_an_image_and_hidden_files():
    found = read(
        archive([("._1.jpg", b"mac"), ("1.jpg", b"a"), ("2.txt", b"text"), (odd("d", type=tarfile.DIRTYPE), b"")])
    )
    assert codes(found) == ["ok", "missing_image"]
    assert "txt" in found[1].reject.message


def test_a_tar_that_ends_in_a_body():
    body = archive([("1.jpg", b"x" * 600), ("2.jpg", b"y" * 6000)])
    found = read(body[: 512 + 1024 + 512 + 700])
    assert codes(found) == ["ok", "shard_truncated"]
    assert found[1].key == "s.tar/2"


def test_a_tar_that_ends_in_a_header_or_without_its_end():
    whole = archive([("1.jpg", b"x" * 600), ("2.jpg", b"y" * 600)])
    assert codes(read(whole[: 512 + 1024 + 200])) == ["ok", "shard_truncated"]
    assert codes(read(archive([("1.jpg", b"x"), ("2.jpg", b"y")], end=False)[:2048])) == ["ok", "ok", "shard_truncated"]


def test_a_broken_header_inside_is_said():
    body = bytearray(archive([("1.jpg", b"x"), ("2.jpg", b"y"), ("3.jpg", b"z")]))
    body[1024:1100] = b"\xff" * 76
    found = read(bytes(body))
    assert codes(found) == ["ok", "corrupt"]
    assert "byte 1024" in found[1].reject.message


@pytest.mark.parametrize("body", [b"", b"this is no tar at all" * 100])
def test_no_tar_at_all(body):
    assert codes(read(body)) == ["corrupt"]


def test_an_empty_tar_has_no_records():
    assert read(archive([])) == []


def test_a_monstrous_header_is_not_read():
    info = tarfile.TarInfo("./PaxHeaders/x")
    info.type, info.size = tarfile.XHDTYPE, 8 << 30
    found = read(archive([("1.jpg", b"x")], end=False)[:1024] + info.tobuf() + bytes(2048))
    assert codes(found)[0] == "ok"
    assert codes(found)[1] in ("shard_truncated", "corrupt")


members = st.lists(
    st.tuples(st.sampled_from(["1", "2", "3", "d/4"]), st.sampled_from(["jpg", "cls", "txt"]), st.binary(max_size=700)),
    max_size=12,
)


@settings(max_examples=80, deadline=None)
@given(members, st.lists(st.floats(0, 1), max_size=4), st.booleans())
def test_any_partition_of_the_bytes_gives_the_same_records(contents, cuts, cut_short):
    body = archive([(f"{key}.{suffix}", data) for key, suffix, data in contents])
    body = body[: len(body) * 2 // 3] if cut_short else body
    edges = sorted({0, len(body), *(round(cut * len(body)) for cut in cuts)})
    parts = [record for start, stop in pairwise(edges) for record in read(body, start, stop)]
    shown = [(record.key, record.index, record.label, record.data, str(record.reject)) for record in parts]
    whole = [(record.key, record.index, record.label, record.data, str(record.reject)) for record in read(body)]
    assert shown == whole


def test_a_limit_is_a_byte_offset():
    body = archive(GOOD)
    store = MemoryStore()
    store.put("s.tar", body)
    info = store.head("s.tar")
    for wanted in (1, 2, 3):
        stop, count = tar_offset_after(store, info, wanted)
        assert count == wanted
        assert len(read(body, 0, stop)) == wanted
    assert tar_offset_after(store, info, 99) == (len(body), 3)


def test_the_sample_guesses_the_count():
    body = archive([(f"{number}.jpg", bytes(60_000)) for number in range(200)])
    store = MemoryStore()
    store.put("s.tar", body)
    assert sample_tar(store, store.head("s.tar")) == pytest.approx(200, rel=0.05)


def test_labels_of_strangers_are_only_text():
    found = read(archive([("1.jpg", b"x"), ("1.cls", b"\xff\xfe"), ("2.jpg", b"x"), ("2.cls", b"9" * 2000)]))
    assert found[0].label == "\ufffd\ufffd"
    assert found[1].label is None


def test_codes_are_of_the_closed_list():
    assert set(codes(read(b"x" * 600))) <= {str(code) for code in RejectCode}
