"""Intervals of shares and bounded means in `compare`: no interval is one point, and they cover what they promise."""

import numpy as np
import pytest
from scipy.stats import binom

from blocksight.engine.catalog.entries import METRICS
from blocksight.jobs.evaluate.bootstrap import MetricSums, estimate, key_hashes
from blocksight.jobs.evaluate.shares import differences_of, estimates_of, wilson

SHARES = ("increase", "average_increase_100", "average_increase_50", "average_increase_15", "pointing")


def sums_of(*columns):
    values = np.array(columns, np.float64).T
    return MetricSums.of(key_hashes([str(place) for place in range(len(values))]), values)


def maps(count, of):
    return [100.0] * count + [0.0] * (of - count)


def interval(metric, values):
    (own,) = estimates_of(metric, sums_of(values))
    return own.low, own.high


def test_the_shares_are_the_metrics_of_two_values():
    assert tuple(name for name, entry in METRICS.items() if entry.is_share) == SHARES


@pytest.mark.parametrize("metric", SHARES)
@pytest.mark.parametrize(("count", "of"), [(20, 20), (0, 20), (3, 20), (199, 200)])
def test_a_share_has_wilsons_interval(metric, count, of):
    share = wilson(count / of, of, of)
    assert interval(metric, maps(count, of)) == pytest.approx((100 * share.low, 100 * share.high))


@pytest.mark.parametrize(("share", "of", "without"), [(0.08, 20, 0.83), (0.02, 50, 0.65), (0.95, 30, 0.81)])
def test_the_interval_of_a_share_covers_it(share, of, without):
    """Exactly, over all counts that are possible. `without`: the bootstrap's coverage is below this."""

    def coverage(intervals):
        hits = [low <= 100 * share <= high for low, high in intervals]
        return float(binom.pmf(np.flatnonzero(hits), of, share).sum())

    every = [maps(count, of) for count in range(of + 1)]
    assert coverage(interval("increase", own) for own in every) > 0.92
    plain = [estimate(sums_of(own))[0] for own in every]
    assert coverage((own.low, own.high) for own in plain) < without


@pytest.mark.parametrize(
    ("metric", "value", "low"), [("drop", 100.0, 83.9), ("deletion", 1.0, 0.839), ("pos", 90, 75.5)]
)
def test_a_bounded_mean_without_spread_is_not_certain(metric, value, low):
    assert interval(metric, [value] * 20) == (pytest.approx(low, abs=0.1), value)


def test_a_mean_with_spread_keeps_its_bootstrap_interval():
    values = np.random.default_rng(1).uniform(0, 100, 30).tolist()
    own = estimate(sums_of(values))[0]
    assert interval("drop", values) == (own.low, own.high)


@pytest.mark.parametrize(("metric", "value"), [("deletion", 0.4), ("sanity", 0.3), ("effective_area", 31.4)])
def test_values_that_differ_by_rounding_are_equal(metric, value):
    """Sums of a replicate and of all rows round differently, so that its interval is narrow and not one point."""
    low, high = interval(metric, [value, value * (1 + 1e-15)] * 2)
    assert low < 0.7 * value
    assert high > 1.3 * value


@pytest.mark.parametrize(
    ("metric", "values"), [("positive_density", [3.0] * 5), ("insertion", [5.0, 5.0]), ("drop", [640.0] * 3)]
)
def test_equal_values_without_bounds_have_no_interval(metric, values):
    """A density has no highest value; a logit is the score with another readout, and leaves a probability's bounds."""
    assert interval(metric, values) == (None, None)
    assert interval(metric, [*values, -7.0]) != (None, None)


def test_a_bound_may_be_exceeded_by_rounding():
    assert interval("insertion", [1 + 1e-15] * 20) == (pytest.approx(0.839, abs=1e-3), 1)


def difference(one, other):
    (own,) = differences_of("increase", sums_of(one, other))
    return own


def test_the_difference_of_shares_by_hand():
    """Agresti and Min (2005): of 20 maps, 4 for the second alone and 1 for the first alone; 22, 4.5 and 1.5."""
    own = difference(maps(1, 20), [0.0, *maps(4, 19)])
    middle, reach = 3 / 22, 1.959964 * ((6 / 22 - (3 / 22) ** 2) / 22) ** 0.5
    assert (own.difference, own.low, own.high) == pytest.approx((15, 100 * (middle - reach), 100 * (middle + reach)))


def test_equal_shares_are_not_certainly_equal():
    for one in (maps(20, 20), maps(7, 20)):
        own = difference(one, one)
        assert own.difference == 0
        assert -own.low == pytest.approx(own.high, abs=1e-9)
        assert own.high > 5


def test_the_interval_of_a_difference_covers_it():
    rng, trials = np.random.default_rng(5), 250
    covered = 0
    for _ in range(trials):
        common = rng.random(20)
        own = difference(100 * (common < 0.08), 100 * (common < 0.2))
        covered += own.low <= 12 <= own.high
    assert covered / trials > 0.92
