"""Reads all maps of an output once, in bounded memory: measures, gates, groups and samples."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path, PurePosixPath
from threading import Lock
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from blocksight.cluster.cores import usable_cores
from blocksight.jobs.audit.equal_maps import EqualMaps, Words, contains, map_hashes
from blocksight.jobs.audit.groups import (
    CENSUS_COLUMNS,
    Census,
    GroupSums,
    Roster,
    counted,
    is_own_class,
    is_right,
    num_maps,
)
from blocksight.jobs.audit.measures import Measured, Region, measured
from blocksight.jobs.audit.result import GATES, MEASURES, ROWS, Group
from blocksight.jobs.audit.samples import Candidate, Sample, Sampler, target_number
from blocksight.jobs.evaluate.bootstrap import key_hashes
from blocksight.jobs.evaluate.evaluation import ClassMap, labels_of, region_of
from blocksight.jobs.plan.config import ConfigError
from blocksight.jobs.plan.plan import Plan
from blocksight.storage.inputs.ground_truth import Truth
from blocksight.storage.outputs.fragments import fragment_batches, read_rows
from blocksight.storage.outputs.map_codec import MapError, decode_levels
from blocksight.storage.outputs.schema import OK
from blocksight.storage.stores.store import DamagedError, ObjectInfo, ObjectStore
from blocksight.storage.stores.windowed_file import WindowedFile

BATCH_ROWS = 256
"""Rows of a fragment in memory at once, in each thread."""
PIXELS_AT_ONCE = 2**19
"""Pixels of decoded maps in memory, in each thread: ten maps of 224 x 224, which fit into the processor's cache."""
CENSUS_ROWS, CENSUS_WINDOW_BYTES = 2**15, 2**18
"""Batch and window of the census: a small window skips the maps between its columns."""
ROWS_AT_ONCE = 4096
"""Rows of `ROWS` that are written together."""

COLUMNS = (
    *CENSUS_COLUMNS,
    *("key", "sha256", "width", "height", "score"),
    *("map", "map_height", "map_width", "is_flat", "is_saturated"),
)
"""Columns of the fragments that are read."""


@dataclass(frozen=True)
class AuditScope:
    """The settings that change the result."""

    truth: Truth | None
    """The ground truth: where the objects are."""
    class_map: ClassMap
    """The classes that each label of the ground truth means."""
    seed: int
    """Seed of the samples."""


@dataclass(frozen=True, eq=False)
class StreamResult:
    """The result of reading all maps once."""

    num_rows: int
    """All rows, rejected records included."""
    num_maps: int
    num_rejected: int
    num_right: int | None
    """Maps whose target is both the prediction and the label; None if no label is known."""
    gates: Mapping[str, int]
    """Number of maps that each gate stops."""
    groups: tuple[Group, ...]
    """`all` first; then by kind, the largest first."""
    samples: Mapping[int, Sample]
    """By target index."""
    notes: tuple[str, ...]
    """Sentences that say what was left out."""
    fragments: str
    """Digest of the fragments that were read."""
    num_fragments: int


def stream(
    store: ObjectStore, plan: Plan, scope: AuditScope, scratch: Path, update: Callable[[int], object]
) -> StreamResult:
    """Reads the committed fragments, one thread per CPU core, and writes a file of `ROWS` for each into `scratch`.

    A file has its fragment's name and one row per map, in the fragment's order. `cluster` and `strangeness` are null,
    and so are measures that are not defined. `update` is called with the number of rows just read. Besides the groups
    and samples, which are bounded, memory holds 16 bytes per map (32 at the end).
    Raises ConfigError if there is no map, DamagedError for a damaged fragment or map, and StoreError.
    """
    fragments = committed(store, plan)
    census, maps_of = _census(store, fragments)
    if not sum(maps_of):
        raise ConfigError(f"there is no map in {store.uri} to audit: run `blocksight explain` first")
    roster = Roster.of(census)
    reading = _Reading(store, plan.identity["resize"], scope, scratch, roster)
    starts = np.cumsum([0, *maps_of])[:-1].tolist()
    with _threads() as threads:
        for num_rows in threads.map(reading.audit, fragments, starts):
            update(num_rows)
    shared = reading.equals.shared()
    num_equal = sum(reading.mark_equals(info, start, shared) for info, start in zip(fragments, starts, strict=True))
    return StreamResult(
        num_rows=roster.num_rows,
        num_maps=roster.num_maps,
        num_rejected=roster.num_rows - roster.num_maps,
        num_right=roster.num_right,
        gates={**reading.gates, "equal": num_equal},
        groups=tuple(reading.sums.groups(roster.names)),
        samples=reading.sampler.samples(),
        notes=roster.notes,
        fragments=digest_of_fragments(fragments),
        num_fragments=len(fragments),
    )


