"""Measures saliency maps: how they are spread, where they lie, and whether they are usable."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from blocksight.jobs.audit.result import GRID, MEASURES
from blocksight.storage.outputs.map_codec import level_counts

Floats = NDArray[np.floating]
Levels = NDArray[np.uint8]
"""Stored maps [N, H, W]: value / 255 is in [0, 1]; a constant map is all zeros."""
Region = NDArray[np.bool_]

BORDER, CORNER, CONTEXT = 0.1, 0.2, 0.1
"""Widths of the border, the corners and the context around an object, as shares of the picture's sides (of the longer
side for the context)."""
MAX_BORDER_MASS = 0.8
"""A map with a higher `border_mass` is border only; an even map has 0.36."""
MAX_CHECKERBOARD = 0.25
"""A map with a higher `checkerboard` is a checkerboard; white noise has 0.04."""
PERIODS = (2, 4, 8)
"""Periods of waves in pixels: of the map itself, and of grids that were upsampled two and four times."""
WINDOW = 32
"""Pixels over which a wave must keep its phase to count."""

_GLOBAL = ("inside", "corners", "all", "place")
_COUNTED = tuple(name for name in MEASURES if name in ("entropy", "gini", "effective_area"))
_TRUTH = ("on_object", "on_context", "elsewhere")
_SINGLE_THREADED = 2**18
"""Multiply-adds of one matrix product. BLAS splits larger ones over its own threads, and those of many workers
block each other: on two cores a hundred times slower than one thread."""


@dataclass(frozen=True, eq=False)
class Measured:
    """The measures of N maps."""

    values: NDArray[np.float64]
    """[N, len(MEASURES)] in the order of `MEASURES`, each in [0, 1]; NaN if not defined."""
    pooled: NDArray[np.uint8]
    """[N, GRID, GRID] means of the cells; a pixel in several cells counts in each by its area."""

    @classmethod
    def joined(cls, parts: Sequence["Measured"]) -> "Measured":
        """The parts' maps, one part after the other."""
        none = cls(np.zeros((0, len(MEASURES))), np.zeros((0, GRID, GRID), np.uint8))
        parts = [none, *parts]
        return cls(np.concatenate([part.values for part in parts]), np.concatenate([part.pooled for part in parts]))

    def of(self, name: str) -> NDArray[np.float64]:
        """[N] values of the measure with this name."""
        return self.values[:, list(MEASURES).index(name)]

    @property
    def is_border_only(self) -> NDArray[np.bool_]:
        """[N] whether nearly all of the map lies at the border."""
        return self.of("border_mass") > MAX_BORDER_MASS

    @property
    def is_checkerboard(self) -> NDArray[np.bool_]:
        """[N] whether much of the map alternates from pixel to pixel, or from cell to cell of a fine grid."""
        return self.of("checkerboard") > MAX_CHECKERBOARD


def measured(maps: Levels, regions: Sequence[Region | None] | None = None) -> Measured:
    """All measures of maps of one size. `regions`: each map's object, bool [H, W]; None without ground truth.

    A map's values do not depend on the other maps. A constant map has NaN for all; a map without a region has NaN for
    the measures that need one. Needs six times the bytes of the maps, twelve times beyond 65,000 pixels.
    """
    num, height, width = maps.shape
    axes = _axis(height), _axis(width)
    dtype = np.float32 if 255 * height * width < 2**24 else np.float64  # below that every sum of levels is exact
    products = _products(maps.astype(dtype), axes[0].weights.astype(dtype), axes[1].weights.astype(dtype))
    counts = np.array([level_counts(one) for one in maps], np.float64).reshape(num, 256)
    values = {
        **_spread_measures(counts),
        **_place_measures(products),
        "checkerboard": _checkerboard(products, axes, counts),
        **_truth_measures(maps, regions or [None] * num),
    }
    stacked = np.stack([values[name] for name in MEASURES], axis=1)
    stacked[counts.max(1) == height * width] = np.nan
    cells = products[:, :GRID, :GRID].astype(np.float64) / (height * width)
    return Measured(stacked, np.rint(cells).astype(np.uint8))


