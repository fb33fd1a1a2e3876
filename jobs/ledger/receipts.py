"""Receipts: what each committed unit holds, computed from the fragment's bytes, so that each can be rebuilt."""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from typing import Any

import pyarrow as pa

from blocksight.jobs.ledger.accuracy import label_counts
from blocksight.jobs.plan.documents import damaged, read_document
from blocksight.jobs.plan.records import MetricMean, MetricSum, Receipt, Unit, UnreconciledError
from blocksight.storage.limits import MAX_RECEIPT_BYTES
from blocksight.storage.outputs.fragments import read_fragment
from blocksight.storage.outputs.schema import OK, REJECTED
from blocksight.storage.stores.store import AlreadyExistsError, DamagedError, ObjectStore, OutputError

OF_RECORD = ["shard", "shard_index", "status", "reject_code", "num_forwards", "format"]
"""Columns that all rows of a record share."""
OF_LABELS = ["shard", "shard_index", "status", "label", "label_name", "label_rank", "target_index", "target_rank"]
COLUMNS = [*dict.fromkeys((*OF_RECORD, *OF_LABELS)), "metrics", "is_flat"]
READERS = 16
"""Small objects read at the same time."""


def receipt_of(unit: Unit, body: bytes) -> Receipt:
    """The receipt of a fragment with these bytes. Raises UnreconciledError if they are no fragment."""
    try:
        rows = read_fragment(body, COLUMNS)
    except DamagedError as error:
        raise UnreconciledError(f"{unit.fragment_key} cannot be read: {error}") from error
    records = _one_row_per_record(rows)
    statuses = Counter(row["status"] for row in records)
    return Receipt(
        unit_id=unit.unit_id,
        ordinal=unit.ordinal,
        fragment=unit.fragment_key,
        num_bytes=len(body),
        sha256=hashlib.sha256(body).hexdigest(),
        num_rows=rows.num_rows,
        num_records=len(records),
        num_ok=statuses[OK],
        num_rejected=statuses[REJECTED],
        rejects=_counts(row["reject_code"] for row in records if row["reject_code"]),
        num_forwards=sum(row["num_forwards"] or 0 for row in records),
        metrics=_metric_sums(rows["metrics"].to_pylist()),
        odd_formats=_counts(row["format"] for row in records if "," in (row["format"] or "")),
        num_flat=sum(map(bool, rows["is_flat"].to_pylist())),
        labels=label_counts(rows.select(OF_LABELS).to_pylist()),
    )


def _counts(names: Iterable[str]) -> dict[str, int]:
    return dict(sorted(Counter(names).items()))


def commit_facts(receipt: Receipt) -> dict[str, str]:
    """The fragment's object metadata, without the attempt id."""
    return {
        "sha256": receipt.sha256,
        "records": str(receipt.num_records),
        "ok": str(receipt.num_ok),
        "rejected": str(receipt.num_rejected),
    }


def _one_row_per_record(rows: pa.Table) -> list[dict[str, Any]]:
    return list({(row["shard"], row["shard_index"]): row for row in rows.select(OF_RECORD).to_pylist()}.values())


def _metric_sums(metrics: Iterable[Mapping[str, Any] | None]) -> dict[str, MetricSum]:
    """Sum and count of each metric and protocol, over maps that have a value: `drop@PROTOCOL` to {"sum", "count"}."""
    values: dict[str, list[float]] = {}
    for row in metrics:
        if row is None:  # rejected
            continue
        if row["drop"] is not None:  # the map is flat, or the score negative
            values.setdefault(f"drop@{row['protocol']}", []).append(row["drop"])
        if row["increase"] is not None:
            values.setdefault(f"increase@{row['protocol']}", []).append(100.0 * row["increase"])
    return {name: MetricSum(sum=math.fsum(own), count=len(own)) for name, own in sorted(values.items())}


def metric_means(receipts: Iterable[Receipt]) -> dict[str, MetricMean]:
    """Mean and count over receipts, the same in any order: `name@protocol` to {"mean", "count"}."""
    sums: dict[str, list[float]] = {}
    counts: Counter[str] = Counter()
    for receipt in receipts:
        for name, own in receipt.metrics.items():
            sums.setdefault(name, []).append(own["sum"])
            counts[name] += own["count"]
    return {
        name: MetricMean(mean=math.fsum(own) / counts[name], count=counts[name]) for name, own in sorted(sums.items())
    }


def receipt_key(unit_id: str) -> str:
    """The key of a unit's receipt below the output's root."""
    return f"_job/receipts/{unit_id}.json"


def write_receipt(store: ObjectStore, receipt: Receipt) -> None:
    """Writes the receipt once; an existing one has the same content.

    A receipt that cannot be written is left out: it can be rebuilt from the fragment.
    """
    body = json.dumps(asdict(receipt), indent=1, sort_keys=True).encode()
    with suppress(AlreadyExistsError, OutputError):
        store.create(receipt_key(receipt.unit_id), body)


def adopt(store: ObjectStore, unit: Unit) -> Receipt | None:
    """The receipt of a unit that is already committed, written if missing; None if it is not committed."""
    if store.head(unit.fragment_key) is None:
        return None
    receipt = receipt_of(unit, store.read(unit.fragment_key))
    write_receipt(store, receipt)
    return receipt


def read_receipts(store: ObjectStore, units: Iterable[Unit]) -> dict[str, Receipt]:
    """The receipts of committed units, by unit id; one that is missing is rebuilt from its fragment and written.

    A unit is committed if its fragment is under `data/`: the listing decides, never a receipt.
    """
    fragments = {info.key for info in store.list("data/")}
    written = {info.key for info in store.list("_job/receipts/")}
    committed = [unit for unit in units if unit.fragment_key in fragments]
    with ThreadPoolExecutor(READERS) as readers:
        receipts = readers.map(lambda unit: _receipt(store, unit, receipt_key(unit.unit_id) in written), committed)
        return {receipt.unit_id: receipt for receipt in receipts}


def written_receipt(store: ObjectStore, unit: Unit) -> Receipt:
    """The stored receipt. Raises MissingError, and UnreconciledError if it is damaged or of another unit."""
    key = receipt_key(unit.unit_id)
    receipt = read_document(store, key, Receipt, MAX_RECEIPT_BYTES)
    found = (receipt.unit_id, receipt.ordinal, receipt.fragment)
    wanted = (unit.unit_id, unit.ordinal, unit.fragment_key)
    if found != wanted:
        raise damaged(store.uri, key, f"it is of {found}, wanted {wanted}")
    return receipt


def _receipt(store: ObjectStore, unit: Unit, is_written: bool) -> Receipt:
    if is_written:
        try:
            return written_receipt(store, unit)
        except UnreconciledError:  # it is rebuilt from the fragment
            store.delete(receipt_key(unit.unit_id))
        except OutputError:
            return receipt_of(unit, store.read(unit.fragment_key))
    receipt = receipt_of(unit, store.read(unit.fragment_key))
    write_receipt(store, receipt)
    return receipt
