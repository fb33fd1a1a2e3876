"""Receipts in batches: when they are written, what is in them, and who does without them."""

import json
from contextlib import suppress
from dataclasses import replace

import pytest

from blocksight.jobs.ledger import receipt_batches
from blocksight.jobs.ledger.receipt_batches import BATCH_SECONDS, BATCH_UNITS, ReceiptBatches, read_receipts
from blocksight.jobs.worker.unit import commit_unit
from blocksight.storage.stores.store import StoreError
from tests.jobs.worker.test_commit import UNIT, result
from tests.storage.memory import MemoryStore


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def receipt():
    return commit_unit(result(), MemoryStore(), "job", attempt="one")


def batches_in(store):
    return {info.key: len(store.read(info.key).splitlines()) for info in store.list("_job/receipts/")}


def test_a_batch_is_written_when_it_is_full_or_old_and_at_the_end(receipt):
    store, clock = MemoryStore(), Clock()
    with ReceiptBatches(store, "run", clock) as batches:
        for number in range(BATCH_UNITS + 1):
            batches.add(replace(receipt, ordinal=number))
        assert batches_in(store) == {"_job/receipts/run-0.jsonl": BATCH_UNITS}
        clock.now = BATCH_SECONDS - 1
        batches.add(receipt)
        assert len(batches_in(store)) == 1
        clock.now = BATCH_SECONDS
        batches.add(receipt)
        assert batches_in(store)["_job/receipts/run-1.jsonl"] == 3
        batches.add(receipt)
    assert batches_in(store)["_job/receipts/run-2.jsonl"] == 1
    batches.flush()
    assert len(batches_in(store)) == 3


def test_a_run_that_fails_leaves_its_receipts(receipt):
    store = MemoryStore()
    with suppress(RuntimeError), ReceiptBatches(store, "run") as batches:
        batches.add(receipt)
        raise RuntimeError
    assert batches_in(store) == {"_job/receipts/run-0.jsonl": 1}


def test_a_batch_is_bounded_by_its_bytes(receipt, monkeypatch):
    store, line = MemoryStore(), len(json.dumps(receipt.__dict__, separators=(",", ":"))) + 9
    monkeypatch.setattr(receipt_batches, "MAX_RECEIPT_BATCH_BYTES", 2 * line)
    with ReceiptBatches(store, "run", Clock()) as batches:
        for _ in range(5):
            batches.add(receipt)
        monkeypatch.setattr(receipt_batches, "MAX_RECEIPT_BYTES", 9)
        batches.add(receipt)  # too large for any reader
    assert list(batches_in(store).values()) == [2, 2, 1]


@pytest.mark.parametrize("names", [("a", "b"), ("b", "a")])
def test_where_batches_differ_over_a_unit_its_fragment_decides(names):
    store = MemoryStore()
    present = commit_unit(result(), store, "job", attempt="two")
    deleted = replace(present, sha256="0" * 64, num_rejected=9)
    for run, receipt in zip(names, (deleted, present), strict=True):
        with ReceiptBatches(store, run) as batches:
            batches.add(receipt)
    receipts, unbatched = read_receipts(store, [UNIT])
    found = receipts[UNIT.unit_id]
    assert (found.sha256, found.num_rejected) == (present.sha256, present.num_rejected)
    assert unbatched == []


def test_a_batch_that_cannot_be_written_ends_no_job(receipt):
    class Refusing(MemoryStore):
        def create(self, key, data, *, metadata=None):
            raise StoreError("denied")

    with ReceiptBatches(Refusing(), "run") as batches:
        batches.add(receipt)


def test_a_batch_spares_each_request_to_its_fragments():
    asked = []

    class Noting(MemoryStore):
        def head(self, key):
            asked.append(key)
            return super().head(key)

        def read(self, key, **options):
            asked.append(key)
            return super().read(key, **options)

    store = Noting()
    receipt = commit_unit(result(), store, "job", attempt="one")
    assert read_receipts(store, [UNIT]) == ({UNIT.unit_id: receipt}, [UNIT.unit_id])
    assert asked == [UNIT.fragment_key]  # one HEAD
    with ReceiptBatches(store, "run") as batches:
        batches.add(receipt)
    asked.clear()
    assert read_receipts(store, [UNIT]) == ({UNIT.unit_id: receipt}, [])
    assert asked == ["_job/receipts/run-0.jsonl"]
