"""The sums that compare methods: by hand, against scipy and slow twins, and in any order."""

import hashlib
import math
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from blocksight.jobs.evaluate.bootstrap import MetricSums, differences, estimate, holm, key_hashes, weights

NAN = float("nan")
SEED = 20230


def sums_of(keys: list[str], values: list[list[float]], replicates: int = 50) -> MetricSums:
    return MetricSums.of(key_hashes(keys), np.array(values, dtype=np.float64), replicates)


def keys_of(num: int, prefix: str = "image") -> list[str]:
    return [f"{prefix}/{i}" for i in range(num)]


# The weights


def test_a_hash_is_the_first_eight_bytes_of_blake2b() -> None:
    assert key_hashes(["a"])[0] == int.from_bytes(hashlib.blake2b(b"a", digest_size=8).digest(), "little")
    assert key_hashes([]).shape == (0,)
    assert len(set(key_hashes(["é", "e", "\udce9"]).tolist())) == 3


def splitmix(word: int) -> int:
    """The slow twin of the mixing function, in Python integers."""
    word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    word = (word ^ (word >> 27)) * 0x94D049BB133111EB % 2**64
    return word ^ (word >> 31)


def slow_weight(image_hash: int, replicate: int, seed: int) -> int:
    step = 0x9E3779B97F4A7C15
    image = splitmix(image_hash ^ splitmix((seed + step) % 2**64))
    word = splitmix((image + splitmix((replicate + 1) * step % 2**64)) % 2**64)
    return int(stats.poisson.isf((word + 0.5) / 2**64, 1))


@pytest.mark.parametrize("seed", [SEED, 0, 2**64 - 1])
def test_weights_agree_with_their_slow_twin(seed: int) -> None:
    hashes = key_hashes(keys_of(40))
    slow = [[slow_weight(int(image), b, seed) for b in range(70)] for image in hashes]
    assert weights(hashes, 70, seed).tolist() == slow


def test_splitmix_gives_its_published_first_output() -> None:
    """The first output of the reference generator with seed 0 (Vigna, splitmix64.c)."""
    assert splitmix(0x9E3779B97F4A7C15) == 0xE220A8397B1DCDAF


@pytest.mark.parametrize(
    "hashes", [key_hashes(keys_of(2000)), np.arange(2000, dtype=np.uint64)], ids=["keys", "counted"]
)
def test_weights_are_poisson_and_independent(hashes: np.ndarray) -> None:
    drawn = weights(hashes, 1000).astype(np.float64)
    num = drawn.size
    assert drawn.mean() == pytest.approx(1, abs=4 / math.sqrt(num))
    assert drawn.var() == pytest.approx(1, abs=4 * math.sqrt(3 / num))
    seen = np.bincount(drawn.astype(int).ravel().clip(max=7), minlength=8)
    wanted = num * np.append(stats.poisson.pmf(range(7), 1), stats.poisson.sf(6, 1))
    assert stats.chisquare(seen, wanted).pvalue > 1e-4
    # Were images or replicates dependent, the means along one axis would vary more, or less, than 1 / n.
    for axis in (0, 1):
        spread = drawn.mean(axis).var(ddof=1) * drawn.shape[axis]
        assert spread == pytest.approx(1, abs=5 * math.sqrt(2 / drawn.shape[1 - axis]))
    for other in (np.roll(drawn, 1, 0), np.roll(drawn, 1, 1), np.roll(drawn, (1, 1), (0, 1))):
        assert np.mean((drawn - 1) * (other - 1)) == pytest.approx(0, abs=5 / math.sqrt(num))


def test_an_images_weights_do_not_depend_on_its_company() -> None:
    hashes = key_hashes(keys_of(300))
    whole = weights(hashes, 500)
    order = np.random.default_rng(0).permutation(300)
    assert np.array_equal(weights(hashes[order], 500), whole[order])
    assert np.array_equal(np.vstack([weights(hashes[:7], 500), weights(hashes[7:], 500)]), whole)
    assert np.array_equal(weights(hashes, 20), whole[:, :20])
    assert not np.array_equal(weights(hashes, 500, seed=1), whole)


def test_weights_leave_the_hashes_as_they_were() -> None:
    hashes = key_hashes(keys_of(5))
    before = hashes.copy()
    weights(hashes, 10)
    assert np.array_equal(hashes, before)