def committed(store: ObjectStore, plan: Plan) -> list[ObjectInfo]:
    """The committed fragments, in the plan's order."""
    found = {info.key: info for info in store.list("data/")}
    return [found[unit.fragment_key] for unit in plan.units if unit.fragment_key in found]


def digest_of_fragments(fragments: Sequence[ObjectInfo]) -> str:
    """SHA-256 in hex of the fragments' keys, sizes and versions, independent of their order."""
    facts = sorted((info.key, info.size, info.etag) for info in fragments)
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(usable_cores())


def _census(store: ObjectStore, fragments: Sequence[ObjectInfo]) -> tuple[pa.Table, list[int]]:
    """The census of all rows, and the number of maps in each fragment."""

    def of_fragment(info: ObjectInfo) -> pa.Table:
        own = Census()
        for batch in fragment_batches(store, info, CENSUS_COLUMNS, CENSUS_ROWS, CENSUS_WINDOW_BYTES):
            own.add(counted(pa.Table.from_batches([batch])))
        return own.table()

    census, maps_of = Census(), []
    with _threads() as threads:
        for counts in threads.map(of_fragment, fragments):
            census.add(counts)
            maps_of.append(num_maps(counts))
    return census.table(), maps_of


class _Reading:
    """Audits fragments; its state is shared by the threads."""

    def __init__(self, store: ObjectStore, resize: Any, scope: AuditScope, scratch: Path, roster: Roster) -> None:
        self.store, self.resize, self.scope, self.scratch, self.roster = store, resize, scope, scratch, roster
        self.lock = Lock()
        """Held while one of the attributes below changes."""
        self.sums = GroupSums.zeros(len(roster.names))
        self.sampler = Sampler(scope.seed, roster.num_targets)
        self.equals = EqualMaps(roster.num_maps)
        self.gates = dict.fromkeys(GATES, 0)

    def audit(self, info: ObjectInfo, start: int) -> int:
        """Audits a fragment, writes its file and returns its number of rows. `start`: its first map's index."""
        num_rows, waiting = 0, []
        with pq.ParquetWriter(self._file(info), ROWS, compression="zstd") as file:
            for batch in fragment_batches(self.store, info, COLUMNS, BATCH_ROWS, WindowedFile.WINDOW):
                num_rows += len(batch)
                maps = pa.Table.from_batches([batch]).filter(pc.field("status") == OK)
                waiting.append(self._audited(maps, start, info))
                start += len(maps)
                if len(waiting) * BATCH_ROWS >= ROWS_AT_ONCE:
                    file.write_table(pa.concat_tables(waiting))
                    waiting = []
            if waiting:
                file.write_table(pa.concat_tables(waiting))
        return num_rows

    def _audited(self, maps: pa.Table, start: int, info: ObjectInfo) -> pa.Table:
        """Audits explained rows and returns their `ROWS`. `start`: the first one's index among all maps."""
        rows = maps.drop_columns(["map"]).to_pylist()
        bodies = maps["map"].to_pylist()
        made = self._measured(rows, bodies, info)
        flags = _flags(rows, made)
        hashes = map_hashes(bodies, flags["flat"]), key_hashes([row["sha256"] or row["key"] for row in rows])
        members, candidates = self.roster.members(maps), self._candidates(rows, made, flags["flat"])
        with self.lock:
            self.sums.add(members, made.pooled, made.values)
            self.equals.put(start, *hashes)
            for name, own in flags.items():
                self.gates[name] += int(own.sum())
            for target, name, candidate in candidates:
                self.sampler.add(target, name, candidate)
        return _as_rows(maps, rows, made, flags)

    def _measured(self, rows: Sequence[Mapping[str, Any]], bodies: Sequence[bytes], info: ObjectInfo) -> Measured:
        parts = []
        for part in _parts(rows):
            maps = [self._levels(row, body, info) for row, body in zip(rows[part], bodies[part], strict=True)]
            parts.append(measured(np.stack(maps), [self._region(row) for row in rows[part]]))
        return Measured.joined(parts)

    def _levels(self, row: Mapping[str, Any], body: bytes | None, info: ObjectInfo) -> NDArray[np.uint8]:
        """A row's map [H, W], of the row's size. Raises DamagedError."""
        try:
            return decode_levels(body or b"", (row["map_height"], row["map_width"]))
        except MapError as error:
            raise DamagedError(
                f"{self.store.uri}/{info.key} holds a damaged map (record {row['key']!r}), `blocksight verify` says "
                f"more: {error}"
            ) from error

    def _region(self, row: Mapping[str, Any]) -> Region | None:
        """The region of the row's target, bool [H, W]; None without a usable annotation, and for no class."""
        if self.scope.truth is None or row["target_index"] is None:
            return None
        labels = labels_of(self.scope.class_map, row["target_index"], row["target_name"])
        original, size = (row["height"], row["width"]), (row["map_height"], row["map_width"])
        found = region_of(self.scope.truth, row["key"], labels, original, self.resize, size)
        return None if isinstance(found, str) else found

    def _candidates(
        self, rows: Sequence[Mapping[str, Any]], made: Measured, is_flat: NDArray[np.bool_]
    ) -> list[tuple[int, str, Candidate]]:
        """The maps that may be part of their class's or other target's sample, each with its number and name.

        Runs without the lock: what other threads add meanwhile can only make the sampler want fewer.
        """
        targets = [target_number(row["target_index"], row["target"]) for row in rows]
        hashes = self.sampler.hashes([row["key"] for row in rows], targets)
        return [
            (
                target,
                row["target_name"] if target >= 0 else row["target"],
                Candidate(
                    hashed, row["key"], row["score"], row["label_name"], bool(_right(row)), made.pooled[place].tobytes()
                ),
            )
            for place, (row, hashed, target) in enumerate(zip(rows, hashes, targets, strict=True))
            if (_is_own_class(row) or target < 0) and not is_flat[place] and self.sampler.wants(target, hashed)
        ]

    def mark_equals(self, info: ObjectInfo, start: int, shared: Words) -> int:
        """Marks a fragment's maps that several images share, in its file, and returns their number."""
        file = self._file(info)
        table = read_scratch(file)
        equals = contains(shared, self.equals.maps[start : start + len(table)])
        if equals.any():
            place = ROWS.get_field_index("equals_other")
            pq.write_table(table.set_column(place, ROWS.field(place), pa.array(equals)), file, compression="zstd")
        return int(equals.sum())

    def _file(self, info: ObjectInfo) -> Path:
        return self.scratch / PurePosixPath(info.key).name


