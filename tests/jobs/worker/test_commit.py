"""The commit of a unit: once, whole, and decided by the attempt id, whatever the store replies."""

import hashlib
import io
import json
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from blocksight.jobs.ledger.receipt_batches import read_receipts
from blocksight.jobs.plan.records import Unit, UnitResult
from blocksight.jobs.worker.isolation import ProcessDiedError
from blocksight.jobs.worker.unit import commit_unit, decoded
from blocksight.storage.inputs.records import RawRecord
from blocksight.storage.inputs.survey import Layout
from blocksight.storage.outputs.fragments import read_fragment
from blocksight.storage.outputs.map_codec import CODEC, decode_levels, quantised
from blocksight.storage.stores.store import ObjectInfo, StoreError
from tests.jobs.jobs_of import config_of
from tests.storage.memory import MemoryStore

UNIT = Unit(3, "a" * 20, Layout.PARQUET, (ObjectInfo("t.parquet", 9, "v1"),), 0, 2, 2)
OK_ROW = {"key": "t/0", "shard": "s", "shard_index": 0, "unit_id": UNIT.unit_id, "status": "ok", "num_forwards": 7}
BAD_ROW = {
    **OK_ROW,
    "key": "t/1",
    "shard_index": 1,
    "status": "rejected",
    "reject_code": "corrupt",
    "num_forwards": None,
}


def columns_of(saliency):
    """A map's columns, as the explain step gives them to the commit step."""
    return {"map": quantised(saliency), "map_low": float(saliency.min()), "map_high": float(saliency.max())}


def result(level: float = 1.0) -> UnitResult:
    saliency = np.array([[0.0, level], [0.5, 0.25]], np.float32)
    metrics = {"drop": 10.0, "increase": False, "protocol": "p"}
    return UnitResult(UNIT, ({**OK_ROW, **columns_of(saliency), "metrics": metrics}, BAD_ROW), 2, explain_seconds=1.5)


def test_a_record_of_two_targets_that_cannot_be_stored_is_one_rejected_row(monkeypatch):
    def dies(row):
        raise ProcessDiedError("Aborted")

    monkeypatch.setattr("blocksight.jobs.worker.unit._encoded_row", dies)
    monkeypatch.setattr("blocksight.jobs.worker.unit.isolated_if", lambda work, _careful: nullcontext(work))
    rows = [{**OK_ROW, **columns_of(np.zeros((2, 2))), "target_rank": rank} for rank in (1, 2)]
    store = MemoryStore()
    commit_unit(replace(result(), rows=(*rows, BAD_ROW)), store, "job", careful=True)
    assert [row["status"] for row in read_fragment(store.read(UNIT.fragment_key)).to_pylist()] == ["rejected"] * 2


def test_the_receipt_says_what_was_committed():
    store = MemoryStore()
    receipt = commit_unit(result(), store, "job", attempt="one")
    assert (receipt.num_records, receipt.num_ok, receipt.num_rejected) == (2, 1, 1)
    assert receipt.rejects == {"corrupt": 1}
    assert receipt.num_forwards == 7
    assert receipt.metrics["drop@p"] == {"sum": 10.0, "count": 1}
    assert (receipt.attempt, receipt.explain_seconds) == ("one", 1.5)
    metadata = dict(store.head(UNIT.fragment_key).metadata)
    assert json.loads(metadata.pop("receipt"))["num_forwards"] == 7
    assert metadata == {"attempt": "one", "sha256": receipt.sha256, "records": "2", "ok": "1", "rejected": "1"}
    assert [info.key for info in store.list()] == [UNIT.fragment_key]
    assert read_receipts(store, [UNIT]) == ({UNIT.unit_id: receipt}, [UNIT.unit_id])


def test_the_second_of_two_attempts_adopts_the_first():
    store = MemoryStore()
    first = commit_unit(result(), store, "job", attempt="one")
    before = store.read(UNIT.fragment_key)
    second = commit_unit(result(level=0.7), store, "job", attempt="two")
    assert store.read(UNIT.fragment_key) == before
    assert second.sha256 == first.sha256
    assert second == first


class LostReply(MemoryStore):
    """A store that writes an object and then raises; `how` is the error that the client reports."""

    def __init__(self, how):
        super().__init__()
        self.how = how

    def create(self, key, data, *, metadata=None):
        super().create(key, data, metadata=metadata)
        if key == UNIT.fragment_key:
            raise self.how("the connection broke before the reply")