def test_another_process_draws_the_same_weights() -> None:
    code = "from blocksight.jobs.evaluate.bootstrap import *; print(weights(key_hashes(['x', 'y']), 30).tolist())"
    root = Path(__file__).parents[3]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, check=True, capture_output=True, text=True)
    assert done.stdout.strip() == str(weights(key_hashes(["x", "y"]), 30).tolist())


# Sums, means and intervals


def test_three_images_by_hand() -> None:
    sums = sums_of(["a", "b", "c"], [[1, 2], [2, 4], [6, 5]])
    assert [(e.mean, e.count) for e in estimate(sums)] == [(3, 3), (pytest.approx(11 / 3), 3)]
    (paired,) = differences(sums)  # 1, 2, -1: mean 2/3, variance 7/3, t = (2/3) / sqrt(7/9)
    t = 2 / math.sqrt(7)
    assert paired.difference == pytest.approx(2 / 3)
    assert paired.p_value == pytest.approx(1 - t / math.sqrt(2 + t**2))  # Student's with 2 degrees, in closed form
    assert paired.count == 3
    assert (sums.total[2], sums.squares[2], sums.image_total[2], sums.image_squares[2]) == (2, 6, 2, 6)


def slow_interval(keys: list[str], column: list[float], replicates: int) -> tuple[float, float]:
    """The slow twin of the interval, row by row from the definition."""
    drawn = weights(key_hashes(keys), replicates).tolist()
    ratios = []
    for b in range(replicates):
        kept = [(row[b], v) for row, v in zip(drawn, column, strict=True) if not math.isnan(v)]
        if sum(w for w, _ in kept):
            ratios.append(sum(w * v for w, v in kept) / sum(w for w, _ in kept))
    images = len({key for key, v in zip(keys, column, strict=True) if not math.isnan(v)})
    reach = stats.t.isf(0.025, images - 1) * math.sqrt(images / (images - 1))
    low, high = np.percentile(ratios, [100 * stats.norm.cdf(-reach), 100 * stats.norm.cdf(reach)])
    return low, high


def test_the_interval_is_its_definition() -> None:
    keys = ["a", "b", "a", "c", "c", "d"]
    values = [[1.0, 3.0], [2.0, NAN], [NAN, 5.0], [7.0, 1.0], [0.5, 2.0], [4.0, 4.5]]
    sums = sums_of(keys, values, replicates=200)
    first, second = zip(*values, strict=True)
    paired = [b - a for a, b in values]
    assert [(e.low, e.high) for e in estimate(sums)] == [
        pytest.approx(slow_interval(keys, list(column), 200)) for column in (first, second)
    ]
    (difference,) = differences(sums)
    assert (difference.low, difference.high) == pytest.approx(slow_interval(keys, paired, 200))


def test_no_image_of_many_is_left_out_of_the_draws() -> None:
    hashes, values = key_hashes(keys_of(5000)), np.random.default_rng(4).normal(size=(5000, 1))
    sums, drawn = MetricSums.of(hashes, values, 20), weights(hashes, 20)
    assert sums.drawn_rows[:, 0].tolist() == drawn.sum(0).tolist()
    np.testing.assert_allclose(sums.drawn_total, drawn.T @ values, atol=1e-9)


def test_a_missing_value_counts_for_its_method_alone() -> None:
    sums = sums_of(["a", "b", "c"], [[1, NAN, NAN], [NAN, 5, NAN], [3, 9, NAN]])
    first, second, third = estimate(sums)
    assert (first.mean, first.count, second.mean, second.count) == (2, 2, 7, 2)
    assert (third.mean, third.low, third.high, third.count) == (None, None, None, 0)
    shared, none = differences(sums)
    assert (shared.difference, shared.low, shared.high, shared.p_value, shared.count) == (6, None, None, None, 1)
    assert (none.difference, none.low, none.high, none.p_value, none.count) == (None, None, None, None, 0)


def test_one_image_is_too_few_for_an_interval_whatever_its_targets() -> None:
    sums = sums_of(["a", "a", "a"], [[1, 2], [2, 2], [3, 9]])
    (first, _), (paired,) = estimate(sums), differences(sums)
    assert (first.mean, first.low, first.high, first.count) == (2, None, None, 3)
    assert (paired.low, paired.high, paired.p_value) == (None, None, None)


