"""Inputs: the survey of a place, loose images and Parquet tables."""

import io
import json
import os
import pickle
import socket
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from blocksight.storage.inputs.loose import read_images
from blocksight.storage.inputs.survey import Layout, survey
from blocksight.storage.inputs.tables import read_table, table_facts, table_labels
from blocksight.storage.inputs.tars import read_tar
from blocksight.storage.limits import MAX_IMAGE_BYTES
from blocksight.storage.stores.local import LocalStore
from blocksight.storage.stores.opening import open_named
from blocksight.storage.stores.store import ObjectInfo, StoreError
from tests.storage.inputs.test_tars import archive
from tests.storage.memory import MemoryStore


def filled(**objects) -> MemoryStore:
    store = MemoryStore()
    for key, body in objects.items():
        store.put(key, body)
    return store


def test_loose_images_are_found_in_order_and_others_counted():
    store = filled(**{"b/2.JPG": b"", "a/1.png": b"", "_job/x.png": b"", "a/.hidden.png": b"", "notes.txt": b""})
    found = survey(store)
    assert found.layout is Layout.IMAGES
    assert [info.key for info in found.objects] == ["a/1.png", "b/2.JPG"]
    assert found.ignored == {".txt": 1, "hidden (_ or .)": 2}


def test_no_more_of_an_image_is_read_than_was_planned():
    store = filled(**{"a.png": b"planned, and more"})
    (found,) = store.list()
    (record,) = read_images(store, [replace(found, size=len(b"planned"))])
    assert record.data == b"planned"


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        (b"caf\xe9.png", r"caf\udce9.png"),
        (b"caf\xe9/1.png", r"caf\udce9/1.png"),
        (b"_caf\xe9.txt", r"_caf\udce9.txt"),
    ],
)
def test_a_file_name_in_no_utf_8_keeps_out_that_file_alone(tmp_path, name, shown):
    for path in ("a.png", os.fsdecode(name), os.fsdecode(b"zz\xff.tar")):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_bytes(b"")
    found = survey(LocalStore(tmp_path))
    assert [info.key for info in found.objects] == ["a.png"]
    assert found.ignored == {f"named in no UTF-8 ({shown})": 2}


def test_a_single_file_named_in_no_utf_8_is_refused_in_text(tmp_path):
    name = os.fsdecode(b"caf\xe9.png")
    (tmp_path / name).write_bytes(b"")
    for key in ("", name):
        with pytest.raises(StoreError, match=r"it holds 1 named in no UTF-8 \(caf\\udce9\.png\)") as caught:
            survey(LocalStore(tmp_path), key)
        str(caught.value).encode()


def test_what_is_neither_file_nor_folder_is_counted_by_kind(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "x.png").write_bytes(b"")
    data = tmp_path / "in"
    (data / "cat").mkdir(parents=True)
    (data / "cat" / "1.png").write_bytes(b"")
    (data / "cat" / "2.png").symlink_to(data / "cat" / "1.png")
    (data / "dog").symlink_to(tmp_path / "elsewhere")
    (data / "again").symlink_to(data)
    (data / "_hidden").symlink_to(data)
    (data / "gone.png").symlink_to(tmp_path / "nothing")
    (data / "self.png").symlink_to("self.png")
    (data / ".self.png").symlink_to("self.png")
    os.mkfifo(data / "cat" / "pipe.png")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(data / "socket.png"))
    found = survey(LocalStore(data))
    assert [info.key for info in found.objects] == ["cat/1.png", "cat/2.png"]
    assert found.ignored == {
        "links to folders (not followed)": 2,
        "broken links": 1,
        "links to themselves": 1,
        "pipes": 1,
        "sockets": 1,
        "hidden (_ or .)": 2,
    }


def test_a_device_is_no_input():
    assert dict(LocalStore("/dev").unlisted())["null"] == "devices"


