"""Cuts regions out of an output's maps: Parquet beside the maps, once per fragment, and COCO JSON of all of them."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import groupby
from operator import itemgetter
from typing import Any

import numpy as np
import pyarrow as pa
from rich.console import Console

from blocksight.engine.regions import Foreground, RegionRule, foreground_of
from blocksight.engine.saliency import FLAT
from blocksight.jobs.evaluate.evaluation import fragment_key
from blocksight.jobs.ledger.dead_letters import letter_key
from blocksight.jobs.ledger.output import fragment_of, map_of, table_of
from blocksight.jobs.plan.config import CODE_VERSION, Execution, digest_of
from blocksight.jobs.plan.plan import REGIONS_FOLDER, Plan
from blocksight.jobs.plan.records import Unit
from blocksight.jobs.run.unit_pass import ONE_PROCESS, Reopening, over_units
from blocksight.jobs.worker.progress import tracked
from blocksight.jobs.worker.rows import Output, existing_output
from blocksight.storage.outputs.coco import CocoWriter, placed
from blocksight.storage.outputs.fragments import encode_fragment
from blocksight.storage.outputs.schema import OK, RECORD_COLUMNS, REGIONS
from blocksight.storage.stores.store import AlreadyExistsError, ObjectStore

SETTINGS, COCO = "regions.json", "coco"
REJECTED_RECORD = "the record was rejected"
COLUMNS = [name for name in REGIONS.names if name in RECORD_COLUMNS]
READ = [*COLUMNS, "status", *("target_index", "target", "target_name", "score", "explainer", "parameters")]
READ += ["map", "map_height", "map_width"]

Row = Mapping[str, Any]


@dataclass
class RegionCounts:
    """What `blocksight regions` found."""

    records: int = 0
    """Explained ones: the COCO documents' images."""
    maps: int = 0
    with_regions: int = 0
    """Maps that have at least one part."""
    parts: int = 0
    """Connected parts that are listed."""
    reasons: dict[str, int] = field(default_factory=dict)
    """Rows without a part, by reason."""
    made: int = 0
    """Fragments that this run wrote."""
    kept: int = 0
    """Fragments that were there."""
    open_units: int = 0
    """Units of the job that are not explained yet and not given up."""

    def add(self, rows: Sequence[Row]) -> None:
        """Counts the rows of one fragment."""
        for row in rows:
            self.maps += row["target_name"] is not None
            self.with_regions += bool(row["parts"])
            self.parts += len(row["parts"])
            if row["reason"] is not None:
                self.reasons[row["reason"]] = self.reasons.get(row["reason"], 0) + 1


@dataclass(frozen=True)
class FoundRegions:
    """The result of `blocksight regions`."""

    rule: RegionRule
    folder: str
    """Below the output's root."""
    coco: tuple[str, ...]
    """The COCO documents' keys below the output's root; more than one where one would be too large."""
    counts: RegionCounts


def regions_folder(plan: Plan, rule: RegionRule) -> str:
    """The folder of these settings below the output's root."""
    return f"{REGIONS_FOLDER}{digest_of(_identity(plan, rule))[:16]}/"


def _identity(plan: Plan, rule: RegionRule) -> dict[str, Any]:
    return {"job": plan.fingerprint, **asdict(rule), "code": CODE_VERSION}


