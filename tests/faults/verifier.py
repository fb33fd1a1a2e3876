"""Checks an output from its objects alone; shares no code with what wrote them."""

import hashlib
import io
import json
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from blocksight.storage.stores.store import ChangedError, MissingError, ObjectStore, StoreError

PLAN = "_job/plan/plan.json"
MANIFEST = "_job/final/manifest.json"
COMMITTED = ("data/", "_job/receipts/", "_job/plan/", "_job/final/")
"""Prefixes of objects that never change after their commit."""
UNITS = "_job/plan/units-"
"""Named by content: two drivers that plan at the same time may write the same bytes twice."""
COLUMNS = {"key", "shard", "shard_index", "unit_id", "status", "reject_code", "target_index", "score", "map"}
SIDES = ("map_width", "map_height")
NAMES_REPEAT = {"duplicate_key", "member_refused", "shard_truncated"}
"""Reject codes of records whose key another record of the container may have too."""
UNREADABLE = (pa.ArrowException, ValueError, OSError)
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Planned:
    """A unit, as the plan's table lists it."""

    ordinal: int
    unit_id: str
    layout: str
    start: int
    stop: int
    keys: tuple[str, ...]
    """Keys of its input objects."""

    @property
    def fragment(self) -> str:
        """The key of its one fragment."""
        return f"data/{self.unit_id[:2]}/{self.ordinal:06d}-{self.unit_id}.parquet"


@dataclass
class Found:
    """A fragment that was read, and what its bytes hold."""

    sha256: str
    num_bytes: int
    rows: list[dict[str, Any]]
    records: dict[tuple[str, int], list[Row]]
    """The rows of each record, by shard and position in the shard."""
    statuses: Counter[str]
    """Number of records by status."""

    @property
    def facts(self) -> dict[str, int | str]:
        """The counts, with the names that receipts use."""
        return {
            "sha256": self.sha256,
            "num_bytes": self.num_bytes,
            "num_rows": len(self.rows),
            "num_records": len(self.records),
            "num_ok": self.statuses["ok"],
            "num_rejected": self.statuses["rejected"],
        }


@dataclass
class Output:
    """An output's plan, fragments and dead letters."""

    store: ObjectStore
    plan: dict[str, Any]
    units: list[Planned]
    fragments: set[str]
    """Keys under data/."""
    dead: set[str]
    """Unit ids of the dead letters."""
    found: dict[str, Found] = field(default_factory=dict)
    """The fragments that could be read, by unit id."""


def verify(output: ObjectStore, *, source_keys: Sequence[str] | None = None) -> list[str]:
    """Returns a sentence for every invariant that the output breaks. No sentence: the output is sound.

    `source_keys` are the names of all records of the input; for loose images the objects' keys.
    """
    try:
        judged = _load(output)
    except (MissingError, KeyError, *UNREADABLE) as error:
        return [f"the plan cannot be read: {type(error).__name__}: {error}"]
    return [
        *_fragment_faults(judged),
        *_name_faults(judged),
        *_receipt_faults(judged),
        *_manifest_faults(judged),
        *_uniqueness_faults(judged),
        *_position_faults(judged),
        *([] if source_keys is None else _source_faults(judged, set(source_keys))),
    ]


def contents(output: ObjectStore) -> dict[str, str]:
    """The sha256 of every object under data/, by key."""
    return {info.key: _sha256(output.read(info.key)) for info in output.list("data/")}


def row_hashes(output: ObjectStore) -> list[str]:
    """A hash of each row under data/, sorted. The unit id is left out: it depends on how the plan was cut."""
    rows = (row for info in output.list("data/") for row in _rows(output.read(info.key)))
    return sorted(_sha256(repr(sorted({**row, "unit_id": None}.items())).encode()) for row in rows)