def test_a_folder_of_links_alone_says_so(tmp_path):
    (tmp_path / "dog").symlink_to(tmp_path)
    with pytest.raises(StoreError, match=r"it holds 1 links to folders \(not followed\)"):
        survey(LocalStore(tmp_path))


def test_names_that_are_no_paths_are_counted():
    found = survey(filled(**{"a/1.png": b"", "/2.png": b"", "a//3.png": b"", "a/../4.png": b"", "./5.png": b""}))
    assert [info.key for info in found.objects] == ["a/1.png"]
    assert found.ignored == {"names with an empty part, `.` or `..`": 4}


def test_a_name_with_a_zero_byte_is_counted():
    """A plan with this key could not be read back."""
    assert survey(filled(**{"a.png": b"", "b\0.png": b""})).ignored == {"names with a zero byte": 1}


@pytest.mark.parametrize("name", ["data.v1", "ILSVRC2012.val", "x.tar", "plain"])
def test_what_a_name_is_comes_from_the_store(tmp_path, name):
    (tmp_path / name / "cat").mkdir(parents=True)
    (tmp_path / name / "cat" / "1.png").write_bytes(b"")
    for spelling in (f"{tmp_path}/{name}", f"{tmp_path}/{name}/", f"file://{tmp_path}/{name}//"):
        store, key = open_named(spelling)
        assert [info.key for info in survey(store, key).objects] == ["cat/1.png"]
    (tmp_path / "file").mkdir()
    (tmp_path / "file" / f"{name}.png").write_bytes(b"")
    store, key = open_named(f"{tmp_path}/file/{name}.png")
    assert [info.key for info in survey(store, key).objects] == [f"{name}.png"]


def test_a_single_file_is_an_input():
    store = filled(**{"x.tar": b"", "x.tar.bak": b"", "y.tar": b""})
    assert [info.key for info in survey(store, "x.tar").objects] == ["x.tar"]


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        (["a.png", "b.tar"], "more than one layout: 1 of images .a.png., 1 of tar .b.tar.*--data 'memory:///[*].tar'"),
        ([], "nothing is there"),
        (["read.me", "x.csv"], "no images, tar shards or Parquet .* it holds read.me, x.csv"),
        (["x.tar.gz"], "compressed tar files .x.tar.gz."),
    ],
)
def test_what_cannot_be_an_input_is_one_sentence(keys, sentence):
    with pytest.raises(StoreError, match=sentence):
        survey(filled(**dict.fromkeys(keys, b"")))


def test_loose_images_are_read_as_they_were_planned():
    store = filled(**{"cat/1.png": b"one", "2.png": b"two", "dog/3.png": b"three", "4.png": b"x"})
    planned = sorted((info for info in store.list() if info.key != "4.png"), key=lambda info: info.key)
    planned.append(ObjectInfo("4.png", MAX_IMAGE_BYTES + 1, "?"))
    store.put("dog/3.png", b"other")
    store.delete("2.png")
    found = list(read_images(store, planned))
    assert [(record.key, record.label, record.data, record.reject and str(record.reject.code)) for record in found] == [
        ("2.png", None, None, "input_missing"),
        ("cat/1.png", "cat", b"one", None),
        ("dog/3.png", "dog", None, "input_changed"),
        ("4.png", None, None, "too_many_bytes"),
    ]


def table_bytes(columns, **options) -> bytes:
    sink = io.BytesIO()
    pq.write_table(columns if isinstance(columns, pa.Table) else pa.table(columns), sink, **options)
    return sink.getvalue()


def rows(body: bytes, start=0, stop=None):
    store = filled(**{"t.parquet": body})
    info = store.head("t.parquet")
    return list(read_table(store, info, start, table_facts(store, info).num_rows if stop is None else stop))


IMAGES = [b"%d" % number for number in range(50)]


