"""Intervals of shares and of their difference by score, which stay honest where a share is 0, or all, or of a few."""

import math

from scipy import stats

from blocksight.jobs.plan.bootstrap import LEVEL, MethodEstimate

SHARES_BY = (
    "95 % by Wilson's score; an image counts once, however many rows it has: rows of one image are no further evidence"
)
GAP_BY = "95 % by Newcombe's hybrid score, from the intervals of the two shares"


def wilson(share: float | None, num_images: int, num_rows: int) -> MethodEstimate:
    """A share of rows, in 0 to 1, with the interval that Wilson's score (1927) gives it for so many images.

    Where images have one row each, that is the interval of a binomial share; where they have several, it is as wide as
    if each image spoke with one voice. None for all where there is no row; `count` holds the rows.
    """
    if share is None:
        return MethodEstimate(None, None, None, num_rows)
    z2 = float(stats.norm.ppf((1 + LEVEL) / 2)) ** 2
    middle = (share + z2 / (2 * num_images)) / (1 + z2 / num_images)
    reach = math.sqrt(z2 * (share * (1 - share) + z2 / (4 * num_images)) / num_images) / (1 + z2 / num_images)
    low, high = min(share, middle - reach), max(share, middle + reach)  # but for rounding at 0 and 1
    return MethodEstimate(share, max(0.0, low), min(1.0, high), num_rows)


def newcombe(one: MethodEstimate, other: MethodEstimate) -> MethodEstimate:
    """The one share less the other, in -1 to 1, with the interval of Newcombe's method 10 (1998); `count`: both's rows.

    It takes the two for independent: where an image has rows in both, it is wider than need be.
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
