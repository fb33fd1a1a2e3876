"""Measures the maps of a unit, in any process; the rows stay beside the audit until it is written."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from operator import itemgetter
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from blocksight.jobs.audit.equal_maps import Words, map_hashes
from blocksight.jobs.audit.groups import CENSUS_COLUMNS, is_own_class, is_right
from blocksight.jobs.audit.measures import Measured, Region, measured
from blocksight.jobs.audit.result import FOLDER, MEASURES, ROWS
from blocksight.jobs.evaluate.bootstrap import key_hashes
from blocksight.jobs.evaluate.evaluation import ClassMap, labels_of, region_of
from blocksight.jobs.ledger.output import table_of
from blocksight.jobs.plan.config import CODE_VERSION, digest_of
from blocksight.jobs.plan.documents import damaged
from blocksight.jobs.plan.plan import Plan
from blocksight.jobs.plan.records import Unit
from blocksight.jobs.run.unit_pass import Reopening
from blocksight.jobs.worker.rows import Output, existing_output
from blocksight.storage.inputs.ground_truth import Truth
from blocksight.storage.outputs.fragments import fragment_batches
from blocksight.storage.outputs.map_codec import MapError, decode_levels
from blocksight.storage.outputs.schema import OK, SCHEMA
from blocksight.storage.parquet.rows import parquet_of_table
from blocksight.storage.stores.store import AlreadyExistsError, DamagedError, MissingError, ObjectInfo, ObjectStore
from blocksight.storage.stores.windowed_file import WindowedFile

MEASURED_FOLDER = f"{FOLDER}_measured/"
BATCH_ROWS = 256
"""Rows of a fragment in memory at once, beside what was measured."""
PIXELS_AT_ONCE = 2**19
"""Pixels of decoded maps in memory: ten maps of 224 x 224, which fit into the processor's cache."""

COLUMNS = (
    *CENSUS_COLUMNS,
    *("key", "sha256", "width", "height", "score"),
    *("map", "map_height", "map_width", "is_flat", "is_saturated"),
)
"""Columns of the fragments that are read."""
COPIED = ("key", "target_index", "target", "target_name", "label_name", "score")
"""Columns of the fragments that are in `ROWS` too."""
OF_CENSUS = [name for name in CENSUS_COLUMNS if name not in ROWS.names]
EXACT = ("values", "map_hash", "image_hash")
MEASURED = pa.schema(
    [
        *(SCHEMA.field(name).with_nullable(True) for name in OF_CENSUS),
        *ROWS,
        ("values", pa.binary(8 * len(MEASURES))),
        ("map_hash", pa.uint64()),
        ("image_hash", pa.uint64()),
    ]
)
"""One row per row of a fragment, rejected records too: the columns of `ROWS`, of which `cluster` and `strangeness` are
null and `equals_other` false; those of a census; the measures in float64; and hashes of map and image."""


@dataclass(frozen=True)
class AuditScope:
    """The settings that change the result."""

    truth: Truth | None
    """The ground truth: where the objects are."""
    class_map: ClassMap
    """The classes that each label of the ground truth means."""
    seed: int
    """Seed of the samples."""


def measured_folder(plan: Plan, scope: AuditScope, fragments: str) -> str:
    """Where the measured rows of these settings and fragments (a digest) are kept below the output's root."""
    truth = None if scope.truth is None else scope.truth.digest
    facts = {"job": plan.fingerprint, "truth": truth, "class_map": dict(scope.class_map), "code": CODE_VERSION}
    return f"{MEASURED_FOLDER}{digest_of({**facts, 'fragments': fragments})[:16]}/"


def measured_key(folder: str, unit: Unit) -> str:
    """The key of a unit's measured rows."""
    return f"{folder}{unit.fragment_key.rpartition('/')[2]}"


def measured_rows(store: ObjectStore, key: str, columns: Sequence[str]) -> pa.Table:
    """Some columns of a unit's measured rows. Raises StoreError, and UnreconciledError if they are damaged."""
    try:
        table = table_of(store, key, MEASURED, columns)
    except MissingError as error:
        raise MissingError(f"{store.uri}/{key} is gone; the same `audit` measures it again") from error
    if "status" in columns:
        sound = table.filter(pc.field("status") == OK)
        lacking = [name for name in ("pooled", *EXACT) if name in columns and sound[name].null_count]
        if lacking:
            raise damaged(store.uri, key, f"a map lacks {', '.join(lacking)}")
    return table