def find_regions(
    output: Output,
    rule: RegionRule,
    console: Console,
    execution: Execution = ONE_PROCESS,
    endpoint_url: str | None = None,
) -> FoundRegions:
    """Writes the regions of every fragment that has none yet, then the COCO documents anew.

    In each process one fragment is in memory at a time, and here one document. Raises StoreError, ClusterError, and
    UnreconciledError for a damaged fragment.
    """
    store, plan = output.store, output.plan
    folder, counts = regions_folder(plan, rule), RegionCounts()
    with suppress(AlreadyExistsError):
        store.create(f"{folder}{SETTINGS}", json.dumps(_identity(plan, rule), indent=1).encode())
    committed = {info.key for info in store.list("data/")}
    there = {info.key for info in store.list(folder)}
    units = [unit for unit in plan.units if unit.fragment_key in committed]
    left = [unit for unit in units if fragment_key(folder, unit) not in there]
    counts.open_units, counts.made, counts.kept = _num_open(store, plan, committed), len(left), len(units) - len(left)
    outlining = Outlining(store.uri, endpoint_url, rule, folder)
    outlining.__dict__["output"] = output  # of this process
    over_units(outlining, left, execution, console, "outline")
    writer = CocoWriter(
        {"description": f"regions of {plan.identity['explainer']} maps by blocksight", "rule": str(rule)}
    )
    documents: list[str] = []
    for unit in tracked(console, units, len(units), "write", "unit"):
        rows = region_table(store, fragment_key(folder, unit)).to_pylist()
        counts.add(rows)
        for record in _records(rows):
            for full in writer.add(record):
                documents.append(_put(store, folder, len(documents), full))
            counts.records += 1
    documents.append(_put(store, folder, len(documents), writer.document()))
    return FoundRegions(rule, folder, tuple(documents), counts)


@dataclass
class Outlining(Reopening):
    """Writes the regions of a unit's maps, in any process."""

    uri: str
    endpoint_url: str | None
    rule: RegionRule
    folder: str

    @cached_property
    def output(self) -> Output:
        """The output, opened where its maps are read."""
        return existing_output(self.uri, self.endpoint_url)

    def __call__(self, ordinal: int) -> None:
        """Writes the rows of the unit at this place of the plan, once."""
        store, plan = self.output.store, self.output.plan
        unit = plan.units[ordinal]
        rows = [region_row(row, self.rule, plan.identity["resize"]) for row in _stored(store, unit)]
        with suppress(AlreadyExistsError):  # of another run, which wrote the same bytes
            body = encode_fragment(rows, {"blocksight.job": plan.fingerprint}, REGIONS)
            store.create(fragment_key(self.folder, unit), body)


def _num_open(store: ObjectStore, plan: Plan, committed: set[str]) -> int:
    dead = {info.key for info in store.list("_job/dead/")}
    return sum(unit.fragment_key not in committed and letter_key(unit.unit_id) not in dead for unit in plan.units)


def _put(store: ObjectStore, folder: str, number: int, body: bytes) -> str:
    key = f"{folder}{COCO}{f'-{number}' if number else ''}.json"
    store.put(key, body)
    return key


def _records(rows: Sequence[Row]) -> Iterator[list[Row]]:
    """The rows of each explained record; a rejected one has no picture to outline."""
    for _, own in groupby(rows, itemgetter("shard", "shard_index")):
        record = list(own)
        if record[0]["width"] is not None and record[0]["target_name"] is not None:
            yield record


def _stored(store: ObjectStore, unit: Unit) -> Iterator[Row]:
    """The fragment's rows, one at a time, because maps are large."""
    for batch in fragment_of(store, unit.fragment_key, READ).to_batches(max_chunksize=64):
        yield from batch.to_pylist()


def region_table(store: ObjectStore, key: str) -> pa.Table:
    """The rows of one stored fragment. Raises StoreError, and UnreconciledError if it is damaged."""
    return table_of(store, key, REGIONS)


def region_row(row: Row, rule: RegionRule, resize: Any) -> Row:
    """The regions of one row of the output, in the columns of `REGIONS`. Raises UnreconciledError for a damaged map."""
    facts = {name: row[name] for name in READ if name in REGIONS.names}
    nothing = {**facts, "threshold": None, "num_parts": 0, "parts": []}
    if row["status"] != OK:
        return {**nothing, "reason": REJECTED_RECORD}
    found = foreground_of(map_of(row).astype(np.float64), rule)
    if found is None:
        return {**nothing, "reason": FLAT}
    size = (row["height"], row["width"])
    parts = list(_parts(found, rule, size, resize))
    return {**nothing, "threshold": found.threshold, "num_parts": found.num_parts, "parts": parts, "reason": None}


def _parts(found: Foreground, rule: RegionRule, size: tuple[int, int], resize: Any) -> Iterator[dict[str, Any]]:
    for part in found.chosen(rule.parts):
        place = asdict(placed(part.mask_hw, size, resize))
        yield {**place, "pixels": place.pop("area"), "area": part.area, "energy": part.energy}
