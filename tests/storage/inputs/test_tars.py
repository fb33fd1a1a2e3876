"""Tar shards: records, hostile members, damage, and byte ranges that cover each record once."""

import bz2
import gzip
import io
import lzma
import os
import tarfile
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blocksight.storage.inputs.tar_headers import _pax_fields
from blocksight.storage.inputs.tars import TarSample, read_tar, sample_tar, tar_offset_after
from blocksight.storage.limits import MAX_LABEL_BYTES
from blocksight.storage.rejects import RejectCode
from blocksight.storage.stores.store import DamagedError
from tests.storage.memory import MemoryStore


def archive(members, *, kind=tarfile.PAX_FORMAT, end=True) -> bytes:
    """A tar of (name, bytes) members, or of TarInfo objects."""
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


def sample(body: bytes) -> TarSample:
    store = MemoryStore()
    store.put("s.tar", body)
    return sample_tar(store, store.head("s.tar"))


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
        ("s.tar/a/1", 0, "7", b"one"),
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


@pytest.mark.parametrize("kind", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_a_name_in_no_utf_8_is_a_record_with_a_reason(kind):
    """Names that differ only in these bytes stay different."""
    names = [os.fsdecode(name) for name in (b"a/1.jpg", b"caf\xe9.jpg", b"caf\xe8.jpg", b"a/2.jpg")]
    found = read(archive([(name, b"x") for name in names], kind=kind))
    assert codes(found) == ["ok", "member_refused", "member_refused", "ok"]
    assert [record.key for record in found[1:3]] == [r"s.tar/caf\udce9.jpg", r"s.tar/caf\udce8.jpg"]
    assert "no text" in found[1].reject.message


def test_a_sparse_member_bears_its_own_name():
    sparse = odd("GNUSparseFile.0/hole.jpg")
    sparse.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "hole.jpg"}
    found = read(archive([("1.jpg", b"one"), (sparse, b"x")]))
    assert [record.key for record in found] == ["s.tar/1", "s.tar/hole.jpg"]
    assert codes(found) == ["ok", "member_refused"]


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


def test_a_broken_header_inside_is_reported():
    body = bytearray(archive([("1.jpg", b"x"), ("2.jpg", b"y"), ("3.jpg", b"z")]))
    body[1024:1100] = b"\xff" * 76
    found = read(bytes(body))
    assert codes(found) == ["ok", "corrupt"]
    assert "byte 1024" in found[1].reject.message


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        (b"", r"memory:///s\.tar holds no readable tar member: the shard is empty"),
        (b"this is no tar at all" * 100, "holds no readable tar member: no valid header"),
        (archive([("1.jpg", b"x" * 9000)])[:5000], "holds no readable tar member: member '1.jpg' reaches beyond"),
        (gzip.compress(archive(GOOD)), "is gzip inside, which is not read: unpack it to a plain .tar"),
        (bz2.compress(archive(GOOD)), "is bzip2 inside"),
        (lzma.compress(archive(GOOD)), "is xz inside"),
        (b"\x28\xb5\x2f\xfd" + bytes(600), "is Zstandard inside"),
        (b"PK\x03\x04" + bytes(600), "is a zip archive inside"),
    ],
)
def test_a_shard_without_a_readable_member_is_damaged_as_a_whole(body, sentence):
    for call in (read, sample):
        with pytest.raises(DamagedError, match=sentence):
            call(body)


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


@settings(max_examples=80)
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
    assert sample_tar(store, store.head("s.tar")).num_records == pytest.approx(200, rel=0.05)