def test_no_rows_and_one_method() -> None:
    empty = MetricSums.of(key_hashes([]), np.zeros((0, 2)), 10)
    assert [e.mean for e in estimate(empty)] == [None, None]
    assert differences(sums_of(["a", "b"], [[1], [2]])) == []


def test_targets_of_one_image_are_one_cluster() -> None:
    values = np.random.default_rng(1).normal([[0.0, 0.1]], 1, (100, 2)).tolist()
    once, twice = sums_of(keys_of(100), values), sums_of(keys_of(100) * 2, values * 2)
    for alone, doubled in zip(estimate(once), estimate(twice), strict=True):
        assert (doubled.mean, doubled.low, doubled.high) == pytest.approx((alone.mean, alone.low, alone.high))
        assert doubled.count == 2 * alone.count
    (alone,), (doubled,) = differences(once), differences(twice)
    assert (doubled.low, doubled.high, doubled.p_value) == pytest.approx((alone.low, alone.high, alone.p_value))
    apart = sums_of(keys_of(200), values * 2)  # as if every row were an image: this one does shrink
    assert differences(apart)[0].p_value != pytest.approx(alone.p_value)


def test_a_large_sample_gives_the_normal_interval() -> None:
    values = np.random.default_rng(2).normal(0.3, 0.2, (2000, 1))
    (found,) = estimate(MetricSums.of(key_hashes(keys_of(2000)), values, 1000))
    mean, error = values.mean(), values.std(ddof=1) / math.sqrt(2000)
    assert (found.low, found.high) == pytest.approx((mean - 1.96 * error, mean + 1.96 * error), abs=0.2 * error)


def test_the_interval_covers_the_truth_nineteen_times_in_twenty() -> None:
    rng, covered = np.random.default_rng(3), 0
    for trial in range(300):
        sums = MetricSums.of(key_hashes(keys_of(80, str(trial))), rng.normal(0.5, 1, (80, 2)), 300)
        (paired,) = differences(sums)
        assert paired.low is not None
        covered += paired.low <= 0 <= paired.high
    assert 0.90 <= covered / 300 <= 0.99


@pytest.mark.parametrize("num", [8, 12])
def test_the_interval_covers_the_truth_for_few_images_too(num: int) -> None:
    """Without the widening it covers .91 of the trials at 8 images and .925 at 12; with it .96 at both."""
    rng, covered = np.random.default_rng(num), 0
    for trial in range(400):
        (own,) = estimate(MetricSums.of(key_hashes(keys_of(num, str(trial))), rng.normal(0.5, 1, (num, 1)), 400))
        assert own.low is not None
        covered += own.low <= 0.5 <= own.high
    assert 0.94 <= covered / 400 <= 0.99


# The t test


@pytest.mark.parametrize("num", [2, 3, 40])
def test_the_p_value_is_scipys(num: int) -> None:
    values = np.random.default_rng(num).normal([[0.0, 0.2, -0.4]], 1, (num, 3))
    found = differences(MetricSums.of(key_hashes(keys_of(num)), values, 10))
    wanted = [stats.ttest_rel(values[:, m], values[:, 0]).pvalue for m in (1, 2)]
    assert [paired.p_value for paired in found] == pytest.approx(wanted, rel=1e-9)


def test_the_p_value_is_that_of_the_images_means() -> None:
    sums = sums_of(["a", "a", "b", "c", "c", "c"], [[0, 1], [0, 3], [0, 1], [0, 4], [0, 1], [0, 7]])
    assert differences(sums)[0].p_value == pytest.approx(stats.ttest_1samp([2, 1, 4], 0).pvalue)
    assert (differences(sums)[0].difference, differences(sums)[0].count) == (pytest.approx(17 / 6), 6)
    assert (sums.rows[2], sums.images[2], sums.squares[2]) == (6, 3, 1 + 9 + 1 + 16 + 1 + 49)


@pytest.mark.parametrize(
    ("paired", "p_value"),
    [([0, 0, 0], 1), ([0.1, 0.1, 0.1], 0.25), ([-2, -2], 0.5), ([1, -1], 1), ([5], None), ([NAN, 5, NAN], None)],
)
def test_differences_that_do_not_vary(paired: list[float], p_value: float | None) -> None:
    assert differences(sums_of(keys_of(len(paired)), [[0, d] for d in paired]))[0].p_value == p_value


