"""The regions of a saliency map: what lies above a threshold, smoothed before, as connected parts."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from blocksight.engine.saliency import Map, minmax, otsu_foreground

Threshold = Literal["otsu", "share", "energy"]
Parts = Literal["largest", "all"]

FORMS = "otsu, share:0.2 (the most salient fifth of the pixels) or energy:0.5 (the pixels that hold half of the map)"
WRITTEN = re.compile(r"(share|energy):(0?\.\d+|0|1|1\.0*)")
EIGHT_NEIGHBOURS = np.ones((3, 3), np.bool_)
MAX_SMOOTH = 100.0
MAX_PARTS = 100
"""Parts of one map that are listed, the largest first; smoothing leaves fewer."""


@dataclass(frozen=True)
class RegionRule:
    """How regions are cut out of a map; every field changes the result."""

    threshold: Threshold = "otsu"
    amount: float | None = None
    """The share of the pixels, or of the map's sum, in (0, 1); None for Otsu."""
    parts: Parts = "largest"
    smooth: float = 0.0
    """Standard deviation of a Gaussian over the map before the threshold, in the map's pixels; 0: none."""

    @classmethod
    def parse(cls, threshold: str, parts: Parts = "largest", smooth: float = 0.0) -> "RegionRule":
        """The rule of a threshold as people write it. Raises ValueError with the known forms."""
        if not 0 <= smooth <= MAX_SMOOTH:
            raise ValueError(f"smooth {smooth:g} is not from 0 to {MAX_SMOOTH:g} pixels of the map")
        if threshold == "otsu":
            return cls(parts=parts, smooth=smooth)
        written = WRITTEN.fullmatch(threshold)
        if written is not None and 0 < float(written[2]) < 1:
            return cls("share" if written[1] == "share" else "energy", float(written[2]), parts, smooth)
        bare = f"; {threshold} may be share:{threshold} or energy:{threshold}" if _is_share(threshold) else ""
        raise ValueError(f"threshold {threshold!r} is not known; known: {FORMS}{bare}")

    def __str__(self) -> str:
        amount = "" if self.amount is None else f":{self.amount:g}"
        smooth = f", smoothed by {self.smooth:g} pixels" if self.smooth else ""
        return f"{self.threshold}{amount}, {'largest part' if self.parts == 'largest' else 'all parts'}{smooth}"


def _is_share(text: str) -> bool:
    return re.fullmatch(r"0?\.\d+", text) is not None


@dataclass(frozen=True)
class Part:
    """One connected part of a map's foreground; pixels that touch at a corner are connected."""

    mask_hw: NDArray[np.bool_]
    """[H, W]."""
    area: float
    """Its share of the map's pixels, in (0, 1]."""
    energy: float
    """The share of the map's sum that lies in it, 0 to 1."""


@dataclass(frozen=True)
class Foreground:
    """What of a map lies above the threshold."""

    labels_hw: NDArray[np.int32]
    """[H, W]: 0 outside, else the number of the part, from 1."""
    order: NDArray[np.intp]
    """The parts' numbers, the largest first; of equal size the first in reading order."""
    saliency_hw: Map
    """The map before smoothing, [H, W] in [0, 1]."""
    threshold: float
    """The least value inside, of the smoothed map scaled to [0, 1]."""

    @property
    def num_parts(self) -> int:
        """All of them, whichever are asked for."""
        return len(self.order)

    def chosen(self, parts: Parts) -> Iterator[Part]:
        """The largest part, or all parts, the largest first, `MAX_PARTS` at most."""
        total = float(self.saliency_hw.sum())
        for number in self.order[: 1 if parts == "largest" else MAX_PARTS]:
            mask = self.labels_hw == number
            yield Part(mask, float(mask.mean()), float(self.saliency_hw[mask].sum()) / total)


def foreground_of(saliency_hw: Map, rule: RegionRule) -> Foreground | None:
    """The parts of a map [H, W] in [0, 1] above the rule's threshold; None if the map is flat.

    The least value of a map is never inside. Raises ValueError for a value that is not finite.
    """
    if not np.isfinite(saliency_hw).all():
        raise ValueError("a map with NaN or infinity has no regions")
    values = minmax(_smoothed(saliency_hw.astype(np.float64), rule.smooth))
    if not values.any():
        return None
    inside = _inside(values, rule)
    labels = np.zeros(values.shape, np.int32)
    ndimage.label(inside, EIGHT_NEIGHBOURS, labels)
    sizes = np.bincount(labels.ravel())[1:]
    order = np.argsort(-sizes, kind="stable") + 1
    return Foreground(labels, order, saliency_hw, float(values[inside].min()))


def _smoothed(values: Map, sigma: float) -> Map:
    return ndimage.gaussian_filter(values, sigma, mode="nearest") if sigma else values


def _inside(values: Map, rule: RegionRule) -> NDArray[np.bool_]:
    """True above the threshold, of values that span [0, 1]. Equal values are inside together or outside together."""
    if rule.threshold == "otsu":
        return otsu_foreground(values)
    assert rule.amount is not None
    falling = np.sort(values, axis=None)[::-1]
    if rule.threshold == "share":
        last = int(np.ceil(rule.amount * falling.size)) - 1
    else:
        sums = falling.cumsum()
        last = int(np.searchsorted(sums, rule.amount * sums[-1]))
    return (values >= falling[min(last, falling.size - 1)]) & (values > 0)