@dataclass
class Measuring(Reopening):
    """Measures the maps of a unit and writes their rows, in any process."""

    uri: str
    endpoint_url: str | None
    scope: AuditScope
    folder: str

    @cached_property
    def output(self) -> Output:
        """The output, opened where its maps are read."""
        return existing_output(self.uri, self.endpoint_url)

    def __call__(self, ordinal: int) -> None:
        """Writes the measured rows of the unit at this place of the plan, once.

        Raises DamagedError for a damaged fragment or map, and StoreError.
        """
        store, unit = self.output.store, self.output.plan.units[ordinal]
        info = store.head(unit.fragment_key)
        if info is None:
            raise MissingError(f"{store.uri}/{unit.fragment_key} is gone, `blocksight verify` says more")
        batches = fragment_batches(store, info, COLUMNS, BATCH_ROWS, WindowedFile.WINDOW)
        tables = [self._of(pa.Table.from_batches([batch]), info) for batch in batches]
        body = parquet_of_table(pa.concat_tables([MEASURED.empty_table(), *tables]))
        with suppress(AlreadyExistsError):  # of another call, which wrote the same
            store.create(measured_key(self.folder, unit), body)

    def _of(self, batch: pa.Table, info: ObjectInfo) -> pa.Table:
        maps = batch.filter(pc.field("status") == OK)
        others = batch.filter(pc.field("status") != OK).select([*CENSUS_COLUMNS, "key"])
        return pa.concat_tables([self._of_maps(maps, info), _filled(others)])

    def _of_maps(self, maps: pa.Table, info: ObjectInfo) -> pa.Table:
        rows = maps.drop_columns(["map"]).to_pylist()
        bodies = maps["map"].to_pylist()
        made = self._measured(rows, bodies, info)
        flags = _flags(rows, made)
        hashes = map_hashes(bodies, flags["flat"]), key_hashes([row["sha256"] or row["key"] for row in rows])
        return _as_rows(maps, rows, made, flags, hashes)

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
                f"{self.output.store.uri}/{info.key} holds a damaged map (record {row['key']!r}), `blocksight verify` "
                f"says more: {error}"
            ) from error

    def _region(self, row: Mapping[str, Any]) -> Region | None:
        """The region of the row's target, bool [H, W]; None without a usable annotation, and for no class."""
        if self.scope.truth is None or row["target_index"] is None:
            return None
        labels = labels_of(self.scope.class_map, row["target_index"], row["target_name"])
        original, size = (row["height"], row["width"]), (row["map_height"], row["map_width"])
        resize = self.output.plan.identity["resize"]
        found = region_of(self.scope.truth, row["key"], labels, original, resize, size)
        return None if isinstance(found, str) else found


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


def _as_rows(
    maps: pa.Table,
    rows: Sequence[Mapping[str, Any]],
    made: Measured,
    flags: Mapping[str, NDArray[np.bool_]],
    hashes: tuple[Words, Words],
) -> pa.Table:
    """Explained rows in the columns of `MEASURED`."""
    values = {name: made.of(name).astype(np.float32) for name in MEASURES}
    columns: dict[str, Any] = {
        **{name: maps[name] for name in (*OF_CENSUS, *COPIED)},
        "is_right": [is_right(row["label"], row["target_index"], row["target_rank"]) for row in rows],
        "is_own_class": [is_own_class(row["target_source"], row["target_rank"]) for row in rows],
        **{name: pa.array(own, mask=np.isnan(own)) for name, own in values.items()},
        **{f"is_{name.replace(' ', '_')}": own for name, own in flags.items()},
        "equals_other": np.zeros(len(rows), np.bool_),
        "pooled": [cells.tobytes() for cells in made.pooled],
        "values": [own.tobytes() for own in made.values],
        **dict(zip(("map_hash", "image_hash"), hashes, strict=True)),
    }
    return _filled(pa.table({name: _column(name, own) for name, own in columns.items()}))


def _column(name: str, values: Any) -> pa.Array | pa.ChunkedArray:
    return values if isinstance(values, pa.Array | pa.ChunkedArray) else pa.array(values, MEASURED.field(name).type)


def _filled(rows: pa.Table) -> pa.Table:
    """The rows in the columns of `MEASURED`: null where they have none."""
    nothing = {name: pa.nulls(len(rows), MEASURED.field(name).type) for name in MEASURED.names}
    return pa.table({**nothing, **dict(zip(rows.column_names, rows.columns, strict=True))}, schema=MEASURED)
