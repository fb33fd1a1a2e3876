"""Reads the explained records of an output for every export: images, maps, metrics and audit rows."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice, takewhile
from pathlib import PurePosixPath
from typing import Any

from blocksight.jobs.audit.result import ROWS, ROWS_FOLDER, read_audit
from blocksight.jobs.evaluate.evaluation import evaluation_folders, fragment_key
from blocksight.jobs.export.selection import Selection
from blocksight.jobs.export.sql import METHOD, MetricColumns
from blocksight.jobs.ledger.output import fragment_of, table_of, values_in
from blocksight.jobs.plan.plan import Plan, source_of
from blocksight.jobs.plan.records import Unit, UnreconciledError
from blocksight.jobs.worker.rows import images_in
from blocksight.storage.outputs.pictures import Pixels
from blocksight.storage.outputs.schema import OK, PRODUCT_COLUMNS, SCHEMA
from blocksight.storage.stores.store import ObjectStore

Row = Mapping[str, Any]
Method = tuple[Any, ...]
"""A map's values of the columns `METHOD`."""

ALL = Selection()

COLUMNS = [name for name in SCHEMA.names if name not in PRODUCT_COLUMNS]
VALUE_COLUMNS = [*METHOD, "metric", "protocol", "value"]


@dataclass(frozen=True)
class ExplainedMap:
    """One map of a record."""

    row: Row
    """The columns of `blocksight.storage.outputs.schema.SCHEMA`, without side products."""
    metrics: Mapping[str, float]
    """Values by column, without metrics that are not defined for the map."""
    audited: Row | None
    """The columns of `blocksight.jobs.audit.result.ROWS`; None if the map was not audited."""


@dataclass(frozen=True)
class ExplainedRecord:
    """A record and its maps."""

    key: str
    pixels: Pixels
    """The upright original [H, W, 3]."""
    maps: tuple[ExplainedMap, ...]
    """One per target."""

    @property
    def maps_of_classes(self) -> tuple[ExplainedMap, ...]:
        """Without those of sums of classes, which tools that know classes alone cannot take."""
        return tuple(one for one in self.maps if one.row["target_index"] is not None)

    @property
    def prediction(self) -> Row | None:
        """The row of the predicted class; None if that class is not explained."""
        return next((one.row for one in self.maps if one.row["target_rank"] == 1), None)


class ExplainedRecords:
    """The explained records of an output, in the plan's order. In memory are one unit's rows and one image."""

    def __init__(
        self,
        store: ObjectStore,
        plan: Plan,
        columns: MetricColumns,
        endpoint_url: str | None = None,
        limit: int | None = None,
        selection: Selection = ALL,
    ) -> None:
        """`columns`: the metrics' column names. `limit`: most records that are yielded. `selection`: of their maps.

        Raises StoreError, and UnreconciledError if an audit is damaged.
        """
        self.store, self.plan, self.columns, self.limit = store, plan, columns, limit
        self.selection = selection
        self.source = source_of(plan, endpoint_url)
        self.evaluations = evaluation_folders(store)
        self.keys = {info.key for prefix in ("data/", *self.evaluations) for info in store.list(prefix)}
        self.audit = read_audit(store)
        self.audited = {} if self.audit is None else _audited_units(store)
        self.num_records = 0
        """Records that were yielded so far."""
        self.num_rejected = 0
        """Rejected records that were skipped so far."""
        self.num_gone = 0
        """Skipped records whose image is gone or has changed."""

    @property
    def has_audit(self) -> bool:
        """Whether the output has an audit."""
        return self.audit is not None

    def __iter__(self) -> Iterator[ExplainedRecord]:
        """Yields the records. Raises StoreError, and UnreconciledError if part of the output is damaged."""
        for record in islice(self._all(), self.limit):
            self.num_records += 1
            yield record

    @property
    def units(self) -> list[Unit]:
        """The committed units, in the plan's order."""
        return [unit for unit in self.plan.units if unit.fragment_key in self.keys]

    def _all(self) -> Iterator[ExplainedRecord]:
        for unit in self.units:
            yield from self.of(unit)

    def of(self, unit: Unit) -> Iterator[ExplainedRecord]:
        """Yields a committed unit's records, whatever the limit, and counts those that are skipped. Raises as above."""
        rows = fragment_of(self.store, unit.fragment_key, COLUMNS).to_pylist()
        values, audited = self._values(unit), self._audit_rows(unit)
        maps: dict[str, list[ExplainedMap]] = {}
        for row in rows:
            if row["status"] == OK and self.selection.takes(row):
                metrics = {**self._own_metrics(row), **values.get(_method(row), {})}
                about = audited.get(_audited_map(row))
                maps.setdefault(row["key"], []).append(ExplainedMap(row, metrics, about))
        ordered = dict.fromkeys(
            (row["shard"], row["shard_index"], row["key"] if row["status"] == OK else None)
            for row in rows
            if row["status"] != OK or row["key"] in maps
        )
        remaining = (key for _, _, key in ordered)
        for key, pixels in images_in(unit, self.source, frozenset(maps)):
            self._count_skipped(takewhile(lambda own, key=key: own != key, remaining))
            yield ExplainedRecord(key, pixels, tuple(maps[key]))
        self._count_skipped(remaining)

    def _count_skipped(self, keys: Iterable[str | None]) -> None:
        """Counts records that are not yielded; the key None means a rejected one."""
        for key in keys:
            self.num_rejected += key is None
            self.num_gone += key is not None

    def _own_metrics(self, row: Row) -> Mapping[str, float]:
        """Drop and Increase that `explain` measured, both in percent."""
        found = row["metrics"]
        increase = None if found["increase"] is None else 100.0 * found["increase"]
        own = {name: value for name, value in (("drop", found["drop"]), ("increase", increase)) if value is not None}
        named = {self.columns.get((metric, found["protocol"])): value for metric, value in own.items()}
        return {column: value for column, value in named.items() if column is not None}

    def _values(self, unit: Unit) -> Mapping[Method, Mapping[str, float]]:
        """The evaluations' values of the unit's maps; a later evaluation's value replaces an earlier one's."""
        found: dict[Method, dict[str, float]] = {}
        for folder in self.evaluations:
            key = fragment_key(folder, unit)
            if key in self.keys:
                for row in values_in(self.store, key, VALUE_COLUMNS).to_pylist():
                    column = self.columns.get((row["metric"], row["protocol"]))
                    if column is not None and row["value"] is not None:
                        found.setdefault(_method(row), {})[column] = row["value"]
        return found

    def _audit_rows(self, unit: Unit) -> Mapping[tuple[Any, ...], Row]:
        key = self.audited.get(unit.unit_id)
        if key is None:
            return {}
        rows = table_of(self.store, key, ROWS).to_pylist()
        return {_audited_map(row): row for row in rows}


def _audited_map(row: Row) -> tuple[Any, ...]:
    """What tells a record's maps apart in an audit: a sum of classes has no index."""
    return row["key"], row["target_index"], row["target_name"]


def _method(row: Row) -> Method:
    return tuple(row[name] for name in METHOD)


def _audited_units(store: ObjectStore) -> Mapping[str, str]:
    """The keys of the audit's files by unit id, which their names hold. Raises UnreconciledError if there are none."""
    files = {PurePosixPath(info.key).stem.rpartition("-")[2]: info.key for info in store.list(ROWS_FOLDER)}
    if not files:
        raise UnreconciledError(f"{store.uri} has an audit without rows in {ROWS_FOLDER}; run `blocksight audit` again")
    return files
