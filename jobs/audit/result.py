"""The result of an audit and its files in the output: one JSON document, and Parquet tables."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from typing_extensions import TypedDict

from blocksight.jobs.ledger.output import table_of
from blocksight.jobs.plan.documents import damaged, read_document
from blocksight.jobs.plan.records import Count
from blocksight.storage.parquet.rows import parquet_of_rows
from blocksight.storage.stores.store import MissingError, ObjectStore

FOLDER = "audit/"
AUDIT_KEY = f"{FOLDER}audit.json"
GROUPS_KEY = f"{FOLDER}groups.parquet"
CLUSTERS_KEY = f"{FOLDER}clusters.parquet"
ROWS_FOLDER = f"{FOLDER}rows/"

GRID = 16
"""Cells along each side of a pooled map."""

CERTAIN = 0.05
MIN_EFFECT = 1.0
"""Least effect of a finding in log-odds, beyond that of random regions: the odds change by a factor e."""

Grid = NDArray[np.float32]
"""[GRID, GRID]."""

Standing = Literal["finding", "suspicion", "not confirmed"]
"""A finding passed its trial and is not the object. A suspicion was not tried, or may be the object. The trial of a
region that is not confirmed showed no effect, or too small a one."""

MEASURES = {
    "entropy": "how evenly the map is spread, 0 one pixel, 1 even",
    "gini": "how unequal its values are, 0 even, 1 one pixel",
    "effective_area": "share of the picture that an even map with the same spread would cover, 0 to 1",
    "border_mass": "share of the map in the outer tenth of the picture along each side; 0.36 for an even map",
    "corner_mass": "share of the map in the four corner fifths; 0.16 for an even map",
    "centre_x": "centre of mass from the left, 0 to 1",
    "centre_y": "centre of mass from the top, 0 to 1",
    "checkerboard": "share of the map's variation that alternates from pixel to pixel, 0 to 1",
    "on_object": "share of the map on the target's object, 0 to 1; needs ground truth",
    "on_context": "share within a tenth of the picture around the object, 0 to 1; needs ground truth",
    "elsewhere": "share beyond that, 0 to 1; needs ground truth",
}
"""Measures of a map that is not flat, with their meanings."""

GATES = {
    "flat": "the map is constant: it says nothing",
    "saturated": "more than half of the map lies within 1 % of its greatest value",
    "border only": "most of the map lies at the picture's border",
    "checkerboard": "the map alternates from pixel to pixel, as upsampling or strides leave it",
    "equal": "another image has the very same map",
}
"""Validity gates: reasons why a map may be unusable, by name."""


@dataclass(frozen=True)
class Spread:
    """The distribution of a measure over a group's maps; quantiles are exact to 1/512 of the measure's range."""

    mean: float
    q05: float
    q25: float
    q50: float
    q75: float
    q95: float
    count: int
    """Maps for which the measure is defined."""


@dataclass(frozen=True, eq=False)
class Group:
    """Maps with a common label or prediction."""

    kind: str
    """`all`, `class` (one label), `predicted` (one prediction), or `pair` (one label taken for another class).

    Maps of a record's further targets count in `all` alone.
    """
    label: str | None
    """The common label, as the data set writes it."""
    predicted: str | None
    """The common predicted class."""
    count: int
    spreads: Mapping[str, Spread]
    """By measure, without measures that no map of the group has."""
    mean_map: Grid
    """Mean of the maps, which are in [0, 1]; zeros if all are flat."""
    variance_map: Grid
    """Variance of the maps in each cell."""


@dataclass(frozen=True, eq=False)
class Cluster:
    """Maps of one explained class, or of one target that is no class, that are alike."""

    target_index: int | None
    """None for a target that is no class."""
    target_name: str
    number: int
    """0 is the largest cluster of the class."""
    count: int
    """Maps of the class that belong to it."""
    share: float
    """Share of the class's maps that belong to it."""
    stability: float
    """Mean adjusted Rand index of clusterings of resampled maps, at most 1; the same for all clusters of a class."""
    mean_map: Grid
    examples: tuple[str, ...]
    """Keys of the maps nearest to its centre."""
    target: str = ""
    """The target, where it is no class."""

    @property
    def join_key(self) -> str:
        """What rows call the target."""
        return self.target or str(self.target_index)


@dataclass(frozen=True)
class Oddity:
    """A map that is unlike those of its class."""

    key: str
    target_index: int
    target_name: str
    label: str | None
    score: float
    """Score of the target."""
    reason: str
    """`outlier`, or `right for a strange reason`: the prediction is right, but the map is odd."""
    detail: str
    """The reason in words, with figures."""
    strength: float
    """The map's strangeness; see `ROWS`."""


Scale = Literal["log-odds", "outputs"]