# ---------------------------------------------------------------- measures of values


def _spread_measures(counts: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
    """The measures of `engine/metrics/complexity.py`, from counts [N, 256] of the levels."""
    levels = np.arange(256.0)
    size, mass = counts.sum(1), _sums(counts, levels)
    with np.errstate(divide="ignore", invalid="ignore"):
        entropy = (np.log(mass) - _sums(counts, _times_log(levels)) / mass) / np.log(size)
        below = np.cumsum(counts, 1) - counts
        ranks = counts * (size[:, None] - below - counts / 2)  # sums of a level's ranks from the top, minus 1/2 each
        gini = 1 - 2 * _sums(ranks, levels) / (mass * size)
        area = mass**2 / (size * _sums(counts, levels**2))
    return dict(zip(_COUNTED, (entropy, gini, area), strict=True))


def _sums(counts: NDArray[np.float64], weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """[N] weighted sums. A matrix product would add a row's values in an order that depends on N."""
    return (counts * weights).sum(1)


def _times_log(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return values * np.log(np.where(values > 0, values, 1))


# ---------------------------------------------------------------- measures of places


@dataclass(frozen=True, eq=False)
class _Axis:
    """Weights [K, L] of the L pixels along one side: cells, those of `_GLOBAL`, smooth and alternating functions."""

    weights: NDArray[np.float64]
    num_smooth: int

    @property
    def first_smooth(self) -> int:
        return GRID + len(_GLOBAL)

    @property
    def first_alternating(self) -> int:
        return self.first_smooth + self.num_smooth


@lru_cache(maxsize=64)
def _axis(length: int) -> _Axis:
    cells = GRID * np.stack([_overlap(length, k / GRID, (k + 1) / GRID) for k in range(GRID)])
    inside = _overlap(length, BORDER, 1 - BORDER)
    corners = _overlap(length, 0, CORNER) + _overlap(length, 1 - CORNER, 1)
    place = (np.arange(length) + 0.5) / length
    smooth, alternating = _bases(length)
    weights = np.vstack([np.rint(cells), inside, corners, np.ones(length), place, smooth, alternating])
    return _Axis(weights, len(smooth))


def _overlap(length: int, start: float, stop: float) -> NDArray[np.float64]:
    """[length] the part of each pixel that lies between two shares of the side."""
    pixels = np.arange(length)
    return np.clip(np.minimum(pixels + 1, stop * length) - np.maximum(pixels, start * length), 0, 1)


def _products(maps: Floats, rows: Floats, columns: Floats) -> Floats:
    """[N, K, K] `rows @ map @ columns.T` of each map, in strips small enough for one BLAS thread."""
    return _product(rows, _product(maps, columns.T))


def _product(left: Floats, right: Floats) -> Floats:
    height, depth, width = left.shape[-2], left.shape[-1], right.shape[-1]
    made = np.empty((*(left if left.ndim > right.ndim else right).shape[:-2], height, width), left.dtype)
    step = max(1, _SINGLE_THREADED // (depth * width))
    for start in range(0, height, step):
        strip = slice(start, start + step)
        np.matmul(left[..., strip, :], right, out=made[..., strip, :])
    return made


def _place_measures(products: Floats) -> dict[str, NDArray[np.float64]]:
    first, stop = GRID, GRID + len(_GLOBAL)
    inside, corners, whole, place = range(len(_GLOBAL))
    sums = products[:, first:stop, first:stop].astype(np.float64)
    mass = np.where(sums[:, whole, whole] > 0, sums[:, whole, whole], np.nan)
    return {
        "border_mass": np.clip(1 - sums[:, inside, inside] / mass, 0, 1),
        "corner_mass": np.clip(sums[:, corners, corners] / mass, 0, 1),
        "centre_x": sums[:, whole, place] / mass,
        "centre_y": sums[:, place, whole] / mass,
    }


# ---------------------------------------------------------------- checkerboards


def _checkerboard(products: Floats, axes: tuple[_Axis, _Axis], counts: NDArray[np.float64]) -> NDArray[np.float64]:
    """[N] the share of the map's variance that alternates, 0 to 1.

    In windows of about 32 x 32 pixels the map is projected on products f(y) g(x). At least one of f and g is a wave of
    period 2, 4 or 8 pixels; the other is a wave or a straight line. Waves are orthogonal to straight lines.

    Values at 224 x 224: checkerboards of 1 x 1 or 2 x 2 pixels and stripes 1; of 4 x 4 pixels 0.73 (0.97 if upsampled
    bilinearly); a blob times a checkerboard 0.5; white noise 0.04; a single pixel 0.07; a bell 0.04 to 0.00 for
    standard deviations of 3 to 20 pixels. NaN for maps with a side below 16 pixels, where a bell would be a wave.
    """
    if min(len(axis.weights[0]) for axis in axes) < GRID:
        return np.full(len(products), np.nan)
    levels = np.arange(256.0)
    variation = _sums(counts, levels**2) - _sums(counts, levels) ** 2 / counts.sum(1)
    smooth_y, smooth_x = (slice(axis.first_smooth, axis.first_alternating) for axis in axes)
    every_y, every_x = (slice(axis.first_smooth, None) for axis in axes)
    energy = _energy(products[:, every_y, every_x]) - _energy(products[:, smooth_y, smooth_x])
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.clip(energy / variation, 0, 1)


def _energy(coefficients: Floats) -> NDArray[np.float64]:
    return np.square(coefficients, dtype=np.float64).sum((1, 2))


def _bases(length: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Orthonormal functions along a side: straight lines of all windows, and waves, each [number, length]."""
    edges = np.rint(np.linspace(0, length, max(1, length // WINDOW) + 1)).astype(int)
    made = [_window_bases(length, start, stop) for start, stop in pairwise(edges)]
    return np.vstack([smooth for smooth, _ in made]), np.vstack([waves for _, waves in made])


def _window_bases(length: int, start: int, stop: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    pixels = np.arange(start, stop, dtype=np.float64)
    lines = [np.ones_like(pixels), pixels - pixels.mean()]
    angles = [2 * math.pi * pixels / period for period in PERIODS]
    waves = [np.cos(angle) for angle in angles] + [np.sin(angle) for angle in angles[1:]]  # period 2 has no sine
    bases = np.zeros((2, len(lines) + len(waves), length))
    found = [0, 0]
    known: list[NDArray[np.float64]] = []
    for place, function in enumerate([*lines, *waves]):
        residual = function - sum((own * (own @ function) for own in known), np.zeros_like(function))
        norm = np.linalg.norm(residual)
        if norm > 1e-6 * math.sqrt(len(pixels)):  # a window of few pixels has few independent functions
            kind = int(place >= len(lines))
            known.append(residual / norm)
            bases[kind, found[kind], start:stop] = known[-1]
            found[kind] += 1
    return bases[0, : found[0]], bases[1, : found[1]]


# ---------------------------------------------------------------- measures with ground truth


def _truth_measures(maps: Levels, regions: Sequence[Region | None]) -> dict[str, NDArray[np.float64]]:
    values = np.full((len(maps), len(_TRUTH)), np.nan)
    for place, (one, region) in enumerate(zip(maps, regions, strict=True)):
        if region is not None and one.any():
            values[place] = _shares(one, region)
    return dict(zip(_TRUTH, values.T, strict=True))


def _shares(one: NDArray[np.uint8], region: Region) -> tuple[float, float, float]:
    """The map's shares on the region, within `CONTEXT` around it, and elsewhere."""
    from scipy.ndimage import distance_transform_edt

    near = np.asarray(distance_transform_edt(~region)) <= CONTEXT * max(one.shape)
    mass, on_object, on_near = (float(one[where].sum(dtype=np.int64)) for where in (..., region, near))
    return on_object / mass, (on_near - on_object) / mass, (mass - on_near) / mass
