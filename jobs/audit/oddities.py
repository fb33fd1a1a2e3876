"""Finds oddities: maps unlike those of their class, and right predictions whose maps are off the object."""

from collections import Counter
from collections.abc import Iterator, Mapping
from heapq import heappush, heappushpop
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from blocksight.jobs.audit.clusters import NO_CLUSTER, ClassModel
from blocksight.jobs.audit.result import GRID, ROWS, Oddity
from blocksight.jobs.audit.samples import target_number

OUTLIER, STRANGE = "outlier", "right for a strange reason"
KEPT = 50
"""Oddities that are kept of each reason: the oddest."""
OFF_OBJECT = 1 / 3
"""A map is off the object if its share there is below this part of its class's median."""
MIN_TYPICAL = 0.1
"""A class with a lower median share on the object has no map off the object."""

Row = Mapping[str, Any]


def with_clusters(rows: pa.Table, models: Mapping[int, ClassModel]) -> pa.Table:
    """Rows of `ROWS` with `cluster` and `strangeness` filled in.

    Both are null for flat maps, for maps of a record's further classes, and for targets without a sample.
    """
    clusters = np.full(len(rows), NO_CLUSTER, np.int16)
    strangeness = np.full(len(rows), np.nan, np.float32)
    targets = np.array(_numbers(rows), np.int64)
    is_taken = rows["is_own_class"].to_numpy(zero_copy_only=False) | (targets < 0)
    usable = ~rows["is_flat"].to_numpy(zero_copy_only=False) & is_taken
    pooled = np.frombuffer(b"".join(rows["pooled"].to_pylist()), np.uint8).reshape(-1, GRID, GRID)
    for target in np.unique(targets[usable]).tolist():
        if target in models:
            own = np.flatnonzero(usable & (targets == target))
            clusters[own], strangeness[own] = models[target].place(pooled[own])
    filled = {
        "cluster": pa.array(clusters, pa.int16(), mask=clusters == NO_CLUSTER),
        "strangeness": pa.array(strangeness, pa.float32(), mask=np.isnan(strangeness)),
    }
    for name, column in filled.items():
        rows = rows.set_column(rows.schema.get_field_index(name), ROWS.field(name), column)
    return rows


def _numbers(rows: pa.Table) -> list[int]:
    """Each row's `target_number`."""
    pairs = zip(rows["target_index"].to_pylist(), rows["target"].to_pylist(), strict=True)
    return [target_number(*pair) for pair in pairs]


class OddestMaps:
    """Keeps the oddest maps of classes, at most `KEPT` of each reason, and counts the maps of each cluster."""

    def __init__(self, models: Mapping[int, ClassModel], typical_on_object: Mapping[int, float]) -> None:
        """`typical_on_object`: by class the median share of its maps on the object, if known."""
        self.models, self.typical_on_object = models, typical_on_object
        self.sizes: Counter[tuple[int, int]] = Counter()
        """Number of maps by class and cluster, `NO_CLUSTER` included."""
        self.found: Counter[str] = Counter()
        """Number of oddities by reason, including those that are not kept."""
        self._held: dict[str, list[tuple[float, str, int, Oddity]]] = {OUTLIER: [], STRANGE: []}

    def add(self, rows: pa.Table) -> None:
        """Adds rows that `with_clusters` returned."""
        counted = rows.filter(rows["strangeness"].is_valid())
        clusters = counted["cluster"].fill_null(NO_CLUSTER).to_pylist()
        self.sizes.update(zip(_numbers(counted), clusters, strict=True))
        counted = counted.filter(counted["target_index"].is_valid())
        for row in counted.filter(pa.array(self._may_be_odd(counted))).drop(["pooled"]).to_pylist():
            for oddity in self._odd(row):
                self.found[oddity.reason] += 1
                self._keep(oddity)

    def oddities(self) -> tuple[Oddity, ...]:
        """The kept oddities, the oddest of each reason first."""
        return tuple(one for own in self._held.values() for *_, one in sorted(own, reverse=True))

    def _may_be_odd(self, rows: pa.Table) -> NDArray[np.bool_]:
        targets = rows["target_index"].to_pylist()
        limits = np.array([self.models[target].limit for target in targets])
        least = np.array([self._least_on_object(target) for target in targets])
        off = rows["on_object"].to_numpy(zero_copy_only=False) < least
        return (rows["strangeness"].to_numpy() > limits) | off

    def _least_on_object(self, target: int) -> float:
        """The share on the object below which a map of this class is off it; 0 if the class has no limit."""
        typical = self.typical_on_object.get(target, 0.0)
        return OFF_OBJECT * typical if typical >= MIN_TYPICAL else 0.0

    def _odd(self, row: Row) -> Iterator[Oddity]:
        """Yields the row's oddity, if any: `STRANGE` if the prediction is right, else `OUTLIER`."""
        target, strangeness = row["target_index"], row["strangeness"]
        far = f"{strangeness:.1f} times as far from its class's maps as they are from each other"
        is_far = strangeness > self.models[target].limit
        on_object = row["on_object"]
        is_off = on_object is not None and on_object < self._least_on_object(target)
        off = (
            f"{on_object:.0%} of the map on the object, usual are {self.typical_on_object[target]:.0%}"
            if is_off
            else None
        )
        if row["is_right"] and (is_far or is_off):
            yield _oddity(row, STRANGE, "; ".join(reason for reason in (off, far if is_far else None) if reason))
        elif is_far:
            yield _oddity(row, OUTLIER, far)

    def _keep(self, oddity: Oddity) -> None:
        held = self._held[oddity.reason]
        entry = (oddity.strength, oddity.key, oddity.target_index, oddity)
        (heappush if len(held) < KEPT else heappushpop)(held, entry)


def _oddity(row: Row, reason: str, detail: str) -> Oddity:
    named = {name: row[name] for name in ("key", "target_index", "target_name", "score")}
    return Oddity(**named, label=row["label_name"], reason=reason, detail=detail, strength=row["strangeness"])
