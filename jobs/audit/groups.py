"""Groups maps by label and prediction: a census that chooses the groups, and sums over each group's maps."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from blocksight.jobs.audit.result import GRID, MEASURES, Grid, Group, Spread
from blocksight.jobs.plan.text import counted as counted_text
from blocksight.storage.outputs.schema import OK, SCHEMA

Integers = NDArray[np.int64]

MAX_GROUPS = {"class": 2000, "predicted": 2000, "pair": 200}
"""Most groups of each kind; the largest are kept. A group needs 28 KiB of memory."""
BINS = 512
"""Bins of a measure's range, [0, 1]."""
QUANTILES = {"q05": 0.05, "q25": 0.25, "q50": 0.5, "q75": 0.75, "q95": 0.95}
CENSUS_COLUMNS = ("status", "label", "label_name", "target_index", "target_name", "target_source", "target_rank")
CENSUS_COLUMNS += ("target",)
"""Columns of an output's fragments that a census reads."""

_PARTS = 2**32
"""Measures are summed as integer multiples of 1 / _PARTS, so that sums are exact in any order."""
_PENDING_ROWS = 100_000
_NO_ROWS = pa.schema([SCHEMA.field(name) for name in CENSUS_COLUMNS]).empty_table()
_PLURALS = {"class": "labels", "predicted": "predicted classes", "pair": "pairs of a label and a wrong prediction"}


class GroupName(NamedTuple):
    """What the maps of a group have in common; see `Group`."""

    kind: str
    label: str | None
    predicted: str | None


# ---------------------------------------------------------------- the choice of groups


class Census:
    """Counts rows by label, explained class and outcome. Its memory grows with these, not with the rows."""

    def __init__(self) -> None:
        self._tables: list[pa.Table] = []

    def add(self, counts: pa.Table) -> None:
        """Adds a result of `counted`."""
        self._tables.append(counts)
        if sum(map(len, self._tables[1:])) > max(_PENDING_ROWS, len(self._tables[0])):
            self._tables = [self.table()]

    def table(self) -> pa.Table:
        """The counts of all rows, in the columns of `counted`."""
        return _summed(pa.concat_tables(self._tables), list(CENSUS_COLUMNS)) if self._tables else counted(_NO_ROWS)


def counted(rows: pa.Table) -> pa.Table:
    """One line per combination of `CENSUS_COLUMNS` in the rows; `count_all` is the number of rows that have it."""
    return rows.group_by(list(CENSUS_COLUMNS)).aggregate([([], "count_all")]).select([*CENSUS_COLUMNS, "count_all"])


def num_maps(counts: pa.Table) -> int:
    """The number of explained rows in a result of `counted`."""
    return _total(counts.filter(pc.field("status") == OK))


@dataclass(frozen=True, eq=False)
class Roster:
    """The totals of a census, and the groups that are kept."""

    num_rows: int
    num_maps: int
    """Explained rows."""
    num_right: int | None
    """Maps whose target is both the prediction and the label; None if no label is known."""
    num_targets: int
    """Explained classes, without further targets of a record, and targets that are no class."""
    names: tuple[GroupName, ...]
    """`all` first, then by kind, the largest first; equal sizes by name."""
    notes: tuple[str, ...]
    """Sentences that say which groups were left out."""

    @classmethod
    def of(cls, table: pa.Table) -> "Roster":
        """The roster of a census's table of all rows."""
        maps = table.filter(pc.field("status") == OK)
        top = maps.filter(pc.field("target_rank") == 1)
        is_same = pc.field("label") == pc.field("target_index")
        is_own = (pc.field("target_rank") == 1) | (pc.field("target_source") == "label")
        kinds = {
            "class": _ranked(maps.filter(is_own), ["label_name"]),
            "predicted": _ranked(top, ["target_name"]),
            "pair": _ranked(top.filter(~is_same), ["label_name", "target_name"]),  # without a label: null, no pair
        }
        has_labels = len(maps.filter(pc.field("label").is_valid())) > 0
        return cls(
            num_rows=_total(table),
            num_maps=num_maps(table),
            num_right=_total(top.filter(is_same)) if has_labels else None,
            num_targets=len(_summed(maps.filter(is_own), ["target_index"]))
            + len(_summed(maps.filter(pc.field("target_index").is_null()), ["target"])),
            names=(
                GroupName("all", None, None),
                *(name for kind, found in kinds.items() for name in _kept(kind, found)),
            ),
            notes=(
                *_of_no_class(_total(maps.filter(pc.field("target_index").is_null()))),
                *(
                    f"of {len(found)} {_PLURALS[kind]} the {MAX_GROUPS[kind]} with most maps are kept as groups"
                    for kind, found in kinds.items()
                    if len(found) > MAX_GROUPS[kind]
                ),
            ),
        )

    def members(self, rows: pa.Table) -> NDArray[np.int32]:
        """[N, 4]: indices into `names` of each explained row's groups, one per kind; -1 for none."""
        columns = [rows[name].to_pylist() for name in CENSUS_COLUMNS if name != "status"]
        indices = [[self._indices.get(name, -1) for name in _groups_of(*row)] for row in zip(*columns, strict=True)]
        return np.array(indices, np.int32).reshape(-1, len(MAX_GROUPS) + 1)

    @cached_property
    def _indices(self) -> dict[GroupName | None, int]:
        return {name: index for index, name in enumerate(self.names)}


