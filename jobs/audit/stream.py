"""Reads all maps of an output once, unit by unit in any process: measures, gates, groups and samples."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from rich.console import Console

from blocksight.jobs.audit.equal_maps import EqualMaps, Words, contains
from blocksight.jobs.audit.groups import CENSUS_COLUMNS, Census, GroupSums, Roster, counted
from blocksight.jobs.audit.measuring import (
    EXACT,
    AuditScope,
    Measuring,
    measured_folder,
    measured_key,
    measured_rows,
)
from blocksight.jobs.audit.result import GATES, GRID, MEASURES, ROWS, Group
from blocksight.jobs.audit.samples import Candidate, Sample, Sampler, target_number
from blocksight.jobs.plan.config import ConfigError, Execution
from blocksight.jobs.plan.plan import Plan
from blocksight.jobs.plan.records import Unit
from blocksight.jobs.run.unit_pass import ONE_PROCESS, over_units
from blocksight.jobs.worker.progress import tracked
from blocksight.jobs.worker.rows import Output
from blocksight.storage.outputs.schema import OK
from blocksight.storage.stores.store import ObjectInfo, ObjectStore

SUMMED = [*CENSUS_COLUMNS, "key", "score", "is_flat", "is_saturated", "is_border_only", "is_checkerboard", "is_right"]
SUMMED += ["is_own_class", "pooled", *EXACT]
"""Columns of the measured rows that groups, samples and gates need."""


@dataclass(frozen=True, eq=False)
class MeasuredMaps:
    """The measured rows of the committed units, in the plan's order."""

    store: ObjectStore
    units: tuple[Unit, ...]
    folder: str
    """Where they are kept below the output's root."""

    def of(self, unit: Unit, columns: Sequence[str]) -> pa.Table:
        """Some columns of a unit's rows, rejected records included. Raises as `measured_rows`."""
        return measured_rows(self.store, measured_key(self.folder, unit), columns)

    def rows(self, unit: Unit, shared: Words) -> pa.Table:
        """The maps of a unit in the columns of `ROWS`. `shared`: hashes of maps that several images have."""
        table = self.of(unit, [*ROWS.names, "status", "map_hash"]).filter(pc.field("status") == OK)
        equals = pa.array(contains(shared, table["map_hash"].to_numpy()))
        place = ROWS.get_field_index("equals_other")
        return table.select(ROWS.names).set_column(place, ROWS.field(place), equals)


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
    measured: MeasuredMaps
    shared: Words
    """Sorted hashes of the maps that several images have."""


def stream(
    output: Output,
    scope: AuditScope,
    console: Console,
    execution: Execution = ONE_PROCESS,
    endpoint_url: str | None = None,
) -> StreamResult:
    """Measures the committed units that are not measured yet, each once, and sums up the measured rows of all.

    Besides the groups and samples, which are bounded, memory holds one unit's rows and 16 bytes per map (32 at the
    end). Raises ConfigError if there is no map, DamagedError for a damaged fragment or map, ClusterError, StoreError.
    """
    store, plan = output.store, output.plan
    fragments = committed(store, plan)
    digest = digest_of_fragments(fragments)
    keys = {info.key for info in fragments}
    units = tuple(unit for unit in plan.units if unit.fragment_key in keys)
    measured = MeasuredMaps(store, units, measured_folder(plan, scope, digest))
    there = {info.key for info in store.list(measured.folder)}
    work = Measuring(store.uri, endpoint_url, scope, measured.folder)
    work.__dict__["output"] = output  # of this process
    left = [unit for unit in units if measured_key(measured.folder, unit) not in there]
    over_units(work, left, execution, console, "audit")
    roster = Roster.of(_census(measured, console))
    if not roster.num_maps:
        raise ConfigError(f"there is no map in {store.uri} to audit: run `blocksight explain` first")
    summing = _Summing(scope.seed, roster)
    for unit in tracked(console, units, len(units), "join", "unit"):
        summing.add(measured.of(unit, SUMMED).filter(pc.field("status") == OK))
    shared = summing.equals.shared()
    return StreamResult(
        num_rows=roster.num_rows,
        num_maps=roster.num_maps,
        num_rejected=roster.num_rows - roster.num_maps,
        num_right=roster.num_right,
        gates={**summing.gates, "equal": int(contains(shared, summing.equals.maps).sum())},
        groups=tuple(summing.sums.groups(roster.names)),
        samples=summing.sampler.samples(),
        notes=roster.notes,
        fragments=digest,
        measured=measured,
        shared=shared,
    )


def committed(store: ObjectStore, plan: Plan) -> list[ObjectInfo]:
    """The committed fragments, in the plan's order."""
    found = {info.key: info for info in store.list("data/")}
    return [found[unit.fragment_key] for unit in plan.units if unit.fragment_key in found]


def digest_of_fragments(fragments: Sequence[ObjectInfo]) -> str:
    """SHA-256 in hex of the fragments' keys, sizes and versions, independent of their order."""
    facts = sorted((info.key, info.size, info.etag) for info in fragments)
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _census(measured: MeasuredMaps, console: Console) -> pa.Table:
    """The census of all rows."""
    census = Census()
    for unit in tracked(console, measured.units, len(measured.units), "count", "unit"):
        census.add(counted(measured.of(unit, CENSUS_COLUMNS)))
    return census.table()


class _Summing:
    """Sums up measured maps, in any order."""

    def __init__(self, seed: int, roster: Roster) -> None:
        self.roster = roster
        self.sums = GroupSums.zeros(len(roster.names))
        self.sampler = Sampler(seed, roster.num_targets)
        self.equals = EqualMaps(roster.num_maps)
        self.gates = dict.fromkeys(GATES, 0)
        self.num_maps = 0

    def add(self, maps: pa.Table) -> None:
        """Adds rows of `SUMMED`, of explained records."""
        pooled = np.frombuffer(b"".join(maps["pooled"].to_pylist()), np.uint8).reshape(-1, GRID, GRID)
        values = np.frombuffer(b"".join(maps["values"].to_pylist()), np.float64).reshape(-1, len(MEASURES))
        self.sums.add(self.roster.members(maps), pooled, values)
        self.equals.put(self.num_maps, maps["map_hash"].to_numpy(), maps["image_hash"].to_numpy())
        self.num_maps += len(maps)
        for name in self.gates.keys() - {"equal"}:
            self.gates[name] += int(pc.sum(maps[f"is_{name.replace(' ', '_')}"]).as_py() or 0)  # pyright: ignore[reportAttributeAccessIssue]
        for target, name, candidate in self._candidates(maps):
            self.sampler.add(target, name, candidate)

    def _candidates(self, maps: pa.Table) -> Iterator[tuple[int, str, Candidate]]:
        """The maps that may be part of their class's or other target's sample, each with its number and name."""
        rows: list[dict[str, Any]] = maps.drop_columns([*EXACT]).to_pylist()
        targets = [target_number(row["target_index"], row["target"]) for row in rows]
        hashes = self.sampler.hashes([row["key"] for row in rows], targets)
        for row, hashed, target in zip(rows, hashes, targets, strict=True):
            is_taken = (row["is_own_class"] or target < 0) and not row["is_flat"]
            if is_taken and self.sampler.wants(target, hashed):
                name = row["target_name"] if target >= 0 else row["target"]
                own = Candidate(
                    hashed, row["key"], row["score"], row["label_name"], bool(row["is_right"]), row["pooled"]
                )
                yield target, name, own
