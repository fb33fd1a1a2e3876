"""The verifier and the watcher find each fault: a sound output is damaged in one way at a time."""

import hashlib
import io
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from blocksight.storage.stores.local import LocalStore
from blocksight.storage.stores.store import StoreError
from tests.faults.verifier import Watcher, assert_sound, contents, row_hashes, verify
from tests.jobs.jobs_of import change_receipt, receipts_in, run_here
from tests.jobs.tiny import folder_of_images, folder_of_tables, folder_of_tars
from tests.storage.memory import MemoryStore

MANIFEST = "_job/final/manifest.json"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished job over ten images, two targets each, in units of up to three records."""
    root = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("blocksight.jobs.plan.units.unit_records", lambda *_: 3)
        run_here(folder_of_images(root / "in"), root / "out", target="top-2")
    return root


@pytest.fixture
def output(finished, tmp_path):
    """A copy to damage."""
    return LocalStore(shutil.copytree(finished / "out", tmp_path / "out"))


def names_of(root: Path) -> list[str]:
    return [path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()]


def test_a_sound_output_has_no_faults(finished, output):
    assert verify(output, source_keys=names_of(finished / "in")) == []
    assert_sound(output)
    assert len(contents(output)) < 10, "no unit holds two records"
    assert len(row_hashes(output)) == 7 * 2 + 3


@pytest.mark.parametrize("make", [folder_of_tars, folder_of_tables])
def test_containers_are_sound(make, tmp_path):
    run_here(make(tmp_path / "in"), tmp_path / "out")
    store = LocalStore(tmp_path / "out")
    assert verify(store) == []
    names = {row["key"] for row in rows_of(store, *contents(store))}
    assert verify(store, source_keys=sorted(names)) == []
    assert any("foreign" in fault for fault in verify(store, source_keys=[*names, "foreign"]))
    key = next(key for key in sorted(contents(store)) if rows_of(store, key))  # a part of a tar may hold no record
    forge(store, key, [{**row, "shard_index": 77} for row in rows_of(store, key)])
    assert any("77" in fault for fault in verify(store))


def test_row_hashes_know_the_rows_and_not_the_units(output):
    before, key = row_hashes(output), a_fragment(output)
    forge(output, key, [{**row, "unit_id": "elsewhere"} for row in rows_of(output, key)])
    assert row_hashes(output) == before
    forge(output, key, [{**row, "score": 0.5} for row in rows_of(output, key)])
    assert row_hashes(output) != before


def rows_of(store, *keys):
    return [row for key in keys for row in pq.read_table(io.BytesIO(store.read(key))).to_pylist()]


def a_fragment(store, status="ok", records=2):
    """The key of a fragment with at least `records` records, the first of them with this status."""
    for key in sorted(contents(store)):
        rows = rows_of(store, key)
        if rows[0]["status"] == status and len({row["shard"] for row in rows}) >= records:
            return key
    raise AssertionError("no such fragment")


def unit_of(key):
    return key.removesuffix(".parquet").rpartition("-")[2]


def receipt_of(store, key):
    """The receipt of a fragment, as plain values."""
    return next(receipt for receipt in receipts_in(store) if receipt["unit_id"] == unit_of(key))


def edit(store, key, change):
    """Changes a JSON object."""
    body = json.loads(store.read(key))
    change(body)
    store.put(key, json.dumps(body).encode())


def rewrite(store, key, body, **changes):
    """Replaces a fragment's bytes; keeps its metadata, but for `changes`."""
    metadata = {**store.head(key).metadata, **changes}
    store.delete(key)
    store.create(key, body, metadata=metadata)


def forge(store, key, rows):
    """Writes other rows, and makes metadata, receipt and manifest agree: only the rows are wrong."""
    schema = pq.read_schema(io.BytesIO(store.read(key)))
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), sink)
    body, records = sink.getvalue(), {(row["shard"], row["shard_index"]): row["status"] for row in rows}
    facts = {"sha256": hashlib.sha256(body).hexdigest(), "num_bytes": len(body), "num_rows": len(rows)}
    counts = {"num_records": len(records)}
    counts |= {f"num_{status}": [*records.values()].count(status) for status in ("ok", "rejected")}
    metadata = {name.removeprefix("num_"): str(count) for name, count in counts.items()}
    rewrite(store, key, body, sha256=facts["sha256"], **metadata)
    before = receipt_of(store, key)
    change_receipt(store, unit_of(key), lambda receipt: receipt | facts | counts)
    edit(store, MANIFEST, lambda manifest: agree(manifest, key, before, facts | counts))


