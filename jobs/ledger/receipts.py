"""Receipts: what each committed unit holds. They are computed from the fragment's bytes, and stand in its metadata."""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

import pyarrow as pa

from blocksight.jobs.ledger.accuracy import label_counts
from blocksight.jobs.plan.documents import parsed
from blocksight.jobs.plan.records import MetricMean, MetricSum, Receipt, Unit, UnreconciledError
from blocksight.storage.limits import MAX_METADATA_BYTES, MAX_RECEIPT_BYTES
from blocksight.storage.outputs.fragments import read_fragment
from blocksight.storage.outputs.schema import OK, REJECTED
from blocksight.storage.stores.store import DamagedError, ObjectInfo, ObjectStore

OF_RECORD = ["shard", "shard_index", "status", "reject_code", "num_forwards", "format"]
"""Columns that all rows of a record share."""
OF_LABELS = ["shard", "shard_index", "status", "label", "label_name", "label_rank", "target_index", "target_rank"]
COLUMNS = [*dict.fromkeys((*OF_RECORD, *OF_LABELS)), "metrics", "is_flat"]
COUNTS = {"records": "num_records", "ok": "num_ok", "rejected": "num_rejected"}
"""The receipt's fields in the fragment's metadata, by their names there."""
OF_OBJECT = ("unit_id", "ordinal", "fragment", "num_bytes", "sha256", "attempt", *COUNTS.values())
"""Fields that the fragment's key and its other metadata say."""


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
    """What the fragment's object metadata always hold, besides the attempt id."""
    return {
        "sha256": receipt.sha256,
        "records": str(receipt.num_records),
        "ok": str(receipt.num_ok),
        "rejected": str(receipt.num_rejected),
    }


def object_metadata(receipt: Receipt) -> dict[str, str]:
    """The fragment's object metadata. The receipt is left out if it does not fit, as with very many classes."""
    own = {name: value for name, value in asdict(receipt).items() if name not in OF_OBJECT and value is not None}
    facts = {"attempt": receipt.attempt or "", **commit_facts(receipt)}
    whole = {**facts, "receipt": json.dumps(own, separators=(",", ":"), sort_keys=True)}
    num_bytes = sum(len(name) + len(value) for name, value in whole.items())  # JSON writes ASCII alone
    return whole if num_bytes <= MAX_METADATA_BYTES else facts


def receipt_in(unit: Unit, info: ObjectInfo) -> Receipt | None:
    """The receipt that the fragment's object metadata hold; None if they hold none, or a damaged one."""
    try:
        values = {
            **json.loads(info.metadata["receipt"]),
            **{name: int(info.metadata[key]) for key, name in COUNTS.items()},
            "unit_id": unit.unit_id,
            "ordinal": unit.ordinal,
            "fragment": unit.fragment_key,
            "num_bytes": info.size,
            "sha256": info.metadata["sha256"],
            "attempt": info.metadata["attempt"],
        }
        return parsed(json.dumps(values).encode(), Receipt, MAX_RECEIPT_BYTES)
    except (KeyError, TypeError, ValueError, RecursionError):
        return None


def committed_receipt(store: ObjectStore, unit: Unit) -> Receipt | None:
    """The receipt of a unit by its fragment: by the metadata, or else by the bytes; None if it is not committed.

    Raises StoreError, and UnreconciledError if the fragment is damaged.
    """
    info = store.head(unit.fragment_key)
    if info is None:
        return None
    return receipt_in(unit, info) or receipt_of(unit, store.read(unit.fragment_key))


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