@pytest.mark.parametrize(
    ("names", "keys"),
    [
        (["22.00.png", "22.01.png", "22.02.PNG"], ["22.00", "22.01", "22.02"]),
        (["Clip/V1.2_a.jpg", "Clip/V1.3_b.jpg"], ["Clip/V1.2_a", "Clip/V1.3_b"]),
        (["x.left.jpg", "x.right.jpg"], ["x.left", "x.right"]),
        (["1.5.jpg"], ["1.5"]),
        (["photo.1.jpg", "photo.2.jpg", "photo.jpg"], ["photo.1", "photo.2", "photo"]),
        (["photo.jpg", "photo.1.jpg"], ["photo", "photo.1"]),
        (["a.jpg", "a.mask.png", "b.jpg", "b.mask.png"], ["a", "b"]),
    ],
)
def test_images_that_share_a_name_up_to_its_first_dot_only_are_records(names, keys):
    body = archive([(name, name.encode()) for name in names])
    found = read(body)
    assert [record.key for record in found] == [f"s.tar/{key}" for key in keys]
    assert codes(found) == ["ok"] * len(keys)
    assert [record.index for record in found] == list(range(len(keys)))
    images = [name.encode() for name in names if "mask" not in name]
    assert [record.data for record in found] == images
    parts = [record for start in range(0, len(body), 512) for record in read(body, start, start + 512)]
    assert [record.key for record in parts] == [record.key for record in found]


def test_records_with_dots_have_their_own_label_or_the_common_one():
    members = [("1.0.png", b"a"), ("1.0.cls", b"cat"), ("1.1.png", b"b"), ("1.cls", b"dog"), ("1.json", b"{}")]
    assert [(record.key, record.label) for record in read(archive(members))] == [
        ("s.tar/1.0", "cat"),
        ("s.tar/1.1", "dog"),
    ]


def test_a_limit_counts_records_with_dots():
    store = MemoryStore()
    store.put("s.tar", archive([("1.0.png", b"a"), ("1.1.png", b"b"), ("1.png", b"c")]))
    info = store.head("s.tar")
    stop, count = tar_offset_after(store, info, 2)
    assert count == 2
    assert [record.data for record in read_tar(store, info, 0, stop)] == [b"a", b"b"]


def test_members_in_order_of_kinds_are_named():
    found = read(archive([("a.jpg", b"1"), ("b.jpg", b"2"), ("a.cls", b"cat"), ("b.cls", b"dog")]))
    assert codes(found) == ["ok", "ok", "duplicate_key", "duplicate_key"]
    assert "the members of key 'a' are not adjacent" in found[2].reject.message
    assert "tar --sort=name" in found[2].reject.message


def test_a_sample_says_what_is_split_left_out_or_not_adjacent():
    members = [("1.0.png", b"a"), ("1.1.png", b"a"), ("2.jpg", b"b"), ("2.png", b"c"), ("3.jpg", b"d"), ("2.cls", b"e")]
    assert dict(sample(archive(members)).notes) == {
        "dots": "s.tar: images whose names agree up to the first dot only are records of their own (1.0)",
        "images": "s.tar: records hold several images; jpg is explained, png is not (2)",
        "order": "s.tar: the members of key '2' are not adjacent: cls comes apart from those earlier in the shard and "
        "is not read; write the shard in order of names (tar --sort=name)",
    }
    assert sample(archive([("1.jpg", b"a"), ("1.cls", b"7")])).notes == {}


def test_a_sample_says_which_members_folders_and_records_give_nothing():
    assert dict(sample(archive(GOOD)).notes) == {
        "unread": "s.tar: members that are not read: json (a/2)",
        "folders": "s.tar: folders in a shard are no labels (a/2): those are members .cls, or --labels",
    }
    for other in ("labels/1.cls", "1.avif"):
        (note,) = sample(archive([("1.jpg", b"a"), (other, b"b"), ("2.jpg", b"c")])).notes.values()
        assert ("a record without an image" in note) == ("/" in other)
    (note,) = sample(archive([("1.avif", b"a"), ("2.jpg", b"c")])).notes.values()
    assert "a record without an image that is read: 1 holds avif alone" in note