def read_scratch(file: Path) -> pa.Table:
    """The rows of a file that `stream` wrote into the scratch folder. Raises DamagedError."""
    return read_rows(file.read_bytes(), ROWS, str(file))


def _parts(rows: Sequence[Mapping[str, Any]]) -> Iterator[slice]:
    """Slices of consecutive rows with maps of one size, at most `PIXELS_AT_ONCE` pixels in each."""
    start = 0
    for (height, width), own in groupby(rows, key=itemgetter("map_height", "map_width")):
        stop, step = start + len(list(own)), max(1, PIXELS_AT_ONCE // max(1, (height or 0) * (width or 0)))
        yield from (slice(at, min(at + step, stop)) for at in range(start, stop, step))
        start = stop


def _flags(rows: Sequence[Mapping[str, Any]], made: Measured) -> dict[str, NDArray[np.bool_]]:
    """[N] by gate, without `equal`, which needs all maps."""
    return {
        "flat": np.array([bool(row["is_flat"]) for row in rows], np.bool_),
        "saturated": np.array([bool(row["is_saturated"]) for row in rows], np.bool_),
        "border only": made.is_border_only,
        "checkerboard": made.is_checkerboard,
    }


def _is_own_class(row: Mapping[str, Any]) -> bool:
    return is_own_class(row["target_source"], row["target_rank"])


def _right(row: Mapping[str, Any]) -> bool | None:
    return is_right(row["label"], row["target_index"], row["target_rank"])


def _as_rows(
    maps: pa.Table, rows: Sequence[Mapping[str, Any]], made: Measured, flags: Mapping[str, NDArray[np.bool_]]
) -> pa.Table:
    """A batch in the columns of `ROWS`; columns that need all maps are null or false."""
    values = {name: made.of(name).astype(np.float32) for name in MEASURES}
    columns: dict[str, Any] = {
        **{name: maps[name] for name in ("key", "target_index", "target", "target_name", "label_name", "score")},
        "is_right": pa.array([_right(row) for row in rows], pa.bool_()),
        "is_own_class": pa.array([_is_own_class(row) for row in rows], pa.bool_()),
        **{name: pa.array(own, mask=np.isnan(own)) for name, own in values.items()},
        **{f"is_{name.replace(' ', '_')}": own for name, own in flags.items()},
        "equals_other": np.zeros(len(rows), np.bool_),
        **{name: pa.nulls(len(rows), ROWS.field(name).type) for name in ("cluster", "strangeness")},
        "pooled": pa.array([cells.tobytes() for cells in made.pooled], ROWS.field("pooled").type),
    }
    return pa.table([columns[name] for name in ROWS.names], schema=ROWS)