def agree(manifest, key, before, after):
    for name in ("num_bytes", "num_rows", "num_records", "num_ok", "num_rejected"):
        manifest[name] += after[name] - before[name]
    entry = next(entry for entry in manifest["fragments"] if entry["key"] == key)
    entry.update({name: after[name] for name in ("sha256", "num_bytes", "num_rows")})


def spoil_rows(change, **which) -> Callable:
    """A function that forges the rows of one fragment and returns its key."""

    def spoil(store):
        key = a_fragment(store, **which)
        forge(store, key, change(rows_of(store, key)))
        return key

    return spoil


def first_with(**values) -> Callable:
    return lambda rows: [{**rows[0], **values}, *rows[1:]]


def without_first_record(rows):
    return [row for row in rows if row["shard"] != rows[0]["shard"]]


def lose_a_fragment(store):
    key = a_fragment(store)
    store.delete(key)
    return key


def lose_a_whole_unit(store):
    """Removes a unit from manifest and receipts too: only the plan lists it."""
    key = lose_a_fragment(store)
    lost = receipt_of(store, key)
    edit(store, MANIFEST, lambda manifest: forget(manifest, key, lost))
    change_receipt(store, unit_of(key), lambda _: None)
    return key


def forget(manifest, key, lost):
    agree(manifest, key, lost, {**dict.fromkeys(lost, 0), "sha256": ""})
    manifest["fragments"] = [entry for entry in manifest["fragments"] if entry["key"] != key]


def add_an_unplanned_object(store):
    store.create("data/notes.txt", b"mine")
    return "data/notes.txt"


def commit_twice(store):
    key = a_fragment(store)
    twin = f"data/{unit_of(key)[:2]}/000042-{unit_of(key)}.parquet"
    store.create(twin, store.read(key), metadata=store.head(key).metadata)
    return unit_of(key)


def move_a_record(store):
    """Adds the first record of one fragment to another too."""
    first, second = sorted(contents(store))[:2]
    row = next(row for row in rows_of(store, first))
    forge(store, second, [*rows_of(store, second), {**row, "unit_id": unit_of(second)}])
    return row["shard"]


def change_bytes(store):
    key = a_fragment(store)
    body = store.read(key)
    rows = pq.read_table(io.BytesIO(body))
    sink = io.BytesIO()
    pq.write_table(rows, sink, compression="none")
    rewrite(store, key, sink.getvalue())
    return key


def cut_a_fragment(store):
    key = a_fragment(store)
    rewrite(store, key, store.read(key)[:-100])
    return key


def lose_the_metadata(store):
    key = a_fragment(store)
    store.put(key, store.read(key))
    return key


def falsify(of_key, **values) -> Callable:
    """A function that changes one JSON object about a fragment and returns its key."""

    def spoil(store):
        key = a_fragment(store)
        edit(store, of_key(key), lambda body: body.update(values))
        return of_key(key)

    return spoil


def falsify_receipt(**values) -> Callable:
    """A function that changes one receipt in its batch and returns its unit."""

    def spoil(store):
        unit = unit_of(a_fragment(store))
        change_receipt(store, unit, lambda receipt: receipt | values)
        return unit

    return spoil


def add_an_unplanned_receipt(store):
    store.create("_job/receipts/r-7.jsonl", b'{"unit_id": "0123456789"}\n')
    return "_job/receipts/r-7.jsonl"


def leave_a_receipt_alone(store):
    """Leaves a receipt without its fragment, in a job that is not final."""
    key = lose_a_fragment(store)
    store.delete(MANIFEST)
    return unit_of(key)


def wrong_manifest_entry(store):
    def change(manifest):
        manifest["fragments"][0]["sha256"] = "0" * 64

    edit(store, MANIFEST, change)
    return json.loads(store.read(MANIFEST))["fragments"][0]["key"]


def drop_a_manifest_entry(store):
    key = json.loads(store.read(MANIFEST))["fragments"][0]["key"]
    edit(store, MANIFEST, lambda manifest: manifest["fragments"].pop(0))
    return key


