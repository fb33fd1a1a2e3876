"""Reconciliation: compares the bucket with the plan, by sets of identities and never by counts."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any

import pyarrow as pa
from typing_extensions import TypedDict

from blocksight.jobs.ledger.accuracy import Accuracy, accuracy_of
from blocksight.jobs.ledger.dead_letters import read_letters
from blocksight.jobs.ledger.output import MAP_SIDES, map_size_faults, model_facts
from blocksight.jobs.ledger.receipt_batches import READERS, read_receipts, stored_receipts
from blocksight.jobs.ledger.receipts import commit_facts, metric_means, receipt_in, receipt_of
from blocksight.jobs.plan.config import TargetChoice
from blocksight.jobs.plan.documents import read_document
from blocksight.jobs.plan.plan import Plan
from blocksight.jobs.plan.records import Count, DeadLetter, MetricMean, Receipt, Unit, UnreconciledError
from blocksight.jobs.plan.text import counted
from blocksight.storage.inputs.survey import Layout
from blocksight.storage.limits import MAX_MANIFEST_BYTES_PER_UNIT, MAX_RECEIPT_BYTES
from blocksight.storage.outputs.fragments import read_fragment
from blocksight.storage.outputs.schema import OK
from blocksight.storage.stores.retrying import is_probe
from blocksight.storage.stores.store import AlreadyExistsError, DamagedError, MissingError, ObjectStore

MANIFEST_KEY = "_job/final/manifest.json"
OF_ATTEMPT = ("attempt", "explain_seconds", "forward", "worker")
"""The receipt's fields about the attempt, which the fragment does not hold."""
MAX_NAMED = 3
"""Records that one fault names."""
ROW_COLUMNS = ["key", "shard", "shard_index", "unit_id", "status", "target"]


class AcceptedLetter(TypedDict):
    """A dead unit that the job was finished without."""

    unit_id: str
    ordinal: Count
    cause: str
    inputs: str


class NamedFragment(TypedDict):
    """A committed fragment."""

    key: str
    sha256: str
    num_bytes: Count
    num_rows: Count


class Manifest(TypedDict):
    """The summary of a finished job, written last and once."""

    fingerprint: str
    num_units: Count
    dead: list[AcceptedLetter]
    num_records: Count
    num_ok: Count
    num_rejected: Count
    num_rows: Count
    num_forwards: Count
    num_bytes: Count
    rejects: dict[str, Count]
    metrics: dict[str, MetricMean]
    fragments: list[NamedFragment]


@dataclass(frozen=True)
class JobState:
    """How far a job is, from the bucket alone."""

    plan: Plan
    receipts: Mapping[str, Receipt]
    """Of the committed units, by unit id."""
    dead: Mapping[str, DeadLetter]
    """Of the units that are given up, by unit id."""
    outweighed: Sequence[str] = ()
    """Units with a dead letter and a fragment, which a slower attempt committed later: the fragment counts."""
    strangers: Sequence[str] = ()
    """Keys under `data/` that were not planned."""
    num_classes: int | None = None
    """Of the model; None before it was loaded."""
    unbatched: Sequence[str] = ()
    """Committed units whose receipt was read from their fragment: no batch of receipts holds it."""

    @property
    def open_units(self) -> list[Unit]:
        """Planned, neither committed nor dead, in order."""
        done = self.receipts.keys() | self.dead.keys()
        return [unit for unit in self.plan.units if unit.unit_id not in done]

    def total(self, field: str) -> int:
        """Sum of one of the receipts' counts."""
        return sum(getattr(receipt, field) for receipt in self.receipts.values())

    @property
    def num_maps(self) -> int:
        """Maps that are committed: a rejected record has one row, and no map."""
        return self.total("num_rows") - self.total("num_rejected")

    @property
    def num_flat(self) -> int | None:
        """Flat maps; None if receipts of an older version do not count them."""
        counts = [receipt.num_flat for receipt in self.receipts.values()]
        return None if None in counts else sum(count or 0 for count in counts)

    @property
    def accuracy(self) -> Accuracy | None:
        """How often the model is right; None where no label is known."""
        return accuracy_of(tuple(self.receipts.values()), self.num_classes)

    @property
    def flat_fact(self) -> str:
        """How many of the maps are flat, as the summaries say it."""
        if self.num_flat is None:
            return "not counted by the version that made this output"
        what = " is flat" if self.num_flat == 1 else " are flat"
        return f"{self.num_flat or 'none'} of {counted(self.num_maps, 'map')}{what}"

    @property
    def warnings(self) -> tuple[str, ...]:
        """Loud sentences about a model that knows little, and about maps that say nothing."""
        found = () if self.accuracy is None else self.accuracy.warnings
        if self.num_flat and 2 * self.num_flat >= self.num_maps:
            say = "it says" if self.num_maps == 1 else "they say"
            found = (*found, f"MAPS ARE FLAT: {self.flat_fact}; {say} nothing about the model.")
        return found

    @property
    def rejects(self) -> Counter[str]:
        """Rejected records by code."""
        return self.counts("rejects")

    def counts(self, field: str) -> Counter[str]:
        """Sum of one of the receipts' mappings to counts; receipts of an older version may lack it."""
        return sum((Counter(getattr(receipt, field) or {}) for receipt in self.receipts.values()), Counter())


