"""Joins two outputs record by record: A's fragments in the plan's order, each with B's fragments that overlap it."""

from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import groupby
from operator import itemgetter
from typing import Any

import pyarrow.compute as pc

from blocksight.jobs.evaluate.evaluation import evaluation_folders, fragment_key
from blocksight.jobs.ledger.accuracy import is_right
from blocksight.jobs.ledger.output import fragment_of, values_in
from blocksight.jobs.plan.plan import Plan
from blocksight.jobs.plan.records import Unit
from blocksight.jobs.worker.rows import Output
from blocksight.storage.inputs.survey import Layout
from blocksight.storage.outputs.schema import OK
from blocksight.storage.stores.store import MissingError

Row = dict[str, Any]
Value = tuple[str, str, str]
"""Target, metric and protocol of a value."""

COLUMNS = [
    *("key", "shard", "shard_index", "status", "sha256", "width", "height", "label", "label_name", "label_rank"),
    *("target", "target_index", "target_name", "target_rank", "score", "explainer", "parameters", "metrics"),
    *("map", "map_height", "map_width"),
]


@dataclass(frozen=True)
class Record:
    """One explained record of one output."""

    rows: Mapping[str, Row]
    """By target."""
    values: Mapping[Value, float]
    """Results of evaluations."""

    @property
    def is_right(self) -> bool | None:
        """Whether the prediction is the label; None if the label is unknown, or no row shows the prediction."""
        return is_right(self.rows.values())


@dataclass(frozen=True)
class FragmentRecords:
    """The records of one fragment."""

    records: Mapping[str, Record]
    """The explained records, by key."""
    num_rejected: int


@dataclass
class Counts:
    """Counts of one output's records."""

    explained: int = 0
    rejected: int = 0
    open_units: int = 0
    """Units without a fragment: their records count as absent."""

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(
            self.explained + other.explained, self.rejected + other.rejected, self.open_units + other.open_units
        )


@dataclass
class Tally:
    """Counts that are kept while two outputs are joined."""

    a: Counts = field(default_factory=Counts)
    b: Counts = field(default_factory=Counts)
    explained_in_both: int = 0
    """Records explained under the same key in both, changed images included."""
    other_image: int = 0
    """Of these: the image's bytes differ, so nothing is compared."""
    other_targets: int = 0
    """Of these: the image is the same, but no target is shared."""
    other_names: int = 0
    """Shared rows whose target has another name in B: the classes may not be the same."""

    @classmethod
    def of(cls, stored: Mapping[str, Any]) -> "Tally":
        """The tally of its plain values."""
        return cls(**{**stored, "a": Counts(**stored["a"]), "b": Counts(**stored["b"])})

    def __add__(self, other: "Tally") -> "Tally":
        return Tally(
            self.a + other.a,
            self.b + other.b,
            self.explained_in_both + other.explained_in_both,
            self.other_image + other.other_image,
            self.other_targets + other.other_targets,
            self.other_names + other.other_names,
        )


@dataclass(frozen=True)
class Pair:
    """One target of one record in both outputs."""

    a: Row
    b: Row
    is_right_a: bool | None
    """`Record.is_right` of A's record."""
    is_right_b: bool | None
    metrics: tuple[tuple[str, str, float, float], ...]
    """Evaluations with a value in both: metric, protocol, A's value, B's value."""


class Fragments:
    """The committed fragments of one output. Keeps the one read last, because the next unit may overlap it too."""

    def __init__(self, output: Output) -> None:
        self.output = output
        self.committed = {info.key for info in output.store.list("data/")}
        self.folders = evaluation_folders(output.store)
        self._last = lru_cache(maxsize=1)(self._read)

    def read(self, unit: Unit) -> FragmentRecords | None:
        """The records of the unit's fragment; None if it is not committed.

        Raises StoreError, and UnreconciledError for a damaged fragment.
        """
        return self._last(unit.ordinal)

    def _read(self, ordinal: int) -> FragmentRecords | None:
        unit = self.output.plan.units[ordinal]
        if unit.fragment_key not in self.committed:
            return None
        table = fragment_of(self.output.store, unit.fragment_key, COLUMNS)
        explained = table.filter(pc.field("status") == OK).to_pylist()
        values = self._values(unit)
        records = {
            key: Record({row["target"]: row for row in own}, values.get(key, {}))
            for key, own in groupby(explained, key=itemgetter("key"))
        }
        return FragmentRecords(records, len(table) - len(explained))  # a rejected record has one row

    def _values(self, unit: Unit) -> Mapping[str, dict[Value, float]]:
        """The evaluations' values of the unit's maps, by key; without the controls, which are other methods."""
        found: dict[str, dict[Value, float]] = {}
        for folder in self.folders:
            for row in self._evaluated(fragment_key(folder, unit)):
                if row["explainer"] == self.output.plan.identity["explainer"] and row["value"] is not None:
                    own = found.setdefault(row["key"], {})
                    own[row["target"], row["metric"], row["protocol"]] = row["value"]
        return found

    def _evaluated(self, key: str) -> list[Row]:
        names = ["key", "target", "explainer", "metric", "protocol", "value"]
        try:
            return values_in(self.output.store, key, names).to_pylist()
        except MissingError:
            return []