def _of_no_class(count: int) -> Iterator[str]:
    """A sentence if maps explain no single class."""
    if count:
        yield (
            f"{counted_text(count, 'map')} of no single class (margin, differences and sums): measured with all maps, "
            "clustered by their target, and left out of classes and shortcuts"
        )


def is_own_class(target_source: str, target_rank: int | None) -> bool:
    """Whether a map explains its record's prediction or label, and not a further target."""
    return target_rank == 1 or target_source == "label"


def is_right(label: int | None, target_index: int | None, target_rank: int | None) -> bool | None:
    """Whether the explained class is the prediction and the label; None if no label is known."""
    return None if label is None or target_rank is None else target_rank == 1 and label == target_index


def _groups_of(
    label: int | None,
    label_name: str | None,
    target_index: int,
    target_name: str,
    target_source: str,
    target_rank: int,
    _target: str,
) -> tuple[GroupName | None, ...]:
    """The groups that a map belongs to, one per kind; None for a kind without one."""
    is_own = is_own_class(target_source, target_rank)
    is_pair = target_rank == 1 and label is not None and label != target_index
    return (
        GroupName("all", None, None),
        GroupName("class", label_name, None) if label_name is not None and is_own else None,
        GroupName("predicted", None, target_name) if target_rank == 1 else None,
        GroupName("pair", label_name, target_name) if is_pair else None,
    )


def _ranked(rows: pa.Table, names: list[str]) -> pa.Table:
    """The distinct combinations of some columns without nulls, the most frequent first."""
    counted = _summed(rows, names).drop_null()
    return counted.sort_by([("count_all", "descending"), *((name, "ascending") for name in names)])


def _kept(kind: str, ranked: pa.Table) -> Iterator[GroupName]:
    for row in ranked.slice(0, MAX_GROUPS[kind]).to_pylist():
        yield GroupName(kind, row.get("label_name"), row.get("target_name"))


def _summed(rows: pa.Table, names: list[str]) -> pa.Table:
    summed = rows.group_by(names).aggregate([("count_all", "sum")])
    return summed.select([*names, "count_all_sum"]).rename_columns([*names, "count_all"])


def _total(rows: pa.Table) -> int:
    return int(rows["count_all"].to_numpy().sum())


# ---------------------------------------------------------------- sums over groups


