"""Localisation: does a map lie on the object? EBPG, mIoU, Bbox and the pointing game (SISE's paper, section 4)."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from blocksight.engine.metrics.metric import TIES, MapMetric, Region, Value, ranks_of, undefined
from blocksight.engine.saliency import FLAT, Map, is_flat

IOU_FRACTION = 0.2
POINTING_TOLERANCE = 15 / 224
"""Of the shorter side: 15 pixels at 224 (Zhang et al., IJCV 2018)."""


class Localisation(MapMetric):
    """All four: undefined for a flat map, and for a record without a region."""

    names = ("ebpg", "miou", "bbox", "pointing")

    def __init__(self, truth: Mapping[str, Any]) -> None:
        """`truth` describes, as plain values, the source of the regions; it is part of the protocol."""
        self.truth = truth

    def details(self) -> Mapping[str, Any]:
        return {
            **self.truth,
            "region": "union of the target's objects at the map's size",
            "miou_fraction": IOU_FRACTION,
            "pointing_tolerance": POINTING_TOLERANCE,
            "ties": TIES,
        }

    def of(self, saliency_hw: Map, region: Region | str | None) -> Mapping[str, Value]:
        if isinstance(region, str):
            return dict.fromkeys(self.names, undefined(region))
        if region is None or not region.any():
            return dict.fromkeys(self.names, undefined("no ground truth for the target"))
        if is_flat(saliency_hw):
            return dict.fromkeys(self.names, undefined(FLAT))
        return {
            "ebpg": Value(100 * ebpg(saliency_hw, region)),
            "miou": Value(100 * iou_of_top(saliency_hw, region, IOU_FRACTION)),
            "bbox": Value(100 * share_of_top(saliency_hw, region)),
            "pointing": Value(100.0 * hits(saliency_hw, region, POINTING_TOLERANCE * min(saliency_hw.shape))),
        }


def ebpg(saliency_hw: Map, region: Region) -> float:
    """`sum(S G) / sum(S)` for S at least 0 and not all 0: the share of the energy inside, 0 to 1."""
    return float(saliency_hw[region].sum() / saliency_hw.sum())


def iou_of_top(saliency_hw: Map, region: Region, fraction: float) -> float:
    """Intersection over union of the region and the greatest floor(fraction H W) pixels, 0 to 1."""
    top = ranks_of(saliency_hw) < int(fraction * saliency_hw.size)
    return float((top & region).sum() / (top | region).sum())


def share_of_top(saliency_hw: Map, region: Region) -> float:
    """Of the greatest pixels, as many as the region has, the share inside it, 0 to 1 (the paper's Bbox)."""
    count = int(region.sum())
    return float(region[ranks_of(saliency_hw) < count].sum() / count)


def hits(saliency_hw: Map, region: Region, tolerance: float) -> bool:
    """True if the region comes within `tolerance` pixels of the greatest value's position; ties by `TIES`."""
    row, column = np.argwhere(ranks_of(saliency_hw) == 0)[0]
    rows, columns = np.nonzero(region)
    return bool((np.hypot(rows - row, columns - column) <= tolerance).any())
