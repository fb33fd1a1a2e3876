"""An output's maps, read once from end to end: measures, gates, groups and samples, in memory that stays as it is."""

import hashlib
import json
import os
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

from blocksight.jobs.audit.equals import EqualMaps, Words, contains, map_hashes
from blocksight.jobs.audit.groups import LIGHT, Census, GroupSums, Roster, counted, is_own_class, is_right, num_maps
from blocksight.jobs.audit.measures import Measured, Region, measured
from blocksight.jobs.audit.result import GATES, MEASURES, ROWS, Group
from blocksight.jobs.audit.samples import Candidate, Sample, Sampler
from blocksight.jobs.evaluate.evaluation import ClassMap, labels_of, region_of
from blocksight.jobs.plan.bootstrap import key_hashes
from blocksight.jobs.plan.config import ConfigError
from blocksight.jobs.plan.plan import Plan
from blocksight.storage.inputs.ground_truth import Truth
from blocksight.storage.outputs.fragments import fragment_batches, read_rows
from blocksight.storage.outputs.map_codec import MapError, decode_levels
from blocksight.storage.outputs.schema import OK
from blocksight.storage.stores.store import DamagedError, ObjectInfo, ObjectStore
from blocksight.storage.stores.windowed_file import WindowedFile

BATCH_ROWS = 256
"""Rows of a fragment that are in memory at once, in each thread."""
PIXELS_AT_ONCE = 2**19
"""Of decoded maps, in each thread: ten of 224 x 224, which stay in the processor's cache."""
LIGHT_ROWS, LIGHT_WINDOW_BYTES = 2**15, 2**18
"""Of the census, which leaves the maps between its columns unread."""
ROWS_AT_ONCE = 4096
"""Rows of a file of `ROWS` that are written together."""

COLUMNS = (
    *LIGHT,
    *("key", "sha256", "width", "height", "score"),
    *("map", "map_height", "map_width", "is_flat", "is_saturated"),
)
"""Of the output, that are read."""


@dataclass(frozen=True)
class Asked:
    """What changes the result."""

    truth: Truth | None
    """Where the objects are."""
    class_map: ClassMap
    """What the labels of the ground truth mean."""
    seed: int
    """Of the samples."""


@dataclass(frozen=True, eq=False)
class Streamed:
    """What one reading of all maps tells."""

    num_rows: int
    """Rejected ones included."""
    num_maps: int
    num_rejected: int
    num_right: int | None
    """Maps whose target is both the prediction and the label; None where no label is known."""
    gates: Mapping[str, int]
    """Maps that each gate stops."""
    groups: tuple[Group, ...]
    """`all` first; then by kind, the largest first."""
    samples: Mapping[int, Sample]
    """By target index."""
    notes: tuple[str, ...]
    """What was left out."""
    fragments: str
    """Digest of the fragments that were read."""
    num_fragments: int


def stream(store: ObjectStore, plan: Plan, asked: Asked, scratch: Path, update: Callable[[int], object]) -> Streamed:
    """Reads the committed fragments, one thread per CPU core, and leaves a file of `ROWS` for each in `scratch`.

    A file has its fragment's name and one row per map in the fragment's order, `equals_other` included; `cluster` and
    `strangeness` are null, and so are measures that are not defined. `update` hears how many rows more are done.
    Besides the groups and samples, which have their limits, 16 bytes a map stay in memory (32 in the end).
    Raises ConfigError where there is no map, DamagedError for bytes that are no fragment or no map, and StoreError.
    """
    fragments = committed(store, plan)
    census, maps_of = _census(store, fragments)
    if not sum(maps_of):
        raise ConfigError(f"there is no map in {store.uri} to audit: run `blocksight explain` first")
    roster = Roster.of(census)
    reading = _Reading(store, plan.identity["resize"], asked, scratch, roster)
    starts = np.cumsum([0, *maps_of])[:-1].tolist()
    with _threads() as threads:
        for num_rows in threads.map(reading.audit, fragments, starts):
            update(num_rows)
    shared = reading.equals.shared()
    num_equal = sum(reading.mark_equals(info, start, shared) for info, start in zip(fragments, starts, strict=True))
    return Streamed(
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
    """The fragments of the plan that stand, in its order."""
    standing = {info.key: info for info in store.list("data/")}
    return [standing[unit.fragment_key] for unit in plan.units if unit.fragment_key in standing]


def digest_of_fragments(fragments: Sequence[ObjectInfo]) -> str:
    """SHA-256 in hex of their keys, sizes and versions, in whatever order they come."""
    facts = sorted((info.key, info.size, info.etag) for info in fragments)
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count() or 1)


def _census(store: ObjectStore, fragments: Sequence[ObjectInfo]) -> tuple[pa.Table, list[int]]:
    """The census of all rows, and the number of maps in each fragment."""

    def of_fragment(info: ObjectInfo) -> pa.Table:
        own = Census()
        for batch in fragment_batches(store, info, LIGHT, LIGHT_ROWS, LIGHT_WINDOW_BYTES):
            own.add(counted(pa.Table.from_batches([batch])))
        return own.table()

    census, maps_of = Census(), []
    with _threads() as threads:
        for counts in threads.map(of_fragment, fragments):
            census.add(counts)
            maps_of.append(num_maps(counts))
    return census.table(), maps_of