def test_rows_and_ranges_across_row_groups():
    body = table_bytes({"image": IMAGES, "label": list(range(50))}, row_group_size=7)
    whole = rows(body)
    assert [(record.key, record.index, record.label, record.data) for record in whole[:2]] == [
        ("t.parquet/0", 0, 0, b"0"),
        ("t.parquet/1", 1, 1, b"1"),
    ]
    parts = [record for start in range(0, 50, 9) for record in rows(body, start, min(50, start + 9))]
    assert [record.data for record in parts] == IMAGES
    assert [record.index for record in parts] == list(range(50))


@pytest.mark.parametrize(
    ("folder", "label"),
    [
        ("label=cat/", "cat"),
        ("label=cat%2Fbig/split=train/", "cat/big"),
        ("split=train/label=3/", "3"),
        ("label=__HIVE_DEFAULT_PARTITION__/", None),
        ("label=/", None),
        ("mylabel=cat/", None),
        ("", None),
    ],
)
def test_a_partition_folder_is_the_label_where_the_data_have_none(folder, label):
    store = filled(
        **{
            f"{folder}a.parquet": table_bytes({"image": [b"x"]}),
            f"{folder}b.parquet": table_bytes({"image": [b"x"], "label": ["own"]}),
            f"{folder}c.tar": archive([("1.png", b"x"), ("2.png", b"x"), ("2.cls", b"own")]),
        }
    )
    a, b, c = sorted(store.list(), key=lambda info: info.key)
    assert [record.label for record in read_table(store, a, 0, 1)] == [label]
    assert [record.label for record in read_table(store, b, 0, 1)] == ["own"]
    assert [record.label for record in read_tar(store, c, 0, c.size)] == [label, "own"]


def test_a_partition_folder_names_the_class_of_loose_images():
    store = filled(**dict.fromkeys(["label=cat/split=a/1.png", "label=dog/2.png", "label=/3.png", "eel/4.png"], b"x"))
    assert [(record.key, record.label) for record in read_images(store, [*store.list()])] == [
        ("label=cat/split=a/1.png", "cat"),
        ("label=dog/2.png", "dog"),
        ("label=/3.png", None),
        ("eel/4.png", "eel"),
    ]


@pytest.mark.parametrize(
    ("column", "labels"),
    [
        (pa.array([1.0, 2.5, float("nan"), None]), [1, "2.5", None, None]),
        (pa.array(["red", "blue", None, "red"]).dictionary_encode(), ["red", "blue", None, "red"]),
        (pa.array([[0, 1], [2], [], None]), ["[0, 1]", 2, None, None]),
        (pa.array([["a", "ü"], ["b"], [None], None]), ['["a", "ü"]', "b", None, None]),
        (pa.array([[b"\xff", b"c"], [b"d"], None, None], pa.list_(pa.binary())), ['["\\\\xff", "c"]', "d", None, None]),
        (pa.array([{"id": 3, "name": "cat"}, None, None, None]), ['{"id": 3, "name": "cat"}', None, None, None]),
        (pa.array([b"cat", b"\xff", b"", None]), ["cat", "\\xff", None, None]),
        (pa.array(["1", "2.0", "", None]), ["1", "2.0", None, None]),
        (pa.array([True, False, None, None]), ["True", "False", None, None]),
        (pa.array([1, -1, None, 2**40]), [1, -1, None, 2**40]),
        (pa.array(["1", "2", None, "3"]).cast(pa.decimal128(5, 2)), ["1.00", "2.00", None, "3.00"]),
    ],
    ids=str,
)
def test_each_type_of_label_column_is_read(column, labels):
    body = table_bytes({"image": [b"a", b"b", b"c", b"d"], "label": column})
    assert [record.label for record in rows(body)] == labels
    store = filled(**{"t.parquet": body})
    keys = [f"t.parquet/{row}" for row in range(3)]
    assert list(table_labels(store, store.head("t.parquet"), 3)) == [*zip(keys, labels[:3], strict=True)]
    assert table_facts(store, store.head("t.parquet")).unread == ()


