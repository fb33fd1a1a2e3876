"""Verification from the bucket alone: every way in which an output can be wrong is seen."""

import io

import pyarrow.parquet as pq
import pytest

from jobs.plan import load_plan
from jobs.receipts import metric_means, receipt_of
from jobs.reconcile import MANIFEST_KEY, check, stand
from storage.fragments import encode_fragment, read_fragment
from storage.local import LocalStore
from tests.jobs.jobs_of import fragments_in, run_here
from tests.jobs.tiny import folder_of_images, folder_of_tables


@pytest.fixture
def output(tmp_path):
    run_here(folder_of_images(tmp_path / "in"), tmp_path / "out")
    return LocalStore(tmp_path / "out")


def faults(store):
    return [fault for _, found in check(store, load_plan(store)) for fault in found]


def rewritten(store, change):
    """Changes the rows of one fragment and writes it with metadata that fit, as a faulty program would."""
    plan = load_plan(store)
    unit = plan.units[0]
    body = store.read(unit.fragment_key)
    rows = change(read_fragment(body).to_pylist())
    provenance = pq.ParquetFile(io.BytesIO(body)).schema_arrow.metadata
    changed = encode_fragment(rows, {key.decode(): value.decode() for key, value in provenance.items()})
    from jobs.receipts import commit_facts

    store.delete(unit.fragment_key)
    store.create(unit.fragment_key, changed, metadata={"attempt": "x", **commit_facts(receipt_of(unit, changed))})


def test_a_sound_output_has_no_faults(output):
    assert faults(output) == []


def test_a_lost_fragment_is_an_open_unit(output):
    output.delete(next(iter(fragments_in(output))))
    assert [fault for fault in faults(output) if "final manifest" not in fault] == []
    output.delete(MANIFEST_KEY)
    assert faults(output) == []
    assert len(stand(output, load_plan(output)).open_units) == 1


def test_a_foreign_fragment(output):
    output.put("data/999999-deadbeef.parquet", b"x")
    assert faults(output) == ["data/999999-deadbeef.parquet was not planned"]


def test_bytes_that_changed_after_the_commit(output):
    key = next(iter(fragments_in(output)))
    body = bytearray(output.read(key))
    body[50] ^= 1
    (output.root / key).write_bytes(bytes(body))
    assert any("sha256 is" in fault or "cannot be read" in fault for fault in faults(output))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda rows: rows[1:], "records were planned and"),
        (lambda rows: [rows[0], *rows], "has 2 rows; wanted 1"),
        (lambda rows: [{**rows[0], "key": "other"}, *rows[1:]], "they differ in"),
        (lambda rows: [{**rows[0], "unit_id": "u"}, *rows[1:]], "rows of another unit"),
    ],
    ids=["lost", "twice", "renamed", "stray"],
)
def test_rows_that_went_astray(output, change, sentence):
    rewritten(output, change)
    assert any(sentence in fault for fault in faults(output))


def test_a_table_row_twice_or_lost(tmp_path):
    run_here(folder_of_tables(tmp_path / "in"), tmp_path / "out")
    store = LocalStore(tmp_path / "out")
    rewritten(store, lambda rows: [{**rows[0], "shard_index": 5}, *rows[1:]])
    assert any("differ in" in fault for fault in faults(store))


def test_metric_means_do_not_depend_on_order(output):
    receipts = list(stand(output, load_plan(output)).receipts.values())
    assert metric_means(receipts) == metric_means(receipts[::-1])
    drops = [
        row["metrics"]["drop"]
        for key in fragments_in(output)
        for row in read_fragment(output.read(key)).to_pylist()
        if row["metrics"]
    ]
    (name,) = [name for name in metric_means(receipts) if name.startswith("drop@")]
    assert metric_means(receipts)[name]["mean"] == pytest.approx(sum(drops) / len(drops))
    assert metric_means(receipts)[name]["count"] == len(drops) == 7