def give_up_a_committed_unit(store):
    unit_id = unit_of(a_fragment(store))
    store.create(f"_job/dead/{unit_id}.json", json.dumps({"unit_id": unit_id}).encode())
    return unit_id


def give_up_an_unplanned_unit(store):
    store.create("_job/dead/0123456789.json", b"{}")
    return "0123456789"


def lose_the_plan(store):
    store.delete("_job/plan/plan.json")
    return "plan"


CASES = {
    "a fragment is gone": (lose_a_fragment, "does not exist"),
    "a unit is gone": (lose_a_whole_unit, "is open"),
    "a foreign object": (add_an_unplanned_object, "was not planned"),
    "a unit under another ordinal": (commit_twice, "is committed 2 times"),
    "a record in two units": (move_a_record, "is in the units"),
    "a row twice": (spoil_rows(lambda rows: [*rows, rows[0]]), "3 rows for 2 targets"),
    "a target is missing": (spoil_rows(lambda rows: rows[1:]), "1 rows for 2 targets"),
    "a record is missing": (spoil_rows(without_first_record), "lacks records"),
    "a rejected record twice": (
        spoil_rows(lambda rows: [rows[0], *rows], status="rejected", records=1),
        "rejected in 2 rows",
    ),
    "a reject without a code": (
        spoil_rows(first_with(reject_code=None), status="rejected", records=1),
        "rejected with code None",
    ),
    "a reject with a map": (spoil_rows(first_with(map=b"x"), status="rejected", records=1), "and a map"),
    "a map that is none": (spoil_rows(first_with(map=b"\x89PNG but not really")), "its map is no PNG"),
    "no map": (spoil_rows(first_with(map=None)), "ok without a map"),
    "a map of another size": (spoil_rows(first_with(map_width=31)), "its columns say"),
    "no score": (spoil_rows(first_with(score=None)), "ok without a score"),
    "a code beside ok": (spoil_rows(first_with(reject_code="corrupt")), "ok with reject code"),
    "an unknown status": (spoil_rows(lambda rows: [{**row, "status": "odd"} for row in rows]), "statuses"),
    "a row of another unit": (spoil_rows(first_with(unit_id="other")), "a row of unit other"),
    "a key of another record": (spoil_rows(lambda rows: [{**row, "key": rows[0]["key"]} for row in rows]), "lacks"),
    "other bytes": (change_bytes, "its metadata say sha256"),
    "half a fragment": (cut_a_fragment, "cannot be read"),
    "no metadata": (lose_the_metadata, "its metadata say records None"),
    "a receipt that counts otherwise": (falsify_receipt(num_ok=77), "says num_ok 77"),
    "a receipt of other bytes": (falsify_receipt(sha256="0"), "says sha256 0"),
    "a receipt of nothing": (add_an_unplanned_receipt, "belongs to no planned unit"),
    "a receipt without its fragment": (leave_a_receipt_alone, "exists without its fragment"),
    "a manifest of other bytes": (wrong_manifest_entry, "says sha256 000"),
    "a manifest that forgets": (drop_a_manifest_entry, "lacks fragments"),
    "a manifest that miscounts": (falsify(lambda _: MANIFEST, num_records=77), "says num_records 77"),
    "a manifest of another job": (falsify(lambda _: MANIFEST, fingerprint="0"), "says fingerprint 0"),
    "a manifest that kills": (falsify(lambda _: MANIFEST, dead=[{"unit_id": "0"}]), "has too many dead units: 0"),
    "dead and committed": (give_up_a_committed_unit, "is dead and committed"),
    "dead and never planned": (give_up_an_unplanned_unit, "belongs to no planned unit"),
    "no plan": (lose_the_plan, "cannot be read"),
}


@pytest.mark.parametrize(("spoil", "words"), CASES.values(), ids=CASES)
def test_one_fault_is_found_and_named(output, spoil, words):
    named = spoil(output)
    faults = verify(output)
    assert any(words in fault and named in fault for fault in faults), faults


def test_a_dead_unit_is_no_fault(finished, output):
    key = lose_a_whole_unit(output)
    letter = {"unit_id": unit_of(key), "cause": "poison"}
    output.create(f"_job/dead/{unit_of(key)}.json", json.dumps(letter).encode())
    assert any("lacks dead units" in fault for fault in verify(output))
    edit(output, MANIFEST, lambda manifest: manifest.update(dead=[letter]))
    assert verify(output, source_keys=names_of(finished / "in")) == []