def test_labels_before_their_images_are_named_as_members_that_come_apart():
    body = archive([("a.cls", b"cat"), ("b.cls", b"dog"), ("a.jpg", b"1"), ("b.jpg", b"2")])
    assert "the members of key 'a' are not adjacent: jpg comes apart" in sample(body).notes["order"]
    found = read(body)
    assert codes(found) == ["missing_image"] * 2 + ["duplicate_key"] * 2
    assert "tar --sort=name" in found[2].reject.message
    twice = read(archive([("a.jpg", b"1"), ("b.jpg", b"2"), ("a.jpg", b"1")]))[2]
    assert twice.reject.message == "key 'a' occurs earlier in the shard"


def test_a_partition_folder_within_a_shard_is_a_label():
    found = read(archive([("x/label=cat/1.jpg", b"a"), ("label=cat/2.jpg", b"b"), ("label=cat/2.cls", b"dog")]))
    assert [record.label for record in found] == ["cat", "dog"]


# ---------------------------------------------------------------- crafted headers


def block(name, size=0, body=b"", kind=b"0", link=b""):
    """A member by hand; its size field holds a number, or the given bytes."""
    header = bytearray(512)
    header[: len(name)] = name
    header[100:124] = b"0000644\0" * 3
    header[124:136] = size if isinstance(size, bytes) else b"%011o\0" % size
    header[136:148] = b"%011o\0" % 0
    header[156:157], header[157 : 157 + len(link)] = kind, link
    header[257:265] = b"ustar\x0000"
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + body + bytes(-len(body) % 512)


def sparse(num_blocks):
    """An old GNU sparse member whose map continues in `num_blocks` further blocks."""
    header = bytearray(block(b"s.png", 3, kind=b"S")[:512])
    header[345:500], header[482] = bytes(155), num_blocks > 0
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    maps = b"".join(bytes(504) + bytes([number + 1 < num_blocks]) + bytes(7) for number in range(num_blocks))
    return bytes(header) + maps + b"abc" + bytes(509)


def picture(name):
    return block(name, 3, b"abc")


def extended(kind=b"x", **fields):
    """A PAX header; `__` in a field's name means a dot."""
    records = b""
    for key, value in fields.items():
        record = b" " + key.replace("__", ".").encode() + b"=" + value + b"\n"
        length = next(n for n in range(len(record), len(record) + 9) if len(str(n)) + len(record) == n)
        records += b"%d" % length + record
    return block(b"PaxHeader", len(records), records, kind)


def base_256(number):
    return (number & ((1 << 96) - 1)).to_bytes(12, "big") if number < 0 else b"\x80" + number.to_bytes(11, "big")