class Overlaps:
    """Finds the units of a plan that may share records with a unit of another plan: by object, then by range."""

    def __init__(self, plan: Plan) -> None:
        self.ranges: dict[str, list[tuple[int, int, int]]] = {}
        for unit in plan.units:
            start, stop = _range(unit)
            own = (stop, start, unit.ordinal)
            for info in unit.objects:
                self.ranges.setdefault(info.key, []).append(own)
        for every in self.ranges.values():
            every.sort()
        self.units = plan.units

    def of(self, unit: Unit) -> list[Unit]:
        """The overlapping units, in the plan's order."""
        return [self.units[ordinal] for ordinal in sorted(set(self._ordinals(unit)))]

    def _ordinals(self, unit: Unit) -> Iterator[int]:
        begin, end = _range(unit)
        for info in unit.objects:
            own = self.ranges.get(info.key, [])
            for place in range(bisect_right(own, begin, key=itemgetter(0)), len(own)):
                _, start, ordinal = own[place]
                if start >= end:
                    break
                yield ordinal


def _range(unit: Unit) -> tuple[int, int]:
    """The unit's range of records in each of its objects; an image file is one record."""
    return (0, 1) if unit.layout is Layout.IMAGES else (unit.start, unit.stop)


class Joining:
    """Joins the units of A with those of B that may share records; the two plans may be cut differently.

    In memory are one fragment of each output and one unit's pairs. What is found of a unit does not depend on the
    units before it.
    """

    def __init__(self, a: Output, b: Output) -> None:
        self.a, self.b = a, b
        self._of_a, self._of_b = Fragments(a), Fragments(b)
        self._overlaps, self._back = Overlaps(b.plan), Overlaps(a.plan)

    def pairs_of(self, unit: Unit, tally: Tally) -> list[Pair]:
        """The pairs of the records of a unit of A, which are counted, with those units of B that it is the first of.

        Raises StoreError, and UnreconciledError for a damaged fragment.
        """
        ours = self._of_a.read(unit)
        _count(tally.a, ours)
        pairs: dict[str, list[Pair]] = {}
        for other in self._overlaps.of(unit):
            is_first = self._back.of(other)[0].ordinal == unit.ordinal
            if ours is None and not is_first:
                continue
            theirs = self._of_b.read(other)
            if is_first:
                _count(tally.b, theirs)
            if ours is not None and theirs is not None:
                pairs |= _pairs(ours, theirs, tally)
        return [pair for key in (ours.records if ours else ()) for pair in pairs.get(key, ())]

    def count_rest(self, tally: Tally) -> None:
        """Counts the units of B that share nothing with a unit of A."""
        for unit in self.b.plan.units:
            if not self._back.of(unit):
                _count(tally.b, self._of_b.read(unit))


def _count(counts: Counts, fragment: FragmentRecords | None) -> None:
    if fragment is None:
        counts.open_units += 1
        return
    counts.explained += len(fragment.records)
    counts.rejected += fragment.num_rejected


def _pairs(ours: FragmentRecords, theirs: FragmentRecords, tally: Tally) -> dict[str, list[Pair]]:
    """The pairs of the records that both fragments hold, by key."""
    found: dict[str, list[Pair]] = {}
    for key in ours.records.keys() & theirs.records.keys():
        own = _record_pairs(ours.records[key], theirs.records[key])
        tally.explained_in_both += 1
        if own is None:
            tally.other_image += 1
            continue
        tally.other_targets += not own
        tally.other_names += sum(pair.a["target_name"] != pair.b["target_name"] for pair in own)
        found[key] = own
    return found


def _record_pairs(a: Record, b: Record) -> list[Pair] | None:
    """The pairs of the shared targets, in A's order; None if the images differ."""
    if _image_sha256(a) != _image_sha256(b):
        return None
    right = (a.is_right, b.is_right)
    return [
        Pair(row, b.rows[target], *right, tuple(_shared_metrics(a, b, target)))
        for target, row in a.rows.items()
        if target in b.rows
    ]


def _image_sha256(record: Record) -> str:
    return next(iter(record.rows.values()))["sha256"]


def _shared_metrics(a: Record, b: Record, target: str) -> Iterator[tuple[str, str, float, float]]:
    for (own, metric, protocol), value in sorted(a.values.items()):
        if own == target and (own, metric, protocol) in b.values:
            yield metric, protocol, value, b.values[own, metric, protocol]