def test_an_unfinished_job_may_have_open_units(finished, output):
    change_receipt(output, unit_of(lose_a_fragment(output)), lambda _: None)
    output.delete(MANIFEST)
    assert verify(output, source_keys=names_of(finished / "in")) == []


def test_keys_are_the_sources(finished, output):
    names = names_of(finished / "in")
    assert any("lacks keys: more.png" in fault for fault in verify(output, source_keys=[*names, "more.png"]))
    assert any(f"too many keys: {names[0]}" in fault for fault in verify(output, source_keys=names[1:]))


def fragment() -> bytes:
    """The smallest fragment that can be read."""
    columns = ["key", "shard", "shard_index", "unit_id", "status", "reject_code", "target_index", "score", "map"]
    sink = io.BytesIO()
    pq.write_table(pa.table({name: ["x"] * 50 for name in columns}), sink)
    return sink.getvalue()


def wait_for(holds):
    deadline = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < deadline, "it was never seen"
        time.sleep(0.005)


def watched(store, after, **objects):
    """A watcher that has seen some objects before `after` is called."""
    with Watcher(store, interval=0.005) as watcher:
        for key, body in {"data/a": fragment(), "_job/receipts/r.json": b"{}", **objects}.items():
            store.create(key, body)
        wait_for(lambda: watcher.seen == 2 + len(objects))
        after()
    return watcher


def test_a_watcher_of_quiet_growth_has_no_faults():
    store = MemoryStore()
    watcher = watched(store, after=lambda: store.put("_job/runs/status.json", b"again and again"))
    assert (watcher.faults, watcher.seen, watcher.missed) == ([], 2, 0)


@pytest.mark.parametrize("key", ["data/a", "_job/receipts/r.json"])
def test_a_changed_object_is_found(key):
    store = MemoryStore()
    watcher = watched(store, after=lambda: store.put(key, store.read(key) + b" "))
    assert any(f"{key} has changed" in fault for fault in watcher.faults)


def test_a_change_that_was_taken_back_is_found():
    store = MemoryStore()
    body = fragment()
    with Watcher(store, interval=0.005) as watcher:
        store.create("data/a", body)
        wait_for(lambda: watcher.seen == 1)
        store.put("data/a", body + b" ")
        wait_for(lambda: watcher.faults)
        store.put("data/a", body)
    assert "data/a was replaced" in watcher.faults[0]


def test_a_vanished_object_is_found():
    store = MemoryStore()
    assert "data/a has vanished" in watched(store, after=lambda: store.delete("data/a")).faults


def test_a_half_written_object_is_found_though_it_grows_whole():
    store, body = MemoryStore(), fragment()
    watcher = watched(store, after=lambda: store.put("data/b", body), **{"data/b": body[: len(body) // 2]})
    assert any("data/b was seen in part" in fault for fault in watcher.faults)


def test_the_last_look_is_taken_too():
    store = MemoryStore()
    with Watcher(store, interval=60) as watcher:
        store.create("data/a", b"PAR1 and no more")
    assert any("data/a was seen in part" in fault for fault in watcher.faults)


@pytest.mark.parametrize(("key", "is_fault"), [("data/b", True), ("_job/plan/units-0.parquet", False)])
def test_the_same_bytes_again_are_a_replacement_on_a_folder(tmp_path, key, is_fault):
    store = LocalStore(tmp_path)
    watcher = watched(store, after=lambda: store.put(key, fragment()), **{key: fragment()})
    assert bool(watcher.faults) == is_fault
    assert all(f"{key} was replaced" in fault for fault in watcher.faults)


class UnreliableStore(MemoryStore):
    """Answers only while `is_up`."""

    is_up = True

    def list(self, prefix=""):
        if not self.is_up:
            raise StoreError("down on purpose")
        return super().list(prefix)


def test_a_store_that_is_away_is_no_fault():
    store = UnreliableStore()
    with Watcher(store, interval=0.005) as watcher:
        store.is_up = False
        wait_for(lambda: watcher.missed > 2)
        store.create("data/a", fragment())
        store.is_up = True
        wait_for(lambda: watcher.seen)
    assert watcher.faults == []
