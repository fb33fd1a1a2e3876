"""A file of labels: its two forms, how a record finds its label, and what is refused."""

import io

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from blocksight.storage.inputs import label_file
from blocksight.storage.inputs.label_file import LabelFile, read_label_file
from blocksight.storage.stores.store import StoreError
from tests.storage.memory import MemoryStore


def read(name, body):
    store = MemoryStore()
    store.create(name, body)
    return read_label_file(store, name)


def parquet(**columns):
    sink = io.BytesIO()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue()


def test_both_forms_hold_the_same_labels():
    text = '\ufefflabel,other,key\ncat,x,1.png\n,x,2.png\n3,x,"a, b.png"\n'.encode()
    from_csv = read("l.CSV", text)
    from_table = read("l.parquet", parquet(key=["1.png", "2.png", "a, b.png"], label=pa.array(["cat", None, "3"])))
    assert from_csv.labels == from_table.labels == {"1.png": "cat", "a, b.png": "3"}
    assert from_csv.digest == from_table.digest != LabelFile({"1.png": "cat"}).digest
    assert read("l.parquet", from_csv.as_parquet()).labels == from_csv.labels
    assert read("n.parquet", parquet(key=[0, 8], label=[1.0, float("nan")])).labels == {"0": "1"}
    assert read("n.parquet", parquet(key=[0.0, 8.5], label=[1, 2])).labels == {"0": "1", "8.5": "2"}
    assert read("l.csv", b"key,label\n1.png,cat\n./1.png,cat\n").labels == {"1.png": "cat"}


def test_a_record_finds_its_label_by_the_end_of_its_path():
    found = LabelFile({"a/1.png": "cat", "b/1.png": "dog", "2.png": "eel", "x/3.png": "bee", "y/3.png": "ant"})
    assert found.label_of("in/a/1.png") == "cat"
    assert found.label_of("s.tar/b/1") == "dog"
    assert found.label_of("anywhere/2.png") == "eel"
    assert found.label_of("3.png") is None  # it may be either
    assert found.label_of("4.png") is None


@pytest.mark.parametrize(
    ("name", "body", "fault"),
    [
        ("l.txt", b"key,label", "wanted a .csv or .parquet"),
        ("l.csv", b"image,class\na,b", "its columns are image, class; wanted `key` and `label`"),
        ("l.csv", b"", "its columns are none"),
        ("l.csv", b"key,label\n1.png,cat\n1.png,dog", "'1.png' has two labels, 'cat' and 'dog'"),
        ("l.csv", b"key,label\n,dog", "row 1 has no key"),
        ("l.csv", b"key,label\n./1.png,cat\n1.png,dog", "'1.png' has two labels, 'cat' and 'dog'"),
        ("l.csv", b"key,label\n1.png,tench, Tinca tinca", "row 1 has more cells than there are columns"),
        ("l.csv", b"key;label\n1.png;cat", "separated by a comma"),
        ("l.csv", b"key,label\n\xff,dog", "byte 10 is no UTF-8: save it as UTF-8"),
        ("l.csv", "key,label\n1.png,dog".encode("utf-16"), "no UTF-8"),
        ("l.parquet", parquet(key=[["1.png"]], label=[1]), "its key is no text and no number"),
        ("l.parquet", b"key,label", "cannot be read as labels"),
    ],
)
def test_what_is_no_file_of_labels_is_refused_in_a_sentence(name, body, fault):
    with pytest.raises(StoreError, match=fault):
        read(name, body)


def test_a_file_over_a_limit_is_refused(monkeypatch):
    body = b"key,label\n1,a\n2,b\n"
    monkeypatch.setattr(label_file, "MAX_LABEL_ROWS", 1)
    with pytest.raises(StoreError, match="more than 1 rows"):
        read("l.csv", body)
    monkeypatch.setattr(label_file, "MAX_LABEL_FILE_BYTES", 10)
    with pytest.raises(StoreError, match="larger than the 10 bytes"):
        read("l.csv", body)