def test_columns_that_are_not_read_are_named():
    def note(**columns):
        store = filled(**{"t.parquet": table_bytes({"image": IMAGES, **columns})})
        return table_facts(store, store.head("t.parquet")).note

    ones = [1] * 50
    assert note(label=ones, key=[str(number) for number in range(50)]) is None
    assert note(label=ones, mask=IMAGES) == "t.parquet: columns that are not read: mask"
    assert note(Label=ones) == (
        "t.parquet: columns that are not read: Label; the label is read of a column `label`, or of --labels"
    )
    assert "c7 and 2 more" in note(label=ones, **{f"c{number}": ones for number in range(10)})


@pytest.mark.parametrize(
    ("written", "names"),
    [
        ({"info": {"features": {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}}}, ("cat", "dog")),
        ({"info": {"features": {"label": {"dtype": "int64"}}}}, ()),
        ({"info": {"features": {"label": {"names": ["cat", 3]}}}}, ()),
        ([1], ()),
        (None, ()),
    ],
)
def test_the_names_of_a_hugging_face_label_are_read(written, names):
    table = pa.table({"image": IMAGES, "label": [1] * 50})
    if written is not None:
        table = table.replace_schema_metadata({"huggingface": json.dumps(written)})
    store = filled(**{"t.parquet": table_bytes(table)})
    assert table_facts(store, store.head("t.parquet")).number_names == names


def test_structs_keys_nulls_and_duplicates():
    images = pa.array([{"bytes": b"a", "path": "x"}, None, {"bytes": None, "path": "y"}, {"bytes": b"d", "path": "z"}])
    body = table_bytes({"image": images, "key": ["k1", "k2", "k3", "k1"], "label": ["cat", None, "dog", "cat"]})
    found = rows(body)
    assert [(record.key, record.label, record.data, record.reject and str(record.reject.code)) for record in found] == [
        ("t.parquet/k1", "cat", b"a", None),
        ("t.parquet/k2", None, None, "missing_image"),
        ("t.parquet/k3", "dog", None, "missing_image"),
        ("t.parquet/k1", "cat", None, "duplicate_key"),
    ]
    assert [str(record.reject.code) for record in rows(body, 3, 4)] == ["duplicate_key"]


@pytest.mark.parametrize(
    ("columns", "sentence"),
    [
        ({"picture": IMAGES, "id": IMAGES}, "no column `image`; its columns: picture, id"),
        ({"image": list(range(50))}, "column `image` is int64; wanted binary"),
        ({"image": IMAGES, "key": [[1]] * 50}, "column `key` is list.*; wanted numbers or text"),
        ({"image": [{"path": "x"}] * 50}, "column `image` is struct.*; wanted binary, or a struct with a binary field"),
    ],
)
def test_a_table_of_another_shape_shows_both_sides(columns, sentence):
    with pytest.raises(StoreError, match=sentence):
        rows(table_bytes(columns))


def test_bytes_that_are_no_table():
    with pytest.raises(StoreError, match="no readable Parquet file"):
        rows(b"PAR1 but not really")


def test_a_column_of_pickled_objects_is_refused_and_does_not_run(tmp_path):
    """After an import of Ray Data, Arrow knows a type whose values are unpickled when they are read."""
    import ray.data  # noqa: F401  (registers the type)

    trap = tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return (open, (str(trap), "w"))

    name = {"ARROW:extension:name": "ray.data.arrow_pickled_object", "ARROW:extension:metadata": pickle.dumps(Evil())}
    schema = pa.schema([pa.field("image", pa.large_binary(), metadata=name)])
    buffer = io.BytesIO()
    pq.write_table(pa.table({"image": [pickle.dumps(Evil())]}, schema=schema), buffer)
    with pytest.raises(StoreError, match="column `image` of the extension type"):
        rows(buffer.getvalue())
    assert not trap.exists()