ENDED = bytes(1024)
CRAFTED = {
    "negative size": (block(b"neg.png", base_256(-512)), ["ok", "corrupt"]),
    "very negative size": (block(b"neg.png", base_256(-(1 << 80))), ["ok", "corrupt"]),
    "negative octal size": (block(b"neg.png", b"-0000001000\0"), ["ok", "corrupt"]),
    "huge size": (block(b"big.png", base_256(1 << 87)), ["ok", "shard_truncated"]),
    "size that is no number": (block(b"odd.png", b"zzzzzzzzzzz\0"), ["ok", "corrupt"]),
    "size that is no text": (block(b"odd.png", b"\xc3\x28000000000\0"), ["ok", "corrupt"]),
    "negative PAX size": (extended(size=b"-512") + picture(b"p.png"), ["ok", "corrupt"]),
    "endless PAX size": (extended(size=b"9" * 5000) + picture(b"p.png"), ["ok", "corrupt"]),
    "PAX size beyond the end": (extended(size=b"99999999") + picture(b"p.png"), ["ok", "shard_truncated"]),
    "PAX size that is right": (extended(size=b"3") + block(b"p.png", 0, b"abc"), ["ok", "ok", "ok"]),
    "PAX header of no records": (block(b"x", 9, b"999 path=", b"x") + picture(b"p.png"), ["ok", "corrupt"]),
    "PAX path out of the archive": (extended(path=b"../p.png") + picture(b"p.png"), ["ok", "member_refused", "ok"]),
    "PAX path with a NUL": (extended(path=b"x\0y.png") + picture(b"p.png"), ["ok", "member_refused", "ok"]),
    "PAX sparse": (extended(GNU__sparse__major=b"1") + picture(b"p.png"), ["ok", "member_refused", "ok"]),
    "PAX sparse map that is none": (
        extended(GNU__sparse__map=b"x,y") + picture(b"p.png"),
        ["ok", "member_refused", "ok"],
    ),
    "old GNU sparse": (block(b"p.png", 3, b"abc", b"S"), ["ok", "member_refused", "ok"]),
    "old GNU sparse of one map": (sparse(0), ["ok", "member_refused", "ok"]),
    "old GNU sparse of four maps": (sparse(3), ["ok", "member_refused", "ok"]),
    "link with a size": (block(b"l.png", 512, kind=b"2", link=b"/etc/passwd"), ["ok", "member_refused", "ok"]),
    "unknown kind with a body": (block(b"z.png", 3, b"abc", b"Z"), ["ok", "member_refused", "ok"]),
    "folder": (block(b"d/", kind=b"5"), ["ok", "ok"]),
    "folder of old": (block(b"d/", kind=b"\0"), ["ok", "ok"]),
    "long link name": (block(b"K", 2, b"n\0", b"K") + picture(b"p.png"), ["ok", "ok", "ok"]),
    "chain of PAX headers": (b"".join(extended(path=b"n.png") for _ in range(3000)) + picture(b"p.png"), ["ok"] * 3),
    "chain of long names": (block(b"L", 2, b"n\0", b"L") * 3000 + picture(b"p.png"), ["ok", "missing_image", "ok"]),
    "long name beyond its cap": (block(b"L", 2 << 20, bytes(2 << 20), b"L") + picture(b"p.png"), ["ok", "corrupt"]),
    "lone PAX header": (extended(path=b"n.png") + ENDED, ["ok", "corrupt"]),
    "one zero block": (bytes(512), ["ok", "ok"]),
    "an end marker": (ENDED, ["ok", "ok"]),
}


