"""Reconciliation: what the bucket holds against what was planned, by sets of identities and never by counts."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from jobs.config import TargetChoice
from jobs.dead import letter_key, read_letters
from jobs.plan import Plan
from jobs.receipts import READERS, commit_facts, metric_means, read_receipts, receipt_of
from jobs.records import DeadLetter, Receipt, Unit
from storage.fragments import read_fragment
from storage.schema import OK
from storage.store import AlreadyExistsError, MissingError, ObjectStore
from storage.survey import Layout

MANIFEST_KEY = "_job/final/manifest.json"
ROW_COLUMNS = ["key", "shard", "shard_index", "unit_id", "status", "target_index"]


@dataclass(frozen=True)
class Standing:
    """How far a job is, from the bucket alone."""

    plan: Plan
    receipts: Mapping[str, Receipt]
    """Of the committed units, by unit id."""
    dead: Mapping[str, DeadLetter]
    """Of the units that are given up, by unit id."""
    outweighed: Sequence[str] = ()
    """Units with a letter and a fragment, which a slower attempt committed after all: the fragment counts."""
    strangers: Sequence[str] = ()
    """What stands under `data/` and was not planned."""

    @property
    def open_units(self) -> list[Unit]:
        """Planned, neither committed nor dead, in order."""
        settled = self.receipts.keys() | self.dead.keys()
        return [unit for unit in self.plan.units if unit.unit_id not in settled]

    def total(self, field: str) -> int:
        """Sum of one of the receipts' counts."""
        return sum(getattr(receipt, field) for receipt in self.receipts.values())

    @property
    def rejects(self) -> Counter[str]:
        """Rejected records by code."""
        return sum((Counter(receipt.rejects) for receipt in self.receipts.values()), Counter())


class UnreconciledError(Exception):
    """What the bucket holds is not what was planned; the message is a line per fault."""


def stand(store: ObjectStore, plan: Plan) -> Standing:
    """Reads the receipts of what is committed, and the dead letters."""
    receipts = read_receipts(store, plan.units)
    letters = read_letters(store, plan.units)
    planned = {unit.fragment_key for unit in plan.units}
    return Standing(
        plan,
        receipts,
        {unit_id: letter for unit_id, letter in letters.items() if unit_id not in receipts},
        sorted(letters.keys() & receipts.keys()),
        sorted(info.key for info in store.list("data/") if info.key not in planned),
    )


def final_manifest(store: ObjectStore) -> dict[str, Any] | None:
    """The manifest of a finished job; None: it is not finished."""
    try:
        return json.loads(store.read(MANIFEST_KEY))
    except MissingError:
        return None


def finalize(store: ObjectStore, standing: Standing) -> dict[str, Any]:
    """Writes the manifest once, when every planned unit is committed or dead; returns the one that stands.

    Compares sets of units, and each fragment's metadata with its receipt: equal counts prove nothing. The
    letters of units that were committed after all are taken back.
    Raises UnreconciledError.
    """
    manifest = final_manifest(store)
    if manifest is not None:
        return manifest
    for unit_id in standing.outweighed:
        store.delete(letter_key(unit_id))
    faults = [f"{key} was not planned" for key in standing.strangers]
    faults += [f"unit {unit.ordinal} is neither committed nor dead" for unit in standing.open_units]
    with ThreadPoolExecutor(READERS) as readers:
        for found in readers.map(lambda receipt: _metadata_faults(store, receipt), standing.receipts.values()):
            faults += found
    if faults:
        raise UnreconciledError("\n".join(faults))
    with suppress(AlreadyExistsError):
        store.create(MANIFEST_KEY, json.dumps(_manifest(standing), indent=1, sort_keys=True).encode())
    return json.loads(store.read(MANIFEST_KEY))


def _manifest(standing: Standing) -> dict[str, Any]:
    ordered = sorted(standing.receipts.values(), key=lambda receipt: receipt.ordinal)
    return {
        "fingerprint": standing.plan.fingerprint,
        "num_units": len(standing.plan.units),
        "dead": [
            {"unit_id": letter.unit_id, "ordinal": letter.ordinal, "cause": letter.cause, "inputs": letter.inputs}
            for letter in sorted(standing.dead.values(), key=lambda letter: letter.ordinal)
        ],
        "num_records": standing.total("num_records"),
        "num_ok": standing.total("num_ok"),
        "num_rejected": standing.total("num_rejected"),
        "num_rows": standing.total("num_rows"),
        "num_forwards": standing.total("num_forwards"),
        "num_bytes": standing.total("num_bytes"),
        "rejects": dict(sorted(standing.rejects.items())),
        "metrics": metric_means(ordered),
        "fragments": [
            {
                "key": receipt.fragment,
                "sha256": receipt.sha256,
                "num_bytes": receipt.num_bytes,
                "num_rows": receipt.num_rows,
            }
            for receipt in ordered
        ],
    }