class _Reading:
    """What the threads share."""

    def __init__(self, store: ObjectStore, resize: Any, asked: Asked, scratch: Path, roster: Roster) -> None:
        self.store, self.resize, self.asked, self.scratch, self.roster = store, resize, asked, scratch, roster
        self.lock = Lock()
        """Held while one of the following changes."""
        self.sums = GroupSums.zeros(len(roster.names))
        self.sampler = Sampler(asked.seed, roster.num_targets)
        self.equals = EqualMaps(roster.num_maps)
        self.gates = dict.fromkeys(GATES, 0)

    def audit(self, info: ObjectInfo, start: int) -> int:
        """The number of rows of a fragment, whose maps are counted from `start` on and whose file is written."""
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
        """The lines of some explained rows; `start`: the place of the first among all maps."""
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
        return _lines(maps, rows, made, flags)

    def _measured(self, rows: Sequence[Mapping[str, Any]], bodies: Sequence[bytes], info: ObjectInfo) -> Measured:
        parts = []
        for part in _parts(rows):
            maps = [self._levels(row, body, info) for row, body in zip(rows[part], bodies[part], strict=True)]
            parts.append(measured(np.stack(maps), [self._region(row) for row in rows[part]]))
        return Measured.joined(parts)

    def _levels(self, row: Mapping[str, Any], body: bytes | None, info: ObjectInfo) -> NDArray[np.uint8]:
        """A row's map, of the size that the row says. Raises DamagedError."""
        try:
            return decode_levels(body or b"", (row["map_height"], row["map_width"]))
        except MapError as error:
            raise DamagedError(
                f"{self.store.uri}/{info.key} holds a map that is none (record {row['key']!r}), `blocksight verify` "
                f"says more: {error}"
            ) from error

    def _region(self, row: Mapping[str, Any]) -> Region | None:
        """Where the row's target is; None where nobody says, or the annotation is of no use."""
        if self.asked.truth is None:
            return None
        labels = labels_of(self.asked.class_map, row["target_index"], row["target_name"])
        original, size = (row["height"], row["width"]), (row["map_height"], row["map_width"])
        found = region_of(self.asked.truth, row["key"], labels, original, self.resize, size)
        return None if isinstance(found, str) else found

    def _candidates(
        self, rows: Sequence[Mapping[str, Any]], made: Measured, is_flat: NDArray[np.bool_]
    ) -> list[tuple[int, str, Candidate]]:
        """The maps that may be part of their class's sample, with the class's number and name.

        Asked without the lock: what other threads add meanwhile can only make the sampler want fewer.
        """
        hashes = self.sampler.hashes([row["key"] for row in rows], [row["target_index"] for row in rows])
        return [
            (
                row["target_index"],
                row["target_name"],
                Candidate(
                    hashed, row["key"], row["score"], row["label_name"], bool(_right(row)), made.pooled[place].tobytes()
                ),
            )
            for place, (row, hashed) in enumerate(zip(rows, hashes, strict=True))
            if _is_own_class(row) and not is_flat[place] and self.sampler.wants(row["target_index"], hashed)
        ]

    def mark_equals(self, info: ObjectInfo, start: int, shared: Words) -> int:
        """How many maps of a fragment are shared by images, now that all are known; its file says which."""
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
    """The lines of one file in the scratch folder, as `stream` left them. Raises DamagedError."""
    return read_rows(file.read_bytes(), ROWS, str(file))


def _parts(rows: Sequence[Mapping[str, Any]]) -> Iterator[slice]:
    """Neighbours with maps of one size, few enough to be decoded at once."""
    start = 0
    for (height, width), own in groupby(rows, key=itemgetter("map_height", "map_width")):
        stop, step = start + len(list(own)), max(1, PIXELS_AT_ONCE // max(1, (height or 0) * (width or 0)))
        yield from (slice(at, min(at + step, stop)) for at in range(start, stop, step))
        start = stop


def _flags(rows: Sequence[Mapping[str, Any]], made: Measured) -> dict[str, NDArray[np.bool_]]:
    """[N] by gate; `equal` needs all maps."""
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


def _lines(
    maps: pa.Table, rows: Sequence[Mapping[str, Any]], made: Measured, flags: Mapping[str, NDArray[np.bool_]]
) -> pa.Table:
    """In the columns of `ROWS`, as far as one batch can know them."""
    values = {name: made.of(name).astype(np.float32) for name in MEASURES}
    columns: dict[str, Any] = {
        **{name: maps[name] for name in ("key", "target_index", "target_name", "label_name", "score")},
        "is_right": pa.array([_right(row) for row in rows], pa.bool_()),
        "is_own_class": pa.array([_is_own_class(row) for row in rows], pa.bool_()),
        **{name: pa.array(own, mask=np.isnan(own)) for name, own in values.items()},
        **{f"is_{name.replace(' ', '_')}": own for name, own in flags.items()},
        "equals_other": np.zeros(len(rows), np.bool_),
        **{name: pa.nulls(len(rows), ROWS.field(name).type) for name in ("cluster", "strangeness")},
        "pooled": pa.array([cells.tobytes() for cells in made.pooled], ROWS.field("pooled").type),
    }
    return pa.table([columns[name] for name in ROWS.names], schema=ROWS)