@dataclass(frozen=True)
class Effect:
    """An intervention's change of the target's log-odds, minus that with random regions of the same size.

    Of a model whose output is read as it is (`--readout identity`) it is the change of that output.
    """

    mean: float
    low: float
    """Lower end of the 95 % interval by bootstrap over images."""
    high: float
    p_value: float
    """Of the paired t test over images, Holm-corrected over all trials of the audit."""
    count: int
    """Number of images."""
    probability: float | None
    """Mean change of the target's probability by the region alone, -1 to 1, not compared with random regions; None for
    an output that is no probability."""
    scale: Scale = "log-odds"
    """What `mean`, `low` and `high` are differences of."""

    @property
    def direction(self) -> Literal["more", "less", "unclear"]:
        """Whether the effect is more or less than that of random regions.

        It is unclear unless mean, interval and p-value all agree.
        """
        if self.p_value < CERTAIN and min(self.low, self.mean) > 0:
            return "more"
        if self.p_value < CERTAIN and max(self.high, self.mean) < 0:
            return "less"
        return "unclear"

    @property
    def is_real(self) -> bool:
        """Whether the effect is certain, in a shortcut's direction, and large enough for a finding."""
        return self.direction == "more" and self.mean >= MIN_EFFECT


@dataclass(frozen=True)
class Shortcut:
    """A region that a class's maps often point at, with its standing."""

    target_index: int
    target_name: str
    source: str
    """The mean map that the candidate was found in: `class`, or `cluster N`."""
    box: tuple[float, float, float, float]
    """Left, top, right, bottom as shares of the picture."""
    share: float
    """Share of the class's maps that point there."""
    recurrence: float | None
    """How well its pixels alone tell members from other images, 0.5 to 1 (area under the ROC curve)."""
    density: float
    """Mean density in the region of the class's (or the cluster's) maps, 1 for an even map."""
    elsewhere_density: float
    """Mean density in the region of other classes' maps."""
    on_object: float | None
    """Share of the region that the members' objects cover; None without ground truth."""
    blanked: Effect | None
    """Effect of inpainting the region in members: how much more their log-odds fall."""
    pasted: Effect | None
    """Effect of pasting the region into other images: how much more their log-odds rise."""
    is_confirmed: bool
    """Whether it is a finding."""
    why: str
    """What confirms it, or what is missing, in words."""
    members: tuple[str, ...]
    """Keys of a random sample of the records whose maps point there."""
    other_classes: tuple[str, ...] = ()
    """Names of the classes that the images with the pasted region were explained for; empty in older audits."""

    @property
    def standing(self) -> Standing:
        """What the trial says of it."""
        if self.is_confirmed:
            return "finding"
        tried = [effect for effect in (self.blanked, self.pasted) if effect is not None]
        return "suspicion" if all(effect.is_real for effect in tried) else "not confirmed"


@dataclass(frozen=True, eq=False)
class Audit:
    """The result of an audit."""

    fragments: str
    """Digest of the fragments that were read; if the output's is another one, the audit is out of date."""
    settings: Mapping[str, Any]
    """The request: digest of the ground truth, class map, seed, whether candidates were tried on the model."""
    num_rows: int
    num_maps: int
    """Explained rows."""
    num_rejected: int
    num_right: int | None
    """Maps whose target is both the prediction and the label; None if no label is known."""
    gates: Mapping[str, int]
    """Number of maps that each gate stops."""
    groups: tuple[Group, ...]
    """`all` first; then by kind, the largest first."""
    clusters: tuple[Cluster, ...]
    """Class by class; a class may have none."""
    oddities: tuple[Oddity, ...]
    """The oddest first."""
    shortcuts: tuple[Shortcut, ...]
    """Findings first, then suspicions, then what was not confirmed; in each the strongest first."""
    notes: tuple[str, ...]
    """Sentences that say what was left out, and why."""

    @property
    def findings(self) -> tuple[Shortcut, ...]:
        """The confirmed shortcuts."""
        return tuple(one for one in self.shortcuts if one.is_confirmed)

    @property
    def suspicions(self) -> tuple[Shortcut, ...]:
        """The shortcuts that were not tried, or passed their trial but may be the object."""
        return tuple(one for one in self.shortcuts if one.standing == "suspicion")

    @property
    def not_confirmed(self) -> tuple[Shortcut, ...]:
        """The regions whose trial showed no effect, or too small a one."""
        return tuple(one for one in self.shortcuts if one.standing == "not confirmed")


class AuditDocument(TypedDict):
    """The content of `audit.json`: an `Audit` without groups and clusters, which are tables."""

    fragments: str
    settings: dict[str, Any]
    num_rows: Count
    num_maps: Count
    num_rejected: Count
    num_right: Count | None
    gates: dict[str, Count]
    oddities: tuple[Oddity, ...]
    shortcuts: tuple[Shortcut, ...]
    notes: tuple[str, ...]


def write_audit(store: ObjectStore, audit: Audit) -> None:
    """Writes the tables, then the document: if that exists, the tables do too. Raises StoreError."""
    store.put(GROUPS_KEY, parquet_of_rows(map(_group_row, audit.groups), GROUPS))
    store.put(CLUSTERS_KEY, parquet_of_rows(map(_cluster_row, audit.clusters), CLUSTERS))
    plain = {name: value for name, value in vars(audit).items() if name not in ("groups", "clusters")}
    body = {
        **plain,
        "oddities": [asdict(one) for one in audit.oddities],
        "shortcuts": [asdict(one) for one in audit.shortcuts],
    }
    store.put(AUDIT_KEY, (json.dumps(body, indent=1, sort_keys=True) + "\n").encode())