def _sha256(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()


def _rows(body: bytes) -> list[dict[str, Any]]:
    """All rows of a fragment. Reads footer and pages. Raises one of UNREADABLE."""
    file = pq.ParquetFile(io.BytesIO(body))
    rows = file.read().to_pylist()
    if len(rows) != file.metadata.num_rows:
        raise ValueError(f"{len(rows)} rows, and {file.metadata.num_rows} in the footer")
    lacking = COLUMNS - set(file.schema_arrow.names)
    if lacking:
        raise ValueError(f"no columns {', '.join(sorted(lacking))}")
    return rows


def _load(store: ObjectStore) -> Output:
    plan = json.loads(store.read(PLAN))
    table = pq.read_table(io.BytesIO(store.read(plan["units"]))).to_pylist()
    units = [
        Planned(**{name: row[name] for name in ("ordinal", "unit_id", "layout", "start", "stop")}, keys=_keys(row))
        for row in table
    ]
    letters = {info.key.removeprefix("_job/dead/").removesuffix(".json") for info in store.list("_job/dead/")}
    return Output(store, plan, units, {info.key for info in store.list("data/")}, letters)


def _keys(row: Row) -> tuple[str, ...]:
    return tuple(item["key"] for item in row["objects"])


def _json(store: ObjectStore, key: str) -> dict[str, Any]:
    """The JSON object under the key; empty if it is none."""
    try:
        body = json.loads(store.read(key))
    except ValueError:
        return {}
    return body if isinstance(body, dict) else {}


def _name_faults(judged: Output) -> Iterator[str]:
    """I1: every object is planned, and each unit is there once, as a fragment or as a dead letter."""
    counts = {judged.plan.get("num_units"), len(judged.units), len({unit.unit_id for unit in judged.units})}
    if len(counts) > 1:
        yield f"the plan names {judged.plan.get('num_units')} units, its table {len(judged.units)}, or one twice"
    planned = {unit.fragment for unit in judged.units}
    yield from (f"{key} was not planned" for key in sorted(judged.fragments - planned))
    for unit in judged.units:
        twins = [key for key in judged.fragments if unit.unit_id in key]
        if len(twins) > 1:
            yield f"unit {unit.unit_id} is committed {len(twins)} times: {', '.join(sorted(twins))}"
        if twins and unit.unit_id in judged.dead:
            yield f"unit {unit.unit_id} is dead and committed: {twins[0]}"
    unplanned = judged.dead - {unit.unit_id for unit in judged.units}
    yield from (f"the dead letter of {unit_id} belongs to no planned unit" for unit_id in sorted(unplanned))
    for unit_id in sorted(judged.dead - unplanned):
        recorded = _json(judged.store, f"_job/dead/{unit_id}.json").get("unit_id")
        if recorded != unit_id:
            yield f"the dead letter of {unit_id} names unit {recorded}"


def _fragment_faults(judged: Output) -> Iterator[str]:
    """I2: each fragment agrees with its metadata and its unit. Fills `judged.found`."""
    num_targets = _num_targets(str(judged.plan.get("configuration", {}).get("target", "predicted")))
    for unit in judged.units:
        if unit.fragment not in judged.fragments:
            continue
        try:
            found = _found(judged.store.read(unit.fragment))
        except (MissingError, *UNREADABLE) as error:
            yield f"{unit.fragment} cannot be read: {error}"
            continue
        judged.found[unit.unit_id] = found
        faults = [
            *_metadata_faults(judged.store, unit, found),
            *_record_faults(unit, found, num_targets),
            *_range_faults(unit, found),
        ]
        yield from (f"{unit.fragment}: {fault}" for fault in faults)


def _found(body: bytes) -> Found:
    rows = _rows(body)
    records: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        records.setdefault((row["shard"], row["shard_index"]), []).append(row)
    statuses = Counter(own[0]["status"] for own in records.values())
    return Found(_sha256(body), len(body), rows, records, statuses)


def _num_targets(target: str) -> int:
    if target.startswith("top-"):
        return int(target.removeprefix("top-"))
    return len(set(map(int, target.split(",")))) if target[:1].isdigit() else 1


def _metadata_faults(store: ObjectStore, unit: Planned, found: Found) -> Iterator[str]:
    head = store.head(unit.fragment)
    recorded = head.metadata if head is not None else {}
    names = {"sha256": "sha256", "records": "num_records", "ok": "num_ok", "rejected": "num_rejected"}
    for name, fact in names.items():
        if recorded.get(name) != str(found.facts[fact]):
            yield f"its metadata say {name} {recorded.get(name)}, its bytes {found.facts[fact]}"


def _record_faults(unit: Planned, found: Found, num_targets: int) -> Iterator[str]:
    for (shard, index), rows in found.records.items():
        where = f"record {index} of {shard}"
        statuses = {row["status"] for row in rows}
        if statuses == {"rejected"}:
            if len(rows) != 1:
                yield f"{where} is rejected in {len(rows)} rows"
        elif statuses != {"ok"}:
            yield f"{where} has the statuses {sorted(statuses)}"
        elif len(rows) != num_targets:
            yield f"{where} has {len(rows)} rows for {num_targets} targets"
        faults = (fault for row in rows for fault in _row_faults(unit, row))
        yield from (f"{where}: {fault}" for fault in faults)


def _row_faults(unit: Planned, row: Row) -> Iterator[str]:
    if row["unit_id"] != unit.unit_id:
        yield f"a row of unit {row['unit_id']}"
    if row["status"] == "rejected":
        if not row["reject_code"] or row["map"] is not None:
            yield f"rejected with code {row['reject_code']} and {'no' if row['map'] is None else 'a'} map"
        return
    if row["reject_code"] is not None:
        yield f"ok with reject code {row['reject_code']}"
    if row["score"] is None:
        yield "ok without a score"
    fault = _map_fault(row)
    if fault:
        yield fault


def _map_fault(row: Row) -> str | None:
    if row["map"] is None:
        return "ok without a map"
    try:
        with Image.open(io.BytesIO(row["map"]), formats=["PNG"]) as image:
            image.load()
            size, mode = image.size, image.mode
    except (OSError, SyntaxError, ValueError) as error:
        return f"its map is no PNG: {error}"
    wanted = tuple(row.get(side) for side in SIDES)
    return None if (size, mode) == (wanted, "L") else f"its map is {size} in {mode}, its columns say {wanted}"


def _range_faults(unit: Planned, found: Found) -> Iterator[str]:
    """Compares planned and written records by identity; the plan does not list the records of a tar."""
    if unit.layout == "images":
        own = Counter(rows[0]["key"] for rows in found.records.values())
        yield from _difference("records", set(own), set(unit.keys))
        if len(found.records) != len(unit.keys):
            yield f"{len(unit.keys)} records were planned and {len(found.records)} written"
    elif unit.layout == "parquet":
        yield from _difference("rows", {index for _, index in found.records}, set(range(unit.start, unit.stop)))
    shards = {shard for shard, _ in found.records}
    foreign = sorted(shard for shard in shards if not any(shard.endswith(f"/{key}") for key in unit.keys))
    if foreign or (unit.layout != "images" and len(shards) > 1):
        yield f"records of other shards than its own: {', '.join(foreign or sorted(shards))}"


def _difference(what: str, found: set[Any], wanted: set[Any]) -> Iterator[str]:
    for words, keys in (("lacks", wanted - found), ("has too many", found - wanted)):
        if keys:
            yield f"{words} {what}: {', '.join(sorted(map(str, keys))[:5])}"


def _receipt_faults(judged: Output) -> Iterator[str]:
    """I2: a receipt agrees with its fragment, and never exists without it."""
    units = {unit.unit_id: unit for unit in judged.units}
    for key in sorted(info.key for info in judged.store.list("_job/receipts/")):
        for line in judged.store.read(key).splitlines():
            recorded = json.loads(line)
            unit = units.get(recorded.get("unit_id"))
            where = f"{key}, {recorded.get('unit_id')}"
            if unit is None:
                yield f"{where} belongs to no planned unit"
            elif unit.fragment not in judged.fragments:
                yield f"{where} exists without its fragment"
            elif unit.unit_id in judged.found:
                facts = {**judged.found[unit.unit_id].facts, "fragment": unit.fragment}
                yield from _disagreements(where, recorded, facts)


def _disagreements(where: str, recorded: Row, facts: Row) -> Iterator[str]:
    for name, value in facts.items():
        if recorded.get(name) != value:
            yield f"{where} says {name} {recorded.get(name)}, the bytes {value}"


def _manifest_faults(judged: Output) -> Iterator[str]:
    """I1: a final job has no open unit, and its manifest lists what is committed."""
    if judged.store.head(MANIFEST) is None:
        return
    recorded = _json(judged.store, MANIFEST)
    for unit in judged.units:
        if unit.fragment not in judged.fragments and unit.unit_id not in judged.dead:
            yield f"the job is final and unit {unit.unit_id} is open: {unit.fragment} does not exist"
    entries = {entry["key"]: entry for entry in recorded.get("fragments", [])}
    if len(entries) != len(recorded.get("fragments", [])):
        yield f"{MANIFEST} names a fragment twice"
    yield from (f"{MANIFEST}: {fault}" for fault in _difference("fragments", set(entries), judged.fragments))
    letters = {entry["unit_id"] for entry in recorded.get("dead", [])}
    yield from (f"{MANIFEST}: {fault}" for fault in _difference("dead units", letters, judged.dead))
    for unit in judged.units:
        if unit.fragment in entries and unit.unit_id in judged.found:
            facts = judged.found[unit.unit_id].facts
            named = {name: facts[name] for name in ("sha256", "num_bytes", "num_rows")}
            yield from _disagreements(f"{MANIFEST} on {unit.fragment}", entries[unit.fragment], named)
    yield from _disagreements(MANIFEST, recorded, _totals(judged))


def _totals(judged: Output) -> dict[str, Any]:
    names = ("num_records", "num_ok", "num_rejected", "num_rows", "num_bytes")
    every = [found.facts for found in judged.found.values()]
    sums = {name: sum(int(facts[name]) for facts in every) for name in names}
    return {**sums, "fingerprint": judged.plan.get("fingerprint")}


def _uniqueness_faults(judged: Output) -> Iterator[str]:
    """I3: in the whole output, a record is in one unit, and a key is there once per target."""
    units: dict[tuple[str, int], str] = {}
    names: set[tuple[str, int | None]] = set()
    for unit_id, found in judged.found.items():
        for shard, index in found.records:
            other = units.setdefault((shard, index), unit_id)
            if other != unit_id:
                yield f"record {index} of {shard} is in the units {other} and {unit_id}"
        for row in found.rows:
            name = (row["key"], row["target_index"])
            if row["reject_code"] in NAMES_REPEAT:
                continue
            if name in names:
                yield f"key {name[0]} is there twice with target {name[1]}"
            names.add(name)


def _position_faults(judged: Output) -> Iterator[str]:
    """I3 for a tar whose units are all committed: the positions run from 0 without a gap."""
    shards: dict[str, list[Planned]] = {}
    for unit in judged.units:
        if unit.layout == "tar":
            shards.setdefault(unit.keys[0], []).append(unit)
    for key, units in shards.items():
        if any(unit.unit_id not in judged.found for unit in units):
            continue
        positions = {index for unit in units for _, index in judged.found[unit.unit_id].records}
        yield from (f"{key} {fault}" for fault in _difference("positions", positions, set(range(len(positions)))))


def _source_faults(judged: Output, source: set[str]) -> Iterator[str]:
    """I3: the keys of the output are those of the input, without those of open and dead units."""
    found = {row["key"] for own in judged.found.values() for row in own.rows}
    left = [unit for unit in judged.units if unit.unit_id not in judged.found]
    wanted = source - {key for unit in left for key in unit.keys}
    if any(unit.layout != "images" for unit in left):  # the plan does not list their records
        wanted &= found
    yield from (f"the output {fault}" for fault in _difference("keys", found, wanted))


@dataclass
class _Seen:
    """An object at its first sight."""

    etag: str
    sha256: str | None = None
    """None until it could be read."""


class Watcher:
    """Reads an output while it grows, and notes each committed object that is partial, changes or vanishes."""

    def __init__(self, store: ObjectStore, interval: float = 0.05) -> None:
        """`store` is used from the watcher's thread alone; `interval` is in seconds."""
        self.faults: list[str] = []
        self.missed = 0
        """Number of reads that the store refused."""
        self._store, self._interval = store, interval
        self._objects: dict[str, _Seen] = {}
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    @property
    def seen(self) -> int:
        """Number of committed objects that were read."""
        return sum(seen.sha256 is not None for seen in list(self._objects.values()))

    def __enter__(self) -> "Watcher":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_over.set()
        self._thread.join()
        self._look()
        for key, seen in self._objects.items():
            self._compare_at_the_end(key, seen)

    def _watch(self) -> None:
        while not self._is_over.wait(self._interval):
            self._look()

    def _look(self) -> None:
        for prefix in ("data/", "_job/"):
            try:
                for info in self._store.list(prefix):
                    if info.key.startswith(COMMITTED):
                        self._meet(info.key, info.etag)
            except StoreError:
                self.missed += 1

    def _meet(self, key: str, etag: str) -> None:
        seen = self._objects.setdefault(key, _Seen(etag))
        if seen.etag != etag:
            self._note_replaced(key, f"version {etag} after {seen.etag}")
        if seen.sha256 is not None:
            return
        try:
            body = self._store.read(key, etag=etag)
        except ChangedError as error:
            self._note_replaced(key, str(error))
        except MissingError:
            self.missed += 1  # the last read decides whether it is gone
        else:
            seen.sha256 = _sha256(body)
            self._judge(key, body)

    def _judge(self, key: str, body: bytes) -> None:
        try:
            if key.startswith("data/"):
                _rows(body)
            elif key.endswith(".json"):
                json.loads(body)
        except UNREADABLE as error:
            self._note(f"{key} was seen in part: {len(body)} bytes, {error}")

    def _compare_at_the_end(self, key: str, seen: _Seen) -> None:
        try:
            body = self._store.read(key)
        except MissingError:
            self._note(f"{key} has vanished")
        except StoreError as error:
            self._note(f"{key} cannot be read in the end: {error}")
        else:
            if seen.sha256 not in (None, _sha256(body)):
                self._note(f"{key} has changed: sha256 {_sha256(body)} after {seen.sha256}")

    def _note_replaced(self, key: str, how: str) -> None:
        if not key.startswith(UNITS):
            self._note(f"{key} was replaced: {how}")

    def _note(self, fault: str) -> None:
        if fault not in self.faults:
            self.faults.append(fault)


def assert_sound(output: ObjectStore, faults: Iterable[str] = (), source_keys: Sequence[str] | None = None) -> None:
    """Fails if the output breaks an invariant, or a watcher noted `faults`; lists all of them."""
    every = [*verify(output, source_keys=source_keys), *faults]
    assert not every, "\n".join(every)
