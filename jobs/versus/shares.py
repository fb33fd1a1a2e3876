"""Score intervals of shares and of their difference, which hold for shares of 0 or 1 and for few images too."""

import math

from scipy import stats

from blocksight.jobs.evaluate.bootstrap import LEVEL, MethodEstimate

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