def read_job_state(store: ObjectStore, plan: Plan) -> JobState:
    """Reads the receipts of what is committed, and the dead letters."""
    receipts, unbatched = read_receipts(store, plan.units)
    letters = read_letters(store, plan.units)
    planned = {unit.fragment_key for unit in plan.units}
    return JobState(
        plan,
        receipts,
        {unit_id: letter for unit_id, letter in letters.items() if unit_id not in receipts},
        sorted(letters.keys() & receipts.keys()),
        sorted(key for key in _listed_fragments(store) if key not in planned),
        _num_classes(store),
        unbatched,
    )


def _num_classes(store: ObjectStore) -> int | None:
    """Of the stored model; None before it was loaded, and where the object is damaged: `verify` names it."""
    with suppress(MissingError, UnreconciledError):
        return model_facts(store)["num_classes"]
    return None


def _listed_fragments(store: ObjectStore) -> set[str]:
    """The keys under `data/`, without probes."""
    return {info.key for info in store.list("data/") if not is_probe(info.key)}


def final_manifest(store: ObjectStore, plan: Plan) -> Manifest | None:
    """The manifest of a finished job; None if it is not finished. Raises UnreconciledError if it is damaged."""
    most = MAX_RECEIPT_BYTES + MAX_MANIFEST_BYTES_PER_UNIT * len(plan.units)
    try:
        return read_document(store, MANIFEST_KEY, Manifest, most)
    except MissingError:
        return None


def num_accepted(manifest: Manifest | None) -> int:
    """The number of dead units that a job was finished without; 0 if it is not finished."""
    return len(manifest["dead"]) if manifest is not None else 0


def finalize(store: ObjectStore, job_state: JobState) -> Manifest:
    """Writes the manifest once, when every planned unit is committed or dead; returns the stored one.

    Compares sets of units, and each fragment's metadata with its receipt: equal counts prove nothing. A fragment
    outweighs a dead letter, which stays where it is. A manifest that exists already must agree with the receipts.
    Raises UnreconciledError.
    """
    manifest = final_manifest(store, job_state.plan)
    if manifest is not None:
        faults = list(_manifest_faults(manifest, job_state.plan, job_state.receipts.values()))
        if faults:
            raise UnreconciledError("\n".join(faults))
        return manifest
    faults = [f"{key} was not planned" for key in job_state.strangers]
    faults += [f"unit {unit.ordinal} is neither committed nor dead" for unit in job_state.open_units]
    with ThreadPoolExecutor(READERS) as readers:
        for found in readers.map(lambda receipt: _metadata_faults(store, receipt), job_state.receipts.values()):
            faults += found
    if faults:
        raise UnreconciledError("\n".join(faults))
    with suppress(AlreadyExistsError):
        store.create(MANIFEST_KEY, json.dumps(_manifest(job_state), indent=1, sort_keys=True).encode())
    manifest = final_manifest(store, job_state.plan)
    if manifest is None:
        raise UnreconciledError(
            f"{store.uri}/{MANIFEST_KEY} was written and is gone: is another process deleting this output?"
        )
    return manifest