def test_a_constant_difference_is_constant_in_spite_of_rounding() -> None:
    sums = sums_of(["a"] * 6 + ["b"], [[0, 0.7]] * 7)  # the sum of six 0.7, divided by six, is not 0.7
    assert sums.lowest[2] != sums.highest[2]
    assert differences(sums)[0].p_value == 0.5


# Merging


ROWS = st.lists(
    st.tuples(st.integers(0, 12), st.tuples(*[st.one_of(st.just(NAN), st.floats(-1, 1))] * 3)), min_size=1, max_size=40
)


@settings(max_examples=60)
@given(rows=ROWS, parts=st.lists(st.integers(0, 3), min_size=13, max_size=13), shuffle=st.randoms())
def test_any_partition_by_image_and_any_order_give_the_same_sums(rows: list, parts: list[int], shuffle) -> None:
    whole = sums_of([str(key) for key, _ in rows], [list(values) for _, values in rows])
    mixed = list(rows)
    shuffle.shuffle(mixed)
    pieces = [[row for row in mixed if parts[row[0]] == part] for part in range(4)]
    sums = [sums_of([str(k) for k, _ in piece], [list(v) for _, v in piece]) for piece in pieces if piece]
    shuffle.shuffle(sums)
    merged = sums[0]
    for part in sums[1:]:
        merged = merged + part
    for field in fields(whole):
        np.testing.assert_allclose(getattr(merged, field.name), getattr(whole, field.name), rtol=0, atol=1e-9)
    for one, other in zip(estimate(merged), estimate(whole), strict=True):
        assert (one.mean, one.low, one.high, one.count) == pytest.approx(
            (other.mean, other.low, other.high, other.count)
        )


def test_sums_of_no_rows_change_nothing() -> None:
    some = sums_of(["a", "b"], [[1, 2], [4, NAN]])
    both = some + MetricSums.of(key_hashes([]), np.zeros((0, 2)), 50)
    for field in fields(some):
        assert np.array_equal(getattr(both, field.name), getattr(some, field.name))


def test_sums_of_another_kind_do_not_add_up() -> None:
    keys, values = key_hashes(["a", "b"]), np.ones((2, 2))
    some = MetricSums.of(keys, values, 10)
    others = [
        MetricSums.of(keys, values, 11),
        MetricSums.of(keys, values, 10, seed=1),
        MetricSums.of(keys, values[:, :1], 10),
    ]
    for other in others:
        with pytest.raises(ValueError, match="do not add up"):
            some + other


@pytest.mark.parametrize("values", [np.ones((3, 2)), np.ones(2), np.ones((2, 0))])
def test_shapes_that_do_not_fit_are_named(values: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"are wanted, got \(2,\) and "):
        MetricSums.of(key_hashes(["a", "b"]), values, 10)


def test_infinite_values_are_refused() -> None:
    with pytest.raises(ValueError, match="1 values are infinite"):
        sums_of(["a", "b"], [[1.0], [math.inf]])


# Holm


def slow_holm(p_values: list[float | None]) -> list[float | None]:
    """The smallest level at which the step-down test of Holm (1979) rejects each hypothesis, tried one by one."""
    known = sorted(p for p in p_values if p is not None)

    def rejects(p: float, level: float) -> bool:
        for rank, smaller in enumerate(known):
            if (len(known) - rank) * smaller > level:
                return False
            if smaller == p:
                return True
        return False

    levels = sorted({1.0} | {min(1.0, k * p) for p in known for k in range(1, len(known) + 1)})
    return [None if p is None else next((a for a in levels if rejects(p, a)), 1.0) for p in p_values]


def test_holm_by_hand() -> None:
    assert holm([0.01, None, 0.04, 0.03, 0.005]) == pytest.approx([0.03, None, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.5]) == [1.0, 1.0]
    assert holm([]) == []
    assert holm([None]) == [None]


@given(st.lists(st.one_of(st.none(), st.floats(0, 1)), max_size=8))
def test_holm_is_the_smallest_level_that_rejects(p_values: list[float | None]) -> None:
    assert holm(p_values) == slow_holm(p_values)


@pytest.mark.parametrize("wrong", [NAN, -0.1, 1.5])
def test_what_is_no_p_value_is_refused(wrong: float) -> None:
    with pytest.raises(ValueError, match=r"lie in \[0, 1\]"):
        holm([0.5, wrong])
