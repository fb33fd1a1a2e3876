"""How alike two saliency maps are: Pearson, Spearman, SSIM, and the overlap of their greatest pixels."""

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import uniform_filter
from scipy.stats import rankdata

from blocksight.engine.metrics.metric import first_pixels
from blocksight.engine.saliency import Map, is_flat

TOP_SHARE = 0.15
"""Share of the pixels, as in Drop and Increase."""
WINDOW = 7
"""Side of SSIM's window in pixels."""
STABILISERS = (0.01**2, 0.03**2)
"""C1 and C2 of SSIM for values in [0, 1]."""


def pearson(one: Map, other: Map) -> float:
    """The correlation of two maps' pixels, -1 to 1; 0 where either is constant."""
    if is_flat(one) or is_flat(other):
        return 0.0
    first, second = one - one.mean(), other - other.mean()
    return float((first * second).sum() / np.sqrt((first**2).sum() * (second**2).sum()))


def spearman(one: Map, other: Map) -> float:
    """The correlation of the pixels' ranks, ties at their mean rank, -1 to 1; 0 where either map is constant."""
    return pearson(_mean_ranks(one), _mean_ranks(other))


def _mean_ranks(values: Map) -> Map:
    """The rank of each pixel from 1, ties at their mean; grey levels are counted and not sorted."""
    if values.dtype.kind not in "iu":
        return rankdata(values).reshape(values.shape)
    levels = values.astype(np.int64) - int(values.min())
    counts = np.bincount(levels.ravel())
    return (np.cumsum(counts) - (counts - 1) / 2)[levels]


def ssim(one: Map, other: Map) -> float:
    """The mean structural similarity of maps in [0, 1], at most 1 (Wang et al., IEEE TIP 2004, equation 13).

    Over all square windows of `WINDOW` pixels that lie inside, with even weights and sample variances.
    """
    sample = WINDOW**2 / (WINDOW**2 - 1)
    mean, other_mean = uniform_filter(one, WINDOW), uniform_filter(other, WINDOW)
    variance = sample * (uniform_filter(one * one, WINDOW) - mean**2)
    other_variance = sample * (uniform_filter(other * other, WINDOW) - other_mean**2)
    covariance = sample * (uniform_filter(one * other, WINDOW) - mean * other_mean)
    light, contrast = STABILISERS
    above = (2 * mean * other_mean + light) * (2 * covariance + contrast)
    below = (mean**2 + other_mean**2 + light) * (variance + other_variance + contrast)
    inside = (slice(WINDOW // 2, -(WINDOW // 2)),) * 2
    return float((above / below)[inside].mean())


def iou_of_tops(one: Map, other: Map) -> float:
    """Intersection over union of the two maps' greatest `TOP_SHARE` of pixels, 0 to 1; 0 where either is constant.

    Pixels with a map's least value are in no top: they are ordered by place alone, the same in both maps, and two
    sparse maps without a common pixel would seem alike. Other ties as in `first_pixels`.
    """
    if is_flat(one) or is_flat(other):
        return 0.0
    first, second = _top(one), _top(other)
    return float((first & second).sum() / (first | second).sum())


def _top(values: Map) -> NDArray[np.bool_]:
    return first_pixels(values, int(TOP_SHARE * values.size)) & (values > values.min())
