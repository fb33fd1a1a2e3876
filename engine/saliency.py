"""Saliency maps as arrays: their type, min-max scaling, Otsu's threshold, and what makes a map flat."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Map = NDArray[np.float64]

NUM_BINS = 256
"""Of Otsu's histogram."""


def minmax(values: Map) -> Map:
    """Scales the values linearly to exactly [0, 1]; a constant map becomes zeros."""
    low, high = values.min(), values.max()
    if high == low:
        return np.zeros_like(values, dtype=np.float64)
    return (values - low) / (high - low)


FLAT = "the map is flat"
"""Why a metric that needs an order or mass has no value."""
NEGATIVE = "the score is negative, and of it no share can be lost"
"""Why a metric of shares has no value: the score is a logit, or a sum of some."""


def is_flat(values: NDArray[np.floating[Any]]) -> bool:
    """True if the map [H, W] is constant: it has no order and, after `minmax`, no mass."""
    return bool(values.max() == values.min())


def between_class_variance(bins: NDArray[np.int64], values: Map) -> Map:
    """Otsu's criterion for the split after each bin; -1 where one of the two classes is empty."""
    counts = np.bincount(bins, minlength=NUM_BINS).astype(np.float64)
    sums = np.bincount(bins, weights=values, minlength=NUM_BINS)
    below, total = counts.cumsum(), counts.sum()
    above = total - below
    both = (below > 0) & (above > 0)
    below_sum = sums.cumsum()
    with np.errstate(divide="ignore", invalid="ignore"):
        gap = below_sum / below - (sums.sum() - below_sum) / above
        return np.where(both, below * above / total**2 * gap**2, -1.0)


def otsu_foreground(values: Map) -> NDArray[np.bool_]:
    """Where values in [0, 1] lie above Otsu's threshold (Otsu 1979).

    256 bins, bin = min(floor(256 v), 255); the split is the first argmax of the between-class variance of
    the values themselves; foreground = bins above it. A constant map has no foreground.
    """
    bins = np.minimum(np.floor(NUM_BINS * values).astype(np.int64), NUM_BINS - 1)
    variance = between_class_variance(bins.ravel(), values.ravel())
    split = int(variance.argmax())
    if variance[split] < 0:
        return np.zeros(values.shape, dtype=np.bool_)
    return bins > split