@pytest.mark.parametrize("retried", [False, True], ids=["timeout", "retried by the client, and refused"])
def test_a_lost_reply_is_decided_by_the_attempt_id(retried):
    from blocksight.storage.stores.store import AlreadyExistsError

    store = LostReply(AlreadyExistsError if retried else StoreError)
    receipt = commit_unit(result(), store, "job", attempt="one")
    assert receipt.attempt == "one"
    assert store.head(UNIT.fragment_key).metadata["attempt"] == "one"


class Broken(MemoryStore):
    """Takes everything but the fragment."""

    def create(self, key, data, *, metadata=None):
        if key == UNIT.fragment_key:
            raise StoreError("503")
        super().create(key, data, metadata=metadata)


def test_a_store_that_writes_nothing_is_a_failure_and_leaves_nothing():
    store = Broken()
    with pytest.raises(StoreError, match="503"):
        commit_unit(result(), store, "job")
    assert list(store.list()) == []


def test_a_receipt_that_does_not_fit_the_metadata_is_made_from_the_fragment(monkeypatch):
    monkeypatch.setattr("blocksight.jobs.ledger.receipts.MAX_METADATA_BYTES", 200)
    store = MemoryStore()
    receipt = commit_unit(result(), store, "job", attempt="one")
    metadata = store.head(UNIT.fragment_key).metadata
    assert metadata.keys() == {"attempt", "sha256", "records", "ok", "rejected"}
    rebuilt = read_receipts(store, [UNIT])[0][UNIT.unit_id]
    assert rebuilt == replace(receipt, attempt=None, explain_seconds=None, worker=None)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"num_rows": -1}', '{"unit_id": "another", "num_rows": 2}'])
def test_a_damaged_receipt_in_the_metadata_is_made_from_the_fragment(text):
    store = MemoryStore()
    receipt = commit_unit(result(), store, "job", attempt="one")
    body, metadata = store.read(UNIT.fragment_key), dict(store.head(UNIT.fragment_key).metadata)
    store.delete(UNIT.fragment_key)
    store.create(UNIT.fragment_key, body, metadata={**metadata, "receipt": text})
    assert read_receipts(store, [UNIT])[0][UNIT.unit_id].metrics == receipt.metrics


def test_a_unit_whose_rows_went_astray_is_not_committed():
    store = MemoryStore()
    with pytest.raises(ValueError, match="3 records came in and 2 would go out"):
        commit_unit(replace(result(), num_records=3), store, "job")
    assert list(store.list()) == []


def test_a_stored_map_has_its_own_ends_and_sides():
    store = MemoryStore()
    map_hw = np.array([[0.25, 0.5, 0.75]], np.float32)
    commit_unit(replace(result(), rows=({**OK_ROW, **columns_of(map_hw), "metrics": None}, BAD_ROW)), store, "job")
    row, rejected = read_fragment(store.read(UNIT.fragment_key)).to_pylist()
    assert (row["map_low"], row["map_high"]) == (0.25, 0.75)
    assert (row["map_height"], row["map_width"], row["map_codec"]) == (1, 3, CODEC)
    assert decode_levels(row["map"], (1, 3)).tolist() == [[0, 128, 255]]
    assert rejected["map"] is rejected["map_low"] is None


def test_a_record_says_which_bytes_it_was_decoded_from():
    sink = io.BytesIO()
    Image.new("RGB", (5, 3), "white").save(sink, "BMP")
    body = sink.getvalue()
    facts, pixels = decoded(RawRecord("k", "s", 0, None, body), config_of("in", "out"), (8, 8))
    assert (facts.sha256, facts.num_bytes) == (hashlib.sha256(body).hexdigest(), len(body))
    assert (facts.format, facts.width, facts.height) == ("BMP", 5, 3)
    assert pixels.shape == (8, 8, 3)


@pytest.mark.parametrize(("layout", "etag"), [(Layout.PARQUET, b"v1"), (Layout.TAR, b"v1"), (Layout.IMAGES, b"")])
def test_a_fragment_names_its_job_and_the_version_of_its_shard(layout, etag):
    store = MemoryStore()
    unit = replace(UNIT, layout=layout)
    commit_unit(replace(result(), unit=unit), store, "job")
    metadata = pq.read_schema(io.BytesIO(store.read(unit.fragment_key))).metadata
    wanted = {b"blocksight.job": b"job", b"blocksight.unit": unit.unit_id.encode(), b"blocksight.input_etag": etag}
    assert {name: value for name, value in metadata.items() if name in wanted} == wanted