@dataclass
class _Shard:
    """What was seen of the shard that is being checked, across its units."""

    name: str = ""
    next_index: int | None = 0
    """Index that the next record must have; None where the unit before it is not committed."""
    keys: set[str] = field(default_factory=set)
    """Of explained records."""


def check(store: ObjectStore, plan: Plan) -> Iterator[tuple[Unit | None, list[str]]]:
    """Re-reads every fragment and yields each committed unit with its faults; last None with the faults overall.

    Proves from the bucket alone: nothing stands under `data/` that was not planned, and nothing is gone that
    the final manifest names; each fragment's bytes are those that its metadata names; every record of the
    unit's range stands once, in order, explained for every target or rejected with a reason; no key of a
    shard is explained twice.
    """
    planned = {unit.fragment_key for unit in plan.units}
    standing = {info.key for info in store.list("data/")}
    shard = _Shard()
    for unit in plan.units:
        if unit.objects[0].key != shard.name:
            shard = _Shard(unit.objects[0].key)
        if unit.fragment_key in standing:
            yield unit, list(_unit_faults(store, plan, unit, shard))
        else:
            shard.next_index = None
    yield (
        None,
        [
            *(f"{key} was not planned" for key in sorted(standing - planned)),
            *(
                f"{key} is in the final manifest and does not stand"
                for key in _manifest_keys(store)
                if key not in standing
            ),
        ],
    )


def _manifest_keys(store: ObjectStore) -> list[str]:
    """The fragments of a finished job; none where it is not finished."""
    manifest = final_manifest(store) or {"fragments": []}
    return [fragment["key"] for fragment in manifest["fragments"]]


def _unit_faults(store: ObjectStore, plan: Plan, unit: Unit, shard: _Shard) -> Iterator[str]:
    body = store.read(unit.fragment_key)
    try:
        receipt = receipt_of(unit, body)
        rows = read_fragment(body, ROW_COLUMNS).to_pylist()
    except (pa.ArrowException, ValueError, OSError) as error:
        yield f"{unit.fragment_key} cannot be read: {error}"
        return
    records: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in rows:
        records.setdefault((row["shard"], row["shard_index"]), []).append(row)
    faults = [
        *_metadata_faults(store, receipt),
        *_order_faults(unit, list(records.values()), shard),
        *_target_faults(plan, list(records.values())),
        *_duplicate_faults(records.values(), shard),
    ]
    yield from (fault if fault.startswith("data/") else f"{unit.fragment_key}: {fault}" for fault in faults)


def _metadata_faults(store: ObjectStore, receipt: Receipt) -> list[str]:
    """Where a fragment's metadata and its receipt differ."""
    head = store.head(receipt.fragment)
    if head is None:
        return [f"{receipt.fragment} has a receipt and does not stand"]
    return [
        f"{receipt.fragment}: {name} is {value} in the fragment and {head.metadata.get(name)} in its metadata"
        for name, value in commit_facts(receipt).items()
        if head.metadata.get(name) != value
    ]


def _order_faults(unit: Unit, records: Sequence[Sequence[Mapping[str, Any]]], shard: _Shard) -> Iterator[str]:
    """Compares the records with the plan: loose images by name, rows by number, tar members by their sequence."""
    if any(row["unit_id"] != unit.unit_id for rows in records for row in rows):
        yield "rows of another unit"
    if unit.layout is Layout.IMAGES:
        wanted: list[Any] = [info.key for info in unit.objects]
        found: list[Any] = [rows[0]["key"] for rows in records]
    else:
        found = [rows[0]["shard_index"] for rows in records]
        first = unit.start if unit.layout is Layout.PARQUET else shard.next_index
        first = found[0] if first is None and found else first or 0
        wanted = list(range(first, unit.stop if unit.layout is Layout.PARQUET else first + len(found)))
        shard.next_index = first + len(found)
    if found != wanted:
        odd = sorted(set(map(str, found)) ^ set(map(str, wanted))) or ["the order"]
        yield f"{len(wanted)} records were planned and {len(found)} stand; they differ in {', '.join(odd[:3])}"


def _target_faults(plan: Plan, records: Sequence[Sequence[Mapping[str, Any]]]) -> Iterator[str]:
    count = TargetChoice.parse(plan.identity["target"]).count
    for rows in records:
        wanted = count if rows[0]["status"] == OK else 1
        if len({row["target_index"] for row in rows}) != wanted or len(rows) != wanted:
            yield f"record {rows[0]['key']} has {len(rows)} rows; wanted {wanted}, one per target"


def _duplicate_faults(records: Iterable[Sequence[Mapping[str, Any]]], shard: _Shard) -> Iterator[str]:
    for rows in records:
        key = rows[0]["key"]
        if rows[0]["status"] != OK:
            continue
        if key in shard.keys:
            yield f"record {key} was explained twice"
        shard.keys.add(key)