@dataclass(frozen=True, eq=False)
class GroupSums:
    """Integer sums over the maps of G groups, which do not depend on the order of the maps.

    They hold up to 2^31 maps.
    """

    counts: Integers
    """[G] numbers of maps."""
    pooled: Integers
    """[G, GRID * GRID] sums of the cells, which are 0 to 255."""
    squares: Integers
    """[G, GRID * GRID] sums of the cells' squares."""
    totals: Integers
    """[G, M] sums of each measure where it is defined, in units of 2^-32."""
    bins: NDArray[np.uint32]
    """[G, M, BINS] histogram of each measure; the last bin includes 1."""

    @classmethod
    def zeros(cls, num_groups: int) -> "GroupSums":
        """The sums of no map."""
        cells = (num_groups, GRID * GRID)
        return cls(
            np.zeros(num_groups, np.int64),
            np.zeros(cells, np.int64),
            np.zeros(cells, np.int64),
            np.zeros((num_groups, len(MEASURES)), np.int64),
            np.zeros((num_groups, len(MEASURES), BINS), np.uint32),
        )

    def add(self, members: NDArray[np.int32], pooled: NDArray[np.uint8], values: NDArray[np.float64]) -> None:
        """Adds N maps in place: their groups [N, K] (-1: none), cells [N, GRID, GRID] and measures [N, M] (NaN: not
        defined)."""
        cells = pooled.reshape(-1, GRID * GRID).astype(np.int64)
        is_defined = ~np.isnan(values)
        filled = np.where(is_defined, values, 0.0)
        parts = np.rint(filled * _PARTS).astype(np.int64)
        places = np.clip((filled * BINS).astype(np.int64), 0, BINS - 1) + BINS * np.arange(values.shape[1])
        flat = self.bins.reshape(len(self.counts), -1)
        for groups in members.T:
            chosen = np.flatnonzero(groups >= 0)
            order = chosen[np.argsort(groups[chosen], kind="stable")]
            own, starts = np.unique(groups[order], return_index=True)
            if not len(own):
                continue
            self.counts[own] += np.diff(starts, append=len(order))
            self.pooled[own] += np.add.reduceat(cells[order], starts)
            self.squares[own] += np.add.reduceat(cells[order] ** 2, starts)
            self.totals[own] += np.add.reduceat(parts[order], starts)
            rows, columns = np.nonzero(is_defined[order])
            np.add.at(flat, (groups[order][rows], places[order][rows, columns]), np.uint32(1))

    def __add__(self, other: "GroupSums") -> "GroupSums":
        """Adds the sums of the same groups. Raises ValueError if the numbers of groups differ."""
        if len(self.counts) != len(other.counts):
            raise ValueError(f"sums of {len(self.counts)} and {len(other.counts)} groups do not add up")
        return GroupSums(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))

    def groups(self, names: Sequence[GroupName]) -> Iterator[Group]:
        """Yields the groups; `names` are theirs, in order."""
        for place, name in enumerate(names):
            mean, variance = self._maps(place)
            yield Group(
                *name,
                count=int(self.counts[place]),
                spreads=dict(self._spreads(place)),
                mean_map=mean,
                variance_map=variance,
            )

    def _maps(self, place: int) -> tuple[Grid, Grid]:
        count = max(1, int(self.counts[place]))
        mean = self.pooled[place] / (255 * count)
        variance = self.squares[place] / (255**2 * count) - mean**2
        return tuple(grid.reshape(GRID, GRID).astype(np.float32) for grid in (mean, np.maximum(variance, 0)))

    def _spreads(self, place: int) -> Iterator[tuple[str, Spread]]:
        for column, name in enumerate(MEASURES):
            bins = self.bins[place, column].astype(np.int64)
            count = int(bins.sum())
            if count:
                quantiles = {short: _quantile(bins, share) for short, share in QUANTILES.items()}
                yield name, Spread(float(self.totals[place, column] / _PARTS / count), **quantiles, count=count)


def _quantile(bins: Integers, share: float) -> float:
    """The quantile, interpolated as by `np.quantile`; the maps of a bin count as evenly spaced in it."""
    cumulative = np.cumsum(bins)
    wanted = share * (cumulative[-1] - 1)
    below, above = int(np.floor(wanted)), int(np.ceil(wanted))
    first, second = (_value_at_rank(bins, cumulative, rank) for rank in (below, above))
    return first + (wanted - below) * (second - first)


def _value_at_rank(bins: Integers, cumulative: Integers, rank: int) -> float:
    """The value of the map with this rank, from 0."""
    index = int(np.searchsorted(cumulative, rank, side="right"))
    return (index + (rank - (cumulative[index] - bins[index]) + 0.5) / bins[index]) / BINS