def read_audit(store: ObjectStore) -> Audit | None:
    """The output's audit, or None if there is none. Raises StoreError, and UnreconciledError if it is damaged."""
    try:
        body = read_document(store, AUDIT_KEY, AuditDocument)
    except MissingError:
        return None
    try:
        groups = table_of(store, GROUPS_KEY, GROUPS).to_pylist()
        clusters = table_of(store, CLUSTERS_KEY, CLUSTERS).to_pylist()
        return Audit(
            **{
                **body,
                "groups": tuple(_group(row) for row in groups),
                "clusters": tuple(_cluster(row) for row in clusters),
            }
        )
    except (ValueError, MissingError) as error:
        raise damaged(store.uri, AUDIT_KEY, error) from error


GRID_LIST = pa.list_(pa.float32(), GRID * GRID)
SPREAD = pa.struct(
    [(name, pa.float64()) for name in ("mean", "q05", "q25", "q50", "q75", "q95")] + [("count", pa.int64())]
)

GROUPS = pa.schema(
    [
        ("kind", pa.string()),
        ("label", pa.string()),
        ("predicted", pa.string()),
        ("count", pa.int64()),
        *((name, SPREAD) for name in MEASURES),
        ("mean_map", GRID_LIST),
        ("variance_map", GRID_LIST),
    ]
)
"""Schema of the groups: `MEASURES` are structs, grids are lists, row by row from the top left."""

CLUSTERS = pa.schema(
    [
        ("target_index", pa.int32()),
        ("target_name", pa.string()),
        ("number", pa.int32()),
        ("count", pa.int64()),
        ("share", pa.float64()),
        ("stability", pa.float64()),
        ("mean_map", GRID_LIST),
        ("examples", pa.list_(pa.string())),
        ("target", pa.string()),
    ]
)

ROWS = pa.schema(
    [
        ("key", pa.string()),
        ("target_index", pa.int32()),
        ("target", pa.string()),
        ("target_name", pa.string()),
        ("label_name", pa.string()),
        ("is_right", pa.bool_()),
        ("is_own_class", pa.bool_()),
        ("score", pa.float64()),
        *((name, pa.float32()) for name in MEASURES),
        ("is_flat", pa.bool_()),
        ("is_saturated", pa.bool_()),
        ("is_border_only", pa.bool_()),
        ("is_checkerboard", pa.bool_()),
        ("equals_other", pa.bool_()),
        ("cluster", pa.int16()),
        ("strangeness", pa.float32()),
        ("pooled", pa.binary(GRID * GRID)),
    ]
)
"""Schema of the rows, one per map; `audit/rows/` holds a file per fragment.

`is_own_class`: the explained class is the prediction, or was chosen by the label; only these maps, and those of targets
that are no class, have `cluster` and `strangeness`. `pooled` is the map in 16 x 16 cells of 0 to 255. `strangeness` is
the map's distance from the fifth nearest of its target's sampled maps, divided by the median of those maps' own
distances.
"""


def _group_row(group: Group) -> dict[str, Any]:
    spreads = {name: asdict(spread) for name, spread in group.spreads.items()}
    named = {name: getattr(group, name) for name in ("kind", "label", "predicted", "count")}
    return {**named, **spreads, **_grids(group)}


def _group(row: Mapping[str, Any]) -> Group:
    spreads = {name: Spread(**_without_nulls(row[name])) for name in MEASURES if row[name] is not None}
    named = {name: row[name] for name in ("kind", "label", "predicted", "count")}
    _without_nulls({name: row[name] for name in ("kind", "count", "mean_map", "variance_map")})
    return Group(**named, spreads=spreads, mean_map=_grid(row["mean_map"]), variance_map=_grid(row["variance_map"]))


def _without_nulls(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """The row. Raises ValueError if it has a null."""
    empty = [name for name, value in row.items() if value is None]
    if empty:
        raise ValueError(f"a row of its tables lacks {', '.join(empty)}")
    return row


def _cluster_row(cluster: Cluster) -> dict[str, Any]:
    return {**vars(cluster), "mean_map": cluster.mean_map.ravel(), "target": cluster.join_key}


def _cluster(row: Mapping[str, Any]) -> Cluster:
    _without_nulls({name: value for name, value in row.items() if name != "target_index"})
    named = {**row, "target": "" if row["target_index"] is not None else row["target"]}
    return Cluster(**{**named, "mean_map": _grid(row["mean_map"]), "examples": tuple(row["examples"])})


def _grids(group: Group) -> dict[str, Any]:
    return {"mean_map": group.mean_map.ravel(), "variance_map": group.variance_map.ravel()}


def _grid(values: Sequence[float]) -> Grid:
    return np.array(values, np.float32).reshape(GRID, GRID)
