"""Verification reads the bucket alone and finds every fault of an output."""

import io
import json
from dataclasses import asdict
from shutil import copytree

import pyarrow.parquet as pq
import pytest

from blocksight.jobs.ledger.receipt_batches import receipt_key
from blocksight.jobs.ledger.receipts import metric_means, receipt_of
from blocksight.jobs.ledger.reconcile import MANIFEST_KEY, check, finalize, read_job_state
from blocksight.jobs.plan.config import Execution
from blocksight.jobs.plan.plan import ensure_plan, existing_plan, load_plan
from blocksight.jobs.plan.records import UnreconciledError
from blocksight.jobs.run.job import plan_job
from blocksight.storage.outputs.fragments import encode_fragment, read_fragment
from blocksight.storage.stores.local import LocalStore
from tests.jobs.jobs_of import called, change_receipt, config_of, fragments_in, receipts_in, run_here
from tests.jobs.tiny import MODEL, folder_of_images, folder_of_tables, folder_of_tars


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    root = tmp_path_factory.mktemp("finished")
    run_here(folder_of_images(root / "in"), root / "out")
    return root / "out"


@pytest.fixture
def output(finished, tmp_path):
    """A copy of a finished output, which a test may change."""
    return LocalStore(copytree(finished, tmp_path / "out"))


def faults(store):
    return [fault for _, found in check(store, load_plan(store)) for fault in found]


def rewritten(store, change):
    """Changes the rows of one fragment and writes metadata that fit, as a faulty program would."""
    plan = load_plan(store)
    unit = plan.units[0]
    body = store.read(unit.fragment_key)
    rows = change(read_fragment(body).to_pylist())
    provenance = pq.ParquetFile(io.BytesIO(body)).schema_arrow.metadata
    changed = encode_fragment(rows, {key.decode(): value.decode() for key, value in provenance.items()})
    from blocksight.jobs.ledger.receipts import commit_facts

    store.delete(unit.fragment_key)
    store.create(unit.fragment_key, changed, metadata={"attempt": "x", **commit_facts(receipt_of(unit, changed))})


def test_a_sound_output_has_no_faults(output):
    assert faults(output) == []


def test_a_plan_is_read_back_as_it_was_made(tmp_path):
    data = folder_of_images(tmp_path / "in")
    (data / "notes.txt").write_text("no image")
    output, plan = plan_job(config_of(data, tmp_path / "out"), Execution(runner="local"))
    assert plan.ignored
    assert ensure_plan(output, plan) == load_plan(output) == plan


def test_a_lost_fragment_is_an_open_unit(output):
    lost = next(iter(fragments_in(output)))
    output.delete(lost)
    assert [fault for fault in faults(output) if "final manifest" not in fault] == []
    output.delete(MANIFEST_KEY)
    assert faults(output) == []
    assert [unit.fragment_key for unit in read_job_state(output, load_plan(output)).open_units] == [lost]


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
        (lambda rows: rows[1:], "planned: "),
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


def test_a_key_that_is_explained_twice_is_seen_across_units(tmp_path):
    run_here(folder_of_tables(tmp_path / "in"), tmp_path / "out")
    store = LocalStore(tmp_path / "out")
    assert faults(store) == []
    later = read_fragment(store.read(load_plan(store).units[1].fragment_key)).to_pylist()[0]["key"]
    rewritten(store, lambda rows: [{**rows[0], "key": later}, *rows[1:]])
    assert any(f"record {later} was explained twice" in fault for fault in faults(store))


def test_a_key_that_is_explained_twice_is_seen_behind_a_rejected_record(tmp_path, monkeypatch):
    monkeypatch.setattr("blocksight.cluster.sizing.LEAST_UNIT_SECONDS", 600.0)  # all records of a shard in one unit
    run_here(folder_of_tars(tmp_path / "in"), tmp_path / "out")
    store = LocalStore(tmp_path / "out")

    def first_rejected_and_second_twice(rows):
        assert len(rows) > 2
        keys = [rows[0]["key"], rows[1]["key"], rows[1]["key"]]
        first = {**rows[0], "status": "rejected"}
        return [{**row, "key": key} for row, key in zip([first, *rows[1:3]], keys, strict=True)] + rows[3:]

    rewritten(store, first_rejected_and_second_twice)
    assert any("was explained twice" in fault for fault in faults(store))


def test_a_map_of_one_of_two_targets_that_is_lost_is_seen(tmp_path):
    run_here(folder_of_tables(tmp_path / "in"), tmp_path / "out", target="top-2")
    store = LocalStore(tmp_path / "out")
    assert faults(store) == []
    rewritten(store, lambda rows: rows[1:])
    assert faults(store) != []


def test_a_fragment_that_is_no_parquet_is_named(output):
    key = next(iter(fragments_in(output)))
    output.delete(key)
    output.create(key, b"no Parquet at all")
    assert any(fault.startswith(f"{key} cannot be read: ") for fault in faults(output))


@pytest.mark.parametrize("name", ["sha256", "records", "ok", "rejected"])
def test_metadata_that_changed_after_the_commit_are_seen(output, name):
    key = next(iter(fragments_in(output)))
    body, metadata = output.read(key), dict(output.head(key).metadata)
    output.delete(key)
    output.create(key, body, metadata={**metadata, name: "7"})
    assert [fault for fault in faults(output) if f"{name} is" in fault and "and 7 in its metadata" in fault]


def test_metadata_that_are_lost_are_seen(output):
    for key in fragments_in(output):
        body = output.read(key)
        output.delete(key)
        output.create(key, body)
    found = faults(output)
    assert len(found) == 4 * len(fragments_in(output))
    assert all("None in its metadata" in fault for fault in found)


