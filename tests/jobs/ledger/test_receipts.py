"""A receipt's counts by hand: records, rows, forwards and sums of metrics; a retry leaves receipts alone."""

from types import SimpleNamespace

import numpy as np
import pytest

from blocksight.jobs.ledger.dead_letters import write_letter
from blocksight.jobs.ledger.receipts import metric_means, receipt_of
from blocksight.jobs.ledger.retry import reopen
from blocksight.jobs.plan.records import Cause, DeadLetter, UnitResult
from blocksight.jobs.worker.unit import commit_unit
from tests.jobs.worker.test_commit import BAD_ROW, OK_ROW, UNIT
from tests.storage.memory import MemoryStore


def committed(*rows):
    """The receipt of a fragment with these rows, rebuilt from the fragment's bytes."""
    store = MemoryStore()
    num_records = len({row["shard_index"] for row in rows})
    commit_unit(UnitResult(UNIT, rows, num_records, explain_seconds=1.0), store, "job")
    return receipt_of(UNIT, store.read(UNIT.fragment_key))


def row(record, target, drop, increase, protocol="p"):
    """An explained row of 7 forwards for its record."""
    metrics = {"drop": drop, "increase": increase, "protocol": protocol}
    own = {"key": f"t/{record}", "shard_index": record, "target_index": target}
    return {**OK_ROW, **own, "map": np.eye(2, dtype=np.uint8), "metrics": metrics}


def test_a_record_with_two_targets_counts_once_and_each_of_its_rows_is_measured():
    receipt = committed(row(0, 1, 10.0, True), row(0, 2, 20.0, False), {**BAD_ROW})
    assert (receipt.num_records, receipt.num_ok, receipt.num_rejected, receipt.num_rows) == (2, 1, 1, 3)
    assert receipt.num_forwards == 7
    assert receipt.metrics == {"drop@p": {"sum": 30.0, "count": 2}, "increase@p": {"sum": 100.0, "count": 2}}


def test_images_of_an_odd_range_are_counted_once_per_record():
    kinds = ("PNG", "PNG, nearly black", "PNG, 12 of 16 bits")
    rows = [{**row(index, target, 1.0, True), "format": kind} for index, kind in enumerate(kinds) for target in (0, 1)]
    assert committed(*rows).odd_formats == {"PNG, 12 of 16 bits": 1, "PNG, nearly black": 1}


def test_values_of_two_protocols_are_summed_apart():
    receipt = committed(row(0, 1, 10.0, True), row(1, 1, 20.0, True, protocol="q"))
    assert {name: own["sum"] for name, own in receipt.metrics.items()} == {
        "drop@p": 10.0,
        "increase@p": 100.0,
        "drop@q": 20.0,
        "increase@q": 100.0,
    }


def test_a_mean_is_over_rows_and_not_over_receipts():
    one = committed(row(0, 1, 0.0, True), row(1, 1, 30.0, False), row(2, 1, 30.0, False))
    other = committed(row(0, 1, 60.0, True))
    assert metric_means([one, other]) == {
        "drop@p": {"mean": 30.0, "count": 4},
        "increase@p": {"mean": 50.0, "count": 4},
    }


LETTER = DeadLetter(UNIT.unit_id, UNIT.ordinal, "t.parquet", str(Cause.POISON), "read", "why", 2)
PLAN = SimpleNamespace(units=(UNIT,), fingerprint="job")


@pytest.mark.parametrize("cause", [None, "poison"])
def test_a_retry_removes_dead_letters_and_nothing_else(cause):
    store = MemoryStore()
    keys = ["data/other.parquet", UNIT.fragment_key, "_job/plan.json", "_job/receipts/x.json", "_job/attempts/x/read-1"]
    for key in keys:
        store.put(key, b"stays")
    write_letter(store, LETTER)
    assert reopen(store, PLAN, cause) == [LETTER]
    assert sorted(info.key for info in store.list()) == sorted(keys)