@pytest.mark.parametrize(("inside", "wanted"), CRAFTED.values(), ids=CRAFTED)
def test_a_crafted_header_ends_in_records_and_says_what_was_not_read(inside, wanted):
    body = picture(b"first.png") + inside + picture(b"last.png") + ENDED
    found = read(body)
    assert codes(found) == wanted
    assert found[0].data == b"abc"
    assert [record.index for record in found] == list(range(len(wanted)))
    if wanted[-1] == "corrupt":
        assert "bytes were not read" in found[-1].reject.message or "no member follows" in found[-1].reject.message
    halves = [*read(body, 0, len(body) // 2), *read(body, len(body) // 2, len(body))]
    assert [(record.key, record.index) for record in halves] == [(record.key, record.index) for record in found]


def test_what_a_pax_header_says_is_taken():
    body = extended(path=b"d/long.png", size=b"3") + block(b"short.png", 0, b"abc") + picture(b"next.png") + ENDED
    assert [(record.key, record.data) for record in read(body)] == [("s.tar/d/long", b"abc"), ("s.tar/next", b"abc")]
    both = extended(b"g", path=b"same.png") + picture(b"1.png") + picture(b"2.png") + ENDED
    assert codes(read(both)) == ["ok", "duplicate_key"]


def test_a_long_name_is_kept_when_a_long_link_name_follows():
    body = block(b"L", 9, b"long.png\0", b"L") + block(b"K", 2, b"n\0", b"K") + picture(b"short.png") + ENDED
    assert [record.key for record in read(body)] == ["s.tar/long"]


def test_of_a_chain_of_pax_headers_only_what_is_used_is_kept():
    chain = b"".join(extended(**{f"k{number}": b"x" * 300, "path": b"%d.png" % number}) for number in range(50))
    assert [record.key for record in read(chain + picture(b"p.png") + ENDED)] == ["s.tar/49"]
    assert _pax_fields(extended(comment=b"x", path=b"p", GNU__sparse__map=b"1,2")[512:]) == {
        "path": "p",
        "GNU.sparse": "1,2",
    }
    for body in (b"6 a=b\n9 c=d", b"0 a=b\n", b"7 a=b\n", b"6_a=b\n", b"6 a-b\n", b"x a=b\n"):
        with pytest.raises(ValueError, match="is no"):
            _pax_fields(body)


def test_a_name_is_kept_no_longer_than_it_takes_to_refuse_it():
    """A global header names every member, so a long name would be processed for each of them."""
    assert len(_pax_fields(extended(path=b"x" * 100_000)[512:])["path"]) == 513
    slashes = b"a" + b"/" * 600
    found = read(extended(path=slashes + b"b.png") + picture(b"1.png") + extended(path=slashes) + picture(b"2") + ENDED)
    assert codes(found) == ["member_refused", "missing_image"]
    assert found[1].key == "s.tar/a"


def test_the_work_is_bounded_by_the_bytes():
    """A size that leads backwards would be followed for ever."""
    for back in (512, 1024, 8192):
        body = picture(b"1.png") + block(b"neg.png", base_256(-back)) + picture(b"2.png") + ENDED
        assert len(read(body)) <= len(body) // 512


@pytest.mark.parametrize("padding", [0, 200, 512, 9 * 512, 3 << 20])
def test_zeros_behind_the_end_are_padding(padding):
    assert codes(read(picture(b"1.png") + ENDED + bytes(padding))) == ["ok"]


def test_archives_that_were_joined_are_read_to_the_last():
    joined = archive([("1.jpg", b"a")]) + archive([("2.jpg", b"b")]) + bytes(3 << 20) + picture(b"3.png") + ENDED
    assert [record.key for record in read(joined)] == ["s.tar/1", "s.tar/2", "s.tar/3"]


@pytest.mark.parametrize("garbage", [b"x", b"x" * 512, b"\x1f\x8b" + b"z" * 5000])
def test_garbage_behind_the_end_is_reported(garbage):
    found = read(picture(b"1.png") + ENDED + garbage)
    assert codes(found) == ["ok", "corrupt"]
    assert "the bytes after the end of the archive are no header" in found[1].reject.message
    assert f"at byte 2048; the last {len(garbage)} bytes were not read" in found[1].reject.message


def test_more_members_than_a_shard_may_hold_are_reported(monkeypatch):
    monkeypatch.setattr("blocksight.storage.inputs.tars.MAX_SHARD_RECORDS", 2)
    found = read(b"".join(picture(b"%d.png" % number) for number in range(4)) + ENDED)
    assert codes(found) == ["ok", "ok", "member_refused"]
    assert found[2].reject.message == "more than 2 members; the last 3072 bytes were not read"


def test_a_key_is_cut_at_the_first_dot_of_the_base_name():
    found = read(archive([("a.b/c.jpg", b"x"), ("a.b/c.cls", b"1"), ("a.c/c.seg.jpg", b"y"), ("a.c/.c.jpg", b"z")]))
    assert [record.key for record in found] == ["s.tar/a.b/c", "s.tar/a.c/c.seg"]
    assert found[0].label == "1"
    assert codes(found) == ["ok", "ok"]
    found = read(archive([("a.jpg", b"x"), ("a.b/c.jpg", b"y")]))  # a folder's dot joins nothing
    assert [record.key for record in found] == ["s.tar/a", "s.tar/a.b/c"]


def test_untrusted_labels_are_only_text():
    found = read(archive([("1.jpg", b"x"), ("1.cls", b"\xff\xfe"), ("2.jpg", b"x"), ("2.cls", b"9" * 2000)]))
    assert found[0].label == r"\xff\xfe"
    assert found[1].label == "9" * MAX_LABEL_BYTES + "…"


def test_codes_are_of_the_closed_list():
    assert codes(read(picture(b"1.png") + b"x" * 600))[1] in set(RejectCode)