@pytest.mark.parametrize("name", ["num_ok", "num_rejected", "num_forwards", "sha256", "metrics", "rejects"])
def test_a_receipt_that_says_something_else_is_seen(output, name):
    unit = existing_plan(output).units[0]
    other = {"sha256": "0" * 64, "metrics": {"drop@p": {"sum": 0.0, "count": 1}}, "rejects": {"corrupt": 9}}
    change_receipt(output, unit.unit_id, lambda receipt: receipt | {name: other.get(name, 999)})
    assert [fault for fault in faults(output) if f": {name} is " in fault and "in its receipt" in fault]


def test_a_receipt_of_an_older_version_lacks_counts_and_is_sound(output):
    unit = existing_plan(output).units[0]
    [own] = [receipt for receipt in receipts_in(output) if receipt["unit_id"] == unit.unit_id]
    change_receipt(output, unit.unit_id, lambda _: None)
    older = {name: value for name, value in own.items() if name != "odd_formats"}
    output.put(receipt_key(unit.unit_id), json.dumps(older, indent=1).encode())
    assert faults(output) == []
    assert read_job_state(output, load_plan(output)).counts("odd_formats") == {}


def test_metric_means_do_not_depend_on_order(output):
    receipts = list(read_job_state(output, load_plan(output)).receipts.values())
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


# ---------------------------------------------------------------- against the manifest and the receipts


def test_a_fragment_that_the_manifest_gives_up_is_seen(output):
    manifest = json.loads(output.read(MANIFEST_KEY))
    named = manifest["fragments"].pop()
    unit = next(unit for unit in load_plan(output).units if unit.fragment_key == named["key"])
    manifest["dead"].append({"unit_id": unit.unit_id, "ordinal": unit.ordinal, "cause": "poison", "inputs": "x"})
    output.put(MANIFEST_KEY, json.dumps(manifest).encode())
    expected = f"{named['key']} exists and is not in the final manifest: its unit was given up there"
    assert faults(output) == [expected]
    with pytest.raises(UnreconciledError, match="was given up there"):
        finalize(output, read_job_state(output, load_plan(output)))


def test_a_fragment_that_was_replaced_with_metadata_that_fit_is_seen(output):
    rewritten(output, lambda rows: [{**row, "error": "changed"} for row in rows])
    found = faults(output)
    assert any("sha256 is" in fault and "in its receipt" in fault for fault in found)
    assert any("sha256 is" in fault and "in the final manifest" in fault for fault in found)


def test_a_manifest_that_lists_a_unit_twice_or_never(output):
    manifest = json.loads(output.read(MANIFEST_KEY))
    unit = load_plan(output).units[0]
    manifest["dead"].append({"unit_id": unit.unit_id, "ordinal": 0, "cause": "poison", "inputs": "x"})
    manifest["fingerprint"] = "0" * 64
    output.put(MANIFEST_KEY, json.dumps(manifest).encode())
    found = faults(output)
    assert "unit 0 is both committed and dead in the final manifest" in found
    assert any(fault.startswith("the final manifest is of job 0000") for fault in found)


# ---------------------------------------------------------------- what cannot be read


@pytest.mark.parametrize("name", ["status", "verify", "finalize", "explain"])
@pytest.mark.parametrize(
    "key", ["data/", "_job/final/manifest.json", "_job/plan/plan.json", "_job/plan/units-"], ids=lambda key: key
)
def test_a_damaged_object_is_exit_5_and_named(finished, output, name, key):
    (damaged, *_) = sorted(info.key for info in output.list(key))
    output.put(damaged, b"PAR1 {")
    for receipt in output.list("_job/receipts/"):
        output.delete(receipt.key)
    arguments = [name, str(output.root)]
    if name == "explain":
        arguments = [name, "--data", str(finished.parent / "in"), "--output", str(output.root), "--model", MODEL]
        arguments += ["--runner", "local"]
    code, printed = called(*arguments)
    assert code == 5, printed
    assert damaged.removeprefix("_job/plan/units") in printed or "_job/plan/plan.json" in printed


@pytest.mark.parametrize("damage", [b"", b"{}\n", b"[]\n", b"\xff", b"{" * 9000], ids=len)
def test_a_damaged_batch_of_receipts_is_read_from_the_fragments(output, damage):
    before = receipts_in(output)
    for info in output.list("_job/receipts/"):
        output.put(info.key, json.dumps(before[0]).encode() + b"\n" + damage if damage else b"")
    state = read_job_state(output, load_plan(output))
    assert [asdict(receipt) for receipt in state.receipts.values()] == before  # the attempt's facts too: of metadata
    assert len(state.unbatched) == len(before)
    assert faults(output) == []


def test_a_batch_that_is_too_large_is_not_parsed(output, monkeypatch):
    monkeypatch.setattr("blocksight.jobs.ledger.receipt_batches.MAX_RECEIPT_BATCH_BYTES", 99)
    assert read_job_state(output, load_plan(output)).unbatched


def test_a_receipt_in_the_metadata_that_says_something_else_is_seen(output):
    unit = existing_plan(output).units[0]
    body, metadata = output.read(unit.fragment_key), dict(output.head(unit.fragment_key).metadata)
    output.delete(unit.fragment_key)
    metadata["receipt"] = json.dumps(json.loads(metadata["receipt"]) | {"num_forwards": 999})
    output.create(unit.fragment_key, body, metadata=metadata)
    assert [fault for fault in faults(output) if "num_forwards is " in fault and "the receipt in its metadata" in fault]


def test_a_job_without_its_manifest_is_not_complete(output):
    output.delete(MANIFEST_KEY)
    for name, code in (("status", 4), ("verify", 4), ("finalize", 0), ("status", 0), ("verify", 0)):
        assert called(name, output.root)[0] == code, name
