"""Compares methods: mean, bootstrap interval, paired difference, Holm's correction; sums merge in any order."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Floats = NDArray[np.float64]
Words = NDArray[np.uint64]

SEED = 20230
"""Of the bootstrap; sums of different seeds do not add up."""
REPLICATES = 1000
LEVEL = 0.95
ROUNDING = 1e-12
"""Differences that vary by no more than this fraction of themselves count as constant."""

_STEP = 0x9E3779B97F4A7C15
_MIX = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
_WORDS_AT_ONCE, _IMAGES_AT_ONCE = 2**16, 2048
"""The first keeps the mixing in the cache, the second bounds the memory."""
_TAILS = np.array([stats.poisson.sf(k, 1) * 2.0**64 for k in range(21)]).astype(np.uint64)
"""P(X > k) of Poisson(1) as fractions of 2^64."""


def key_hashes(keys: Sequence[str]) -> Words:
    """`[n]` 64-bit BLAKE2b of the records' keys: the same in every process, unlike Python's own `hash`."""
    return byte_hashes([key.encode("utf-8", "surrogatepass") for key in keys])


def byte_hashes(bodies: Sequence[bytes]) -> Words:
    """`[n]` 64-bit BLAKE2b."""
    digests = b"".join(hashlib.blake2b(body, digest_size=8).digest() for body in bodies)
    return np.frombuffer(digests, dtype="<u8").astype(np.uint64)


def _mixed(words: Words) -> Words:
    """The finaliser of splitmix64 (Steele, Lea and Flood 2014), in place."""
    for shift, factor in _MIX:
        words ^= words >> np.uint64(shift)
        words *= np.uint64(factor)
    words ^= words >> np.uint64(31)
    return words


def weights(hashes: Words, replicates: int = REPLICATES, seed: int = SEED) -> NDArray[np.uint8]:
    """`[n, replicates]`: how often replicate b draws image k, from Poisson(1) (Chamandy et al. 2012, "Estimating
    uncertainty for massive data streams").

    An entry depends on the seed, the image's hash and b alone, so it is the same in every partition, process and
    method. The probabilities are exact to 2^-53.
    """
    start = _mixed(np.array([seed % 2**64], dtype=np.uint64) + np.uint64(_STEP))
    images = _mixed(hashes ^ start)
    draws = _mixed(np.arange(1, replicates + 1, dtype=np.uint64) * np.uint64(_STEP))
    drawn = np.empty((len(hashes), replicates), dtype=np.uint8)
    rows = max(1, _WORDS_AT_ONCE // max(1, replicates))
    for at in range(0, len(hashes), rows):
        drawn[at : at + rows] = _poisson(_mixed(images[at : at + rows, None] + draws))
    return drawn


def _poisson(words: Words) -> NDArray[np.uint8]:
    """Poisson(1) by inversion of uniform words: the number of tails above each."""
    drawn = np.zeros(words.shape, dtype=np.uint8)
    for tail in _TAILS:
        drawn += words < tail
    return drawn


@dataclass(frozen=True, eq=False)
class MetricSums:
    """Sums of one metric over rows, in `C = 2 M - 1` columns: the M methods, then each method but the first minus the
    first, over rows where both have a value.

    Rows of one image are one cluster. `a + b` is the sums of both, where no image is in both. The same rows in
    another order or partition by image give sums that agree to about 1e-12 of the sum of absolute values.
    """

    seed: int
    """Of the bootstrap."""
    rows: NDArray[np.int64]
    """`[C]` rows with a value."""
    total: Floats
    """`[C]` sum of the values."""
    squares: Floats
    """`[C]` sum of the squared values."""
    images: NDArray[np.int64]
    """`[C]` images with a value."""
    image_total: Floats
    """`[C]` sum of the images' means."""
    image_squares: Floats
    """`[C]` sum of the squared means of images."""
    lowest: Floats
    """`[C]` smallest mean of an image; infinite without one."""
    highest: Floats
    """`[C]` largest mean of an image; minus infinite without one."""
    drawn_total: Floats
    """`[B, C]` sum of weight times value, by replicate."""
    drawn_rows: Floats
    """`[B, C]` sum of the weights of rows with a value, by replicate."""

    @classmethod
    def of(cls, hashes: Words, values: Floats, replicates: int = REPLICATES, seed: int = SEED) -> "MetricSums":
        """From `[n]` hashes of the rows' images and `[n, M]` values, NaN for none; all rows of an image together.

        Raises ValueError for shapes that do not fit and for infinite values.
        """
        if values.ndim != 2 or values.shape[1] < 1 or hashes.shape != values.shape[:1]:
            raise ValueError(f"hashes [n] and values [n, M >= 1] are wanted, got {hashes.shape} and {values.shape}")
        if np.isinf(values).any():
            raise ValueError(f"{np.isinf(values).sum()} values are infinite; NaN stands for a missing one")
        columns = np.hstack([values, values[:, 1:] - values[:, :1]])
        present, filled = (~np.isnan(columns)).astype(np.float64), np.nan_to_num(columns)
        images, image_of = np.unique(hashes, return_inverse=True)
        sums, sizes = _by_image(image_of, filled, len(images)), _by_image(image_of, present, len(images))
        seen, means = sizes > 0, sums / np.maximum(sizes, 1)
        drawn = _drawn(images, np.hstack([sums, sizes]), replicates, seed)
        return cls(
            seed=seed,
            rows=present.sum(0).astype(np.int64),
            total=sums.sum(0),
            squares=(filled**2).sum(0),
            images=seen.sum(0),
            image_total=means.sum(0),
            image_squares=(means**2).sum(0),
            lowest=means.min(0, initial=math.inf, where=seen),
            highest=means.max(0, initial=-math.inf, where=seen),
            drawn_total=drawn[:, : columns.shape[1]],
            drawn_rows=drawn[:, columns.shape[1] :],
        )

    def __add__(self, other: "MetricSums") -> "MetricSums":
        """Raises ValueError if methods, replicates or seeds differ."""
        mine, others = (*self.drawn_total.shape, self.seed), (*other.drawn_total.shape, other.seed)
        if mine != others:
            raise ValueError(f"sums of (replicates, columns, seed) {mine} and {others} do not add up")
        joins = {"seed": min, "lowest": np.minimum, "highest": np.maximum}
        names = [field.name for field in fields(self)]
        return MetricSums(
            **{name: joins.get(name, np.add)(getattr(self, name), getattr(other, name)) for name in names}
        )


def _by_image(image_of: NDArray[np.intp], columns: Floats, num_images: int) -> Floats:
    """`[num_images, C]` sums of the rows of each image."""
    sums = [np.bincount(image_of, column, num_images) for column in columns.T]
    return np.stack(sums, axis=1).astype(np.float64)


def _drawn(images: Words, sums: Floats, replicates: int, seed: int) -> Floats:
    """`[replicates, C]`: the weighted sum over images of `[n, C]` sums."""
    drawn = np.zeros((replicates, sums.shape[1]))
    for at in range(0, len(images), _IMAGES_AT_ONCE):
        part = slice(at, at + _IMAGES_AT_ONCE)
        drawn += weights(images[part], replicates, seed).T.astype(np.float64) @ sums[part]
    return drawn


@dataclass(frozen=True)
class MethodEstimate:
    """The mean of one method, in the unit of the metric."""

    mean: float | None
    """Over rows; None without one."""
    low: float | None
    """Lower end of the 95 % interval; None for fewer than two images."""
    high: float | None
    """Upper end."""
    count: int
    """Rows with a value."""


@dataclass(frozen=True)
class PairedDifference:
    """One method minus the reference on the same rows, in the unit of the metric."""

    difference: float | None
    """Mean over rows; None without one."""
    low: float | None
    """Lower end of the 95 % interval; None for fewer than two images."""
    high: float | None
    """Upper end."""
    p_value: float | None
    """Of the paired t test on the images' mean differences, not corrected; None for fewer than two images."""
    count: int
    """Rows where both have a value."""


def estimate(sums: MetricSums) -> list[MethodEstimate]:
    """One per method, in the order of the columns."""
    num_methods = (len(sums.rows) + 1) // 2
    return [MethodEstimate(_mean(sums, m), *_interval(sums, m), int(sums.rows[m])) for m in range(num_methods)]


def differences(sums: MetricSums) -> list[PairedDifference]:
    """One per method but the first, which is the reference.

    Where images differ in their number of rows, the difference weighs rows alike and the t test images alike.
    """
    num_methods = (len(sums.rows) + 1) // 2
    return [
        PairedDifference(_mean(sums, c), *_interval(sums, c), _p_value(sums, c), int(sums.rows[c]))
        for c in range(num_methods, len(sums.rows))
    ]


def _mean(sums: MetricSums, column: int) -> float | None:
    return float(sums.total[column] / sums.rows[column]) if sums.rows[column] else None


def _interval(sums: MetricSums, column: int) -> tuple[float, float] | tuple[None, None]:
    """Percentile bootstrap interval of the mean over rows, widened for few images."""
    weight = sums.drawn_rows[:, column]
    if sums.images[column] < 2 or not weight.any():
        return None, None
    return _percentiles(sums.drawn_total[weight > 0, column] / weight[weight > 0], int(sums.images[column]))


def _percentiles(replicates: Floats, num_images: int) -> tuple[float, float]:
    """The replicates' interval: the tails are those of Student's t and of the variance with n - 1 (Hesterberg 2015)."""
    reach = math.sqrt(num_images / (num_images - 1)) * stats.t.ppf((1 + LEVEL) / 2, num_images - 1)
    tail = stats.norm.sf(reach)
    low, high = np.quantile(replicates, [tail, 1 - tail])
    return float(low), float(high)


def _p_value(sums: MetricSums, column: int) -> float | None:
    """Two-sided t test that the images' means are 0 on average."""
    num, low, high = int(sums.images[column]), sums.lowest[column], sums.highest[column]
    if num < 2:
        return None
    if high - low <= ROUNDING * max(abs(low), abs(high)):
        return 1.0 if low == high == 0 else 2.0 ** (1 - num)  # no spread to judge by: the sign test
    mean = sums.image_total[column] / num
    variance = (sums.image_squares[column] - num * mean**2) / (num - 1)
    return float(2 * stats.t.sf(abs(mean) / math.sqrt(variance / num), num - 1)) if variance > 0 else 0.0


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """P-values adjusted for their number (Holm 1979): the i-th smallest of m becomes the largest of
    `min(1, (m - j + 1) p_j)` over `j <= i`. None stays None and does not count. Raises ValueError outside [0, 1]."""
    known = sorted((p, place) for place, p in enumerate(p_values) if p is not None)
    if wrong := [p for p, _ in known if not 0 <= p <= 1]:
        raise ValueError(f"p-values lie in [0, 1], got {wrong}")
    adjusted: list[float | None] = [None] * len(p_values)
    floor = 0.0
    for rank, (p, place) in enumerate(known):
        floor = adjusted[place] = max(floor, min(1.0, (len(known) - rank) * p))
    return adjusted