def _manifest(job_state: JobState) -> Manifest:
    ordered = sorted(job_state.receipts.values(), key=lambda receipt: receipt.ordinal)
    return {
        "fingerprint": job_state.plan.fingerprint,
        "num_units": len(job_state.plan.units),
        "dead": [
            {"unit_id": letter.unit_id, "ordinal": letter.ordinal, "cause": letter.cause, "inputs": letter.inputs}
            for letter in sorted(job_state.dead.values(), key=lambda letter: letter.ordinal)
        ],
        "num_records": job_state.total("num_records"),
        "num_ok": job_state.total("num_ok"),
        "num_rejected": job_state.total("num_rejected"),
        "num_rows": job_state.total("num_rows"),
        "num_forwards": job_state.total("num_forwards"),
        "num_bytes": job_state.total("num_bytes"),
        "rejects": dict(sorted(job_state.rejects.items())),
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
    """The shard that is being checked, across its units."""

    name: str = ""
    next_index: int | None = 0
    """Index that the next record must have; None if the unit before it is not committed."""
    keys: set[str] = field(default_factory=set)
    """Of explained records."""


def check(store: ObjectStore, plan: Plan) -> Iterator[tuple[Unit | None, list[str]]]:
    """Re-reads every fragment and yields each committed unit with its faults; last None with the faults overall.

    Proves from the bucket alone: every object under `data/` was planned; the final manifest, if any, names
    exactly the committed fragments, by their bytes, and the other units as dead; each fragment's bytes are those
    that its metadata and its receipt name; every record of the unit's range is there once, in order, explained for
    every target or rejected with a reason; no key of a shard is explained twice.
    """
    planned = {unit.fragment_key for unit in plan.units}
    fragments = _listed_fragments(store)
    found: list[Receipt] = []
    stored: dict[str, list[Receipt]] = {}
    for unit_id, receipt in stored_receipts(store, {unit.unit_id: unit for unit in plan.units}):
        stored.setdefault(unit_id, []).append(receipt)
    shard = _Shard()
    for unit in plan.units:
        if unit.objects[0].key != shard.name:
            shard = _Shard(unit.objects[0].key)
        if unit.fragment_key in fragments:
            yield unit, list(_unit_faults(store, plan, unit, shard, found, stored.get(unit.unit_id, ())))
        else:
            shard.next_index = None
    yield None, [*(f"{key} was not planned" for key in sorted(fragments - planned)), *_final_faults(store, plan, found)]


def _final_faults(store: ObjectStore, plan: Plan, found: Sequence[Receipt]) -> list[str]:
    try:
        manifest = final_manifest(store, plan)
    except UnreconciledError as error:
        return [str(error)]
    return [] if manifest is None else list(_manifest_faults(manifest, plan, found))


def _manifest_faults(manifest: Manifest, plan: Plan, receipts: Iterable[Receipt]) -> Iterator[str]:
    """The differences between the final manifest and the receipts."""
    named = {fragment["key"]: fragment for fragment in manifest["fragments"]}
    committed = {receipt.fragment: receipt for receipt in receipts}
    dead = {letter["unit_id"] for letter in manifest["dead"]}
    if manifest["fingerprint"] != plan.fingerprint:
        yield f"the final manifest is of job {manifest['fingerprint'][:16]}, and the plan of {plan.fingerprint[:16]}"
    for key in sorted(named.keys() - committed.keys()):
        yield f"{key} is in the final manifest and does not exist"
    for key in sorted(committed.keys() - named.keys()):
        yield f"{key} exists and is not in the final manifest: its unit was given up there"
    for unit in plan.units:
        if (unit.unit_id in dead) == (unit.fragment_key in named):
            state = "both committed and dead" if unit.unit_id in dead else "neither committed nor dead"
            yield f"unit {unit.ordinal} is {state} in the final manifest"
    for key in sorted(named.keys() & committed.keys()):
        yield from _differences(named[key], committed[key], key, "the final manifest")


def _differences(recorded: Mapping[str, Any], receipt: Receipt, key: str, where: str) -> Iterator[str]:
    for name, value in recorded.items():
        if name != "key" and getattr(receipt, name) != value:
            yield f"{key}: {name} is {getattr(receipt, name)} in the fragment and {value} in {where}"


def _receipt_faults(written: Receipt, receipt: Receipt, where: str) -> Iterator[str]:
    """The differences between a fragment and a stored receipt."""
    recorded = {name: value for name, value in asdict(written).items() if name not in OF_ATTEMPT and value is not None}
    yield from _differences(recorded, receipt, receipt.fragment, where)


def _unit_faults(
    store: ObjectStore, plan: Plan, unit: Unit, shard: _Shard, found: list[Receipt], stored: Iterable[Receipt]
) -> Iterator[str]:
    """The unit's faults; appends its rebuilt receipt to `found`. `stored`: its receipts in the output's batches."""
    body = store.read(unit.fragment_key)
    try:
        receipt = receipt_of(unit, body)
        table = read_fragment(body, [*ROW_COLUMNS, *MAP_SIDES])
    except (UnreconciledError, DamagedError) as error:
        message = str(error)
        yield message if isinstance(error, UnreconciledError) else f"{unit.fragment_key} cannot be read: {message}"
        return
    found.append(receipt)
    records: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in table.select(ROW_COLUMNS).to_pylist():
        records.setdefault((row["shard"], row["shard_index"]), []).append(row)
    yield from _metadata_faults(store, receipt, unit)
    for written in stored:
        yield from _receipt_faults(written, receipt, "its receipt")
    own = list(records.values())
    faults = (*_order_faults(unit, own, shard), *_target_faults(plan, own), *_duplicate_faults(own, shard))
    for fault in (*faults, *_size_faults(store, table)):
        yield f"{unit.fragment_key}: {fault}"


def _size_faults(store: ObjectStore, table: pa.Table) -> Iterator[str]:
    """The first few maps of another size than the model's input."""
    with suppress(MissingError):  # no model was loaded yet: there are no maps
        yield from islice(map_size_faults(table, model_facts(store)["input_size"]), MAX_NAMED)


def _metadata_faults(store: ObjectStore, receipt: Receipt, unit: Unit | None = None) -> list[str]:
    """The differences between a fragment's metadata and its receipt; of a `unit` also the receipt in the metadata."""
    head = store.head(receipt.fragment)
    if head is None:
        return [f"{receipt.fragment} has a receipt and does not exist"]
    within = None if unit is None else receipt_in(unit, head)
    return [
        *(
            f"{receipt.fragment}: {name} is {value} in the fragment and {head.metadata.get(name)} in its metadata"
            for name, value in commit_facts(receipt).items()
            if head.metadata.get(name) != value
        ),
        *(() if within is None else _receipt_faults(within, receipt, "the receipt in its metadata")),
    ]


def _order_faults(unit: Unit, records: Sequence[Sequence[Mapping[str, Any]]], shard: _Shard) -> Iterator[str]:
    """Compares the records with the plan: loose images by name, rows by number, tar members by their sequence."""
    if any(row["unit_id"] != unit.unit_id for rows in records for row in rows):
        yield "rows of another unit"
    if unit.layout is Layout.IMAGES:
        wanted: Sequence[Any] = [info.key for info in unit.objects]
        found: list[Any] = [rows[0]["key"] for rows in records]
    else:
        found = [rows[0]["shard_index"] for rows in records]
        first = unit.start if unit.layout is Layout.PARQUET else shard.next_index
        first = found[0] if first is None and found else first or 0
        is_known = unit.layout is Layout.PARQUET and unit.is_counted
        wanted = range(first, unit.stop if is_known else first + len(found))
        shard.next_index = first + len(found)
    if len(found) != len(wanted) or any(one != other for one, other in zip(found, wanted, strict=True)):
        odd = [str(one) for one in islice(_only_in_one(found, wanted), MAX_NAMED)] or ["the order"]
        yield f"planned: {counted(len(wanted), 'record')}, found: {len(found)}; they differ in {', '.join(odd)}"


def _only_in_one(found: Sequence[Any], wanted: Sequence[Any]) -> Iterator[Any]:
    """The items in only one of the two; lazy, because a damaged plan may want more than memory holds."""
    known = set(found)
    yield from (one for one in wanted if one not in known)
    planned = wanted if isinstance(wanted, range) else set(wanted)
    yield from (one for one in found if one not in planned)


def _target_faults(plan: Plan, records: Sequence[Sequence[Mapping[str, Any]]]) -> Iterator[str]:
    choice = TargetChoice.parse(plan.identity["target"])
    count = next((len(rows) for rows in records if rows[0]["status"] == OK and choice.allows(len(rows))), choice.count)
    for rows in records:
        wanted = count if rows[0]["status"] == OK else 1
        if len({row["target"] for row in rows}) != wanted or len(rows) != wanted:
            yield f"record {rows[0]['key']} has {counted(len(rows), 'row')}; wanted {wanted}, one per target"


def _duplicate_faults(records: Iterable[Sequence[Mapping[str, Any]]], shard: _Shard) -> Iterator[str]:
    for rows in records:
        key = rows[0]["key"]
        if rows[0]["status"] != OK:
            continue
        if key in shard.keys:
            yield f"record {key} was explained twice"
        shard.keys.add(key)
