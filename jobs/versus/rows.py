"""One row of a difference: a target of a record under A and under B, and how their maps differ."""

from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from blocksight.engine.metrics.complexity import effective_area
from blocksight.engine.metrics.shift import focus_shift, moved
from blocksight.engine.metrics.similarity import iou_of_tops, pearson, spearman, ssim
from blocksight.engine.saliency import Map, is_flat
from blocksight.jobs.ledger.output import map_of
from blocksight.jobs.versus.joining import Pair, Row
from blocksight.storage.images.fitting import Fitting
from blocksight.storage.outputs.pictures import resized

SCORE_FELL = 0.2
"""Without a label, a record regressed if its target's probability falls by this much or more."""
RANK_FELL = 6
"""Without a label, a record also regressed if A's prediction falls to this rank or below."""
LEVELS = 255

MEASURES = {
    "score_change": "score of B less that of A, -1 to 1",
    "pearson": "correlation of the maps' pixels, -1 to 1",
    "spearman": "correlation of the pixels' ranks, -1 to 1",
    "ssim": "structural similarity of the maps, at most 1",
    "iou": "overlap of the maps' top 15 % of pixels, 0 to 1",
    "moved": "share of the map's mass that lies elsewhere, on 16 x 16 cells, 0 to 1",
    "focus_shift": "distance of the centres of mass as a share of the picture's diagonal, 0 to 1",
    "area_change": "effective area of B's map less that of A's, -1 to 1",
    "drop_change": "Drop of B less that of A, in points, under one protocol",
}
"""The measured differences; null where not defined, as map measures are where a map is flat."""

JUDGEMENTS = {
    "regressed": f"judged by label: A is right and B is wrong; by score: it fell by {SCORE_FELL} or more, or A's "
    f"prediction has rank {RANK_FELL} or worse under B",
    "improved": "the reverse",
    "looks_elsewhere": "`spearman` is unusually low, by the rule that stands in `summary.json`; null: a flat map",
    "regressed_and_looks_elsewhere": "both; null: a flat map",
}

VALUES = pa.list_(
    pa.struct([("metric", pa.string()), ("protocol", pa.string()), ("a", pa.float64()), ("b", pa.float64())])
)
KINDS: dict[str, tuple[pa.DataType, str]] = {
    "key": (pa.string(), "the record's name"),
    "sha256": (pa.string(), "of the image's bytes, hex"),
    "label_name": (pa.string(), "as the data set writes it"),
    "target": (pa.string(), "what is explained, as the outputs' rows say it"),
    "target_index": (pa.int32(), "class that is explained; null where the target is of no single class"),
    "target_name": (pa.string(), "its name under A"),
    "score_a": (
        pa.float64(),
        "score of the target under A, as A's job read it: a probability, 0 to 1, unless the model's output itself",
    ),
    "score_b": (pa.float64(), "and under B"),
    "rank_a": (pa.int32(), "place of the target among A's classes, 1 is the prediction; null where it is none"),
    "rank_b": (pa.int32(), "and among B's"),
    "is_right_a": (pa.bool_(), "A's prediction is the label; null where nothing tells"),
    "is_right_b": (pa.bool_(), "B's prediction is"),
    "drop_a": (pa.float64(), "percent, as `explain` measured it"),
    "drop_b": (pa.float64(), "percent"),
    **{name: (pa.float64(), meaning) for name, meaning in MEASURES.items()},
    "metrics": (VALUES, "of evaluations: what both outputs hold under one protocol"),
    "judged_by": (pa.string(), "label, or score where it is not known whether both predictions are right"),
    "regressed": (pa.bool_(), JUDGEMENTS["regressed"]),
    "improved": (pa.bool_(), JUDGEMENTS["improved"]),
}


def _schema(kinds: dict[str, tuple[pa.DataType, str]]) -> pa.Schema:
    return pa.schema([pa.field(name, kind, metadata={"meaning": meaning}) for name, (kind, meaning) in kinds.items()])


MEASURED = _schema(KINDS)
"""The columns that need one row alone, without the typical range of all rows."""
LOOKS = ("looks_elsewhere", "regressed_and_looks_elsewhere")
DIFFERENCE = _schema({**KINDS, **{name: (pa.bool_(), JUDGEMENTS[name]) for name in LOOKS}})
"""The columns of a difference."""


def measured(pair: Pair, resize: str) -> dict[str, Any]:
    """The row with the columns of `MEASURED`. `resize`: how images were fitted to the model's input."""
    a, b = pair.a, pair.b
    one_drop, other_drop = (row["metrics"]["drop"] for row in (a, b))
    is_same = a["metrics"]["protocol"] == b["metrics"]["protocol"]
    has_labels = pair.is_right_a is not None and pair.is_right_b is not None
    return {
        **{name: a[name] for name in ("key", "sha256", "label_name", "target", "target_index", "target_name")},
        "score_a": a["score"],
        "score_b": b["score"],
        "rank_a": a["target_rank"],
        "rank_b": b["target_rank"],
        "is_right_a": pair.is_right_a,
        "is_right_b": pair.is_right_b,
        "drop_a": one_drop,
        "drop_b": other_drop,
        "score_change": b["score"] - a["score"],
        "drop_change": other_drop - one_drop if is_same and None not in (one_drop, other_drop) else None,
        **map_measures(a, b, resize),
        "metrics": [dict(zip(("metric", "protocol", "a", "b"), own, strict=True)) for own in pair.metrics],
        "judged_by": "label" if has_labels else "score",
        "regressed": _fell(a, b, pair.is_right_a, pair.is_right_b),
        "improved": _fell(b, a, pair.is_right_b, pair.is_right_a),
    }


def _fell(before: Row, after: Row, was_right: bool | None, is_right: bool | None) -> bool:
    """Whether the record regressed: judged by the label, or without one by the target's score and rank."""
    if was_right is not None and is_right is not None:
        return was_right and not is_right
    rank_fell = before["target_rank"] == 1 and (after["target_rank"] or 0) >= RANK_FELL
    return before["score"] - after["score"] >= SCORE_FELL or rank_fell


def map_measures(a: Row, b: Row, resize: str) -> dict[str, float | None]:
    """How the two maps differ, by measure; B's is resized to A's size. All are None if either map is flat."""
    names = ("pearson", "spearman", "ssim", "iou", "moved", "focus_shift", "area_change")
    levels, other_levels = _levels(a, b)
    if is_flat(levels) or is_flat(other_levels):
        return dict.fromkeys(names)
    one, other = (own.astype(np.float64) / LEVELS for own in (levels, other_levels))
    proportions = (a["height"], a["width"]) if Fitting.parse(resize).is_whole else (1, 1)  # a crop is square
    values = (
        pearson(one, other),
        spearman(levels, other_levels),  # integers have the same order and sort faster
        ssim(one, other),
        iou_of_tops(levels, other_levels),
        moved(one, other),
        focus_shift(one, other, proportions),
        effective_area(other) - effective_area(one),
    )
    return dict(zip(names, values, strict=True))


def _levels(a: Row, b: Row) -> tuple[Map, Map]:
    """Both maps as integer grey levels, 0 to 255, at A's size."""
    one, other = (map_of(row) for row in (a, b))
    if other.shape != one.shape:
        other = resized(other, one.shape)
    return _as_levels(one), _as_levels(other)


def _as_levels(saliency_hw: NDArray[np.float32]) -> Any:
    return np.rint(LEVELS * saliency_hw).astype(np.int16)
