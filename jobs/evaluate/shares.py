"""Intervals of shares, of their differences and of bounded means, which hold at the bounds and for few images too."""

import math
from dataclasses import replace

import numpy as np
from scipy import stats

from blocksight.engine.catalog.entries import METRICS, MetricEntry
from blocksight.jobs.evaluate.bootstrap import (
    LEVEL,
    ROUNDING,
    MethodEstimate,
    MetricSums,
    PairedDifference,
    differences,
    estimate,
)

SHARES_BY = (
    "95 % by Wilson's score; an image counts once, however many rows it has: rows of one image are no further evidence"
)
GAP_BY = "95 % by Newcombe's hybrid score, from the intervals of the two shares"


def wilson(share: float | None, num_images: int, num_rows: int) -> MethodEstimate:
    """A share of rows, 0 to 1, with its interval by Wilson's score (1927) for this number of images.

    With one row per image that is the interval of a binomial share; with several, rows of one image count once.
    `count` is the number of rows. Without any row, mean and ends are None.
    """
    if share is None:
        return MethodEstimate(None, None, None, num_rows)
    z2 = float(stats.norm.ppf((1 + LEVEL) / 2)) ** 2
    middle = (share + z2 / (2 * num_images)) / (1 + z2 / num_images)
    reach = math.sqrt(z2 * (share * (1 - share) + z2 / (4 * num_images)) / num_images) / (1 + z2 / num_images)
    low, high = min(share, middle - reach), max(share, middle + reach)  # min and max undo rounding at 0 and 1
    return MethodEstimate(share, max(0.0, low), min(1.0, high), num_rows)


def bounded(own: MethodEstimate, bounds: tuple[float, float], num_images: int) -> MethodEstimate:
    """The estimate of a mean between bounds, with Wilson's interval in place of its own.

    No mean between the bounds has more variance than a share, so that Wilson's interval is wide enough.
    """
    if own.mean is None:
        return own
    least, width = bounds[0], bounds[1] - bounds[0]
    share = wilson(min(1.0, max(0.0, (own.mean - least) / width)), num_images, own.count)  # without rounding
    assert share.low is not None
    assert share.high is not None
    return MethodEstimate(own.mean, least + width * share.low, least + width * share.high, own.count)


def _estimate(
    own: MethodEstimate, entry: MetricEntry, lowest: float, highest: float, num_images: int
) -> MethodEstimate:
    """The estimate with an interval that holds, from the least and greatest value of an image.

    The bootstrap's does not hold for a share of maps, nor where all values are equal: its interval is one point then.
    A value outside the bounds (a logit is the score with `--readout identity`) has no bounds, and no interval if all
    are equal.
    """
    if own.low is None:
        return own
    is_constant = highest - lowest <= ROUNDING * max(abs(lowest), abs(highest))
    if entry.bounds is not None and _is_inside(lowest, highest, entry.bounds):
        return bounded(own, entry.bounds, num_images) if is_constant or entry.is_share else own
    return replace(own, low=None, high=None) if is_constant else own


def _is_inside(lowest: float, highest: float, bounds: tuple[float, float]) -> bool:
    """True if both values lie between the bounds, up to rounding."""
    margin = ROUNDING * (bounds[1] - bounds[0])
    return bounds[0] - margin <= lowest and highest <= bounds[1] + margin


def paired(own: PairedDifference, changed: float, num_images: int) -> PairedDifference:
    """The difference of two shares of the same maps, in percent, with the interval of Agresti and Min (2005).

    `changed` is the share of maps, 0 to 1, that count for one of the two alone. The interval is Wald's after half a
    map is added to each of the four cells; an image counts once, however many maps it has.
    """
    if own.difference is None or own.low is None:
        return own
    gap, more = own.difference / 100, num_images + 2
    middle, varied = num_images * gap / more, (num_images * changed + 1) / more
    reach = float(stats.norm.ppf((1 + LEVEL) / 2)) * math.sqrt(max(0.0, varied - middle**2) / more)
    low, high = max(-1.0, min(gap, middle - reach)), min(1.0, max(gap, middle + reach))
    return replace(own, low=100 * low, high=100 * high)


def estimates_of(metric: str, sums: MetricSums) -> list[MethodEstimate]:
    """The methods' means of a metric, or of a measure that is none, with their intervals."""
    found, entry = estimate(sums), METRICS.get(metric)
    if entry is None:
        return found
    ends = zip(sums.lowest.tolist(), sums.highest.tolist(), sums.images.tolist(), strict=True)
    return [_estimate(own, entry, *of) for own, of in zip(found, ends, strict=False)]  # differences follow


def differences_of(metric: str, sums: MetricSums) -> list[PairedDifference]:
    """The differences to the first method, as `bootstrap.differences`, with intervals that hold for shares too."""
    found, entry = differences(sums), METRICS.get(metric)
    if entry is None or not entry.is_share:
        return found
    places = range(len(found) + 1, len(sums.rows))  # behind the methods' own columns
    changed = sums.squares / 100**2 / np.maximum(sums.rows, 1)
    return [paired(own, changed[c], int(sums.images[c])) for own, c in zip(found, places, strict=True)]


def newcombe(one: MethodEstimate, other: MethodEstimate) -> MethodEstimate:
    """The difference of two shares, -1 to 1, with the interval of Newcombe's method 10 (1998).

    `count` is the number of rows of both. The shares count as independent: if an image has rows in both, the interval
    is wider than needed.
    """
    count = one.count + other.count
    if one.mean is None or one.low is None or one.high is None:
        return MethodEstimate(None, None, None, count)
    if other.mean is None or other.low is None or other.high is None:
        return MethodEstimate(None, None, None, count)
    gap = one.mean - other.mean
    below = math.hypot(one.mean - one.low, other.high - other.mean)
    above = math.hypot(one.high - one.mean, other.mean - other.low)
    return MethodEstimate(gap, gap - below, gap + above, count)
