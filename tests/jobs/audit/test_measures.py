"""Measures of maps: by hand, against slow twins, and the definition of a checkerboard."""

import io
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image

from blocksight.engine.metrics import complexity
from blocksight.jobs.audit.measures import MAX_BORDER_MASS, MAX_CHECKERBOARD, measured
from blocksight.jobs.audit.result import GRID, MEASURES
from blocksight.storage.outputs.map_codec import MapError, decode_levels, decode_map, level_counts

SIZES = [(224, 224), (32, 32), (16, 16), (7, 9), (1, 5), (45, 100), (225, 223), (300, 260)]
maps_of_any_size = arrays.arrays(np.uint8, st.tuples(st.integers(1, 40), st.integers(1, 40)))


def levels_of(values) -> np.ndarray:
    """A map as it is stored: uint8 from 0 to 255."""
    values = np.asarray(values, np.float64)
    return np.rint(255 * (values - values.min()) / (values.max() - values.min())).astype(np.uint8)


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return levels_of(np.random.default_rng(seed).random((height, width)) ** 3)


def bell(sigma: float, side: int = 224, y: float = 100, x: float = 90) -> np.ndarray:
    rows, columns = np.mgrid[:side, :side]
    return np.exp(-((rows - y) ** 2 + (columns - x) ** 2) / 2 / sigma**2)


def board(side: int, height: int = 224, width: int = 224) -> np.ndarray:
    rows, columns = np.mgrid[:height, :width]
    return (rows // side + columns // side) % 2 * 1.0


def upsampled(cells: int) -> np.ndarray:
    """A checkerboard with `cells` cells a side, upsampled as explainers do."""
    small = Image.fromarray(board(1, cells, cells).astype(np.float32))
    return np.asarray(small.resize((224, 224), Image.Resampling.BILINEAR))


def values_of(levels: np.ndarray, region: np.ndarray | None = None) -> dict[str, float]:
    return dict(zip(MEASURES, measured(levels[None], [region]).values[0].tolist(), strict=True))


# ---------------------------------------------------------------- by value


@pytest.mark.parametrize("size", [size for size in SIZES if min(size) > 1])
def test_spread_is_that_of_the_evaluations_metrics(size):
    levels = noise(*size)
    saliency, found = levels / 255, values_of(levels)
    for name in ("entropy", "gini", "effective_area"):
        assert found[name] == pytest.approx(getattr(complexity, name)(saliency), abs=1e-9), name


def test_one_pixel_has_no_spread():
    levels = np.zeros((20, 20), np.uint8)
    levels[4, 5] = 255
    found = values_of(levels)
    assert found["entropy"] == pytest.approx(0, abs=1e-12)
    assert found["gini"] == pytest.approx(1 - 1 / 400)
    assert found["effective_area"] == pytest.approx(1 / 400)


@pytest.mark.parametrize("level", [0, 255, 9])
def test_a_constant_map_has_no_measure(level):
    made = measured(np.full((2, 30, 30), level, np.uint8), [np.ones((30, 30), bool), None])
    assert np.isnan(made.values).all()
    assert (made.pooled == level).all()
    assert not made.is_border_only.any()
    assert not made.is_checkerboard.any()


def test_no_maps_have_no_rows():
    made = measured(np.zeros((0, 8, 8), np.uint8))
    assert made.values.shape == (0, len(MEASURES))
    assert made.pooled.shape == (0, GRID, GRID)


@settings(max_examples=60)
@given(maps_of_any_size)
def test_every_measure_lies_in_its_range_whatever_the_map(levels):
    region = levels > 100
    found = values_of(levels, region if region.any() else None)
    assert all(math.isnan(value) or -1e-9 <= value <= 1 + 1e-9 for value in found.values()), found
    assert math.isnan(found["entropy"]) == (levels.min() == levels.max())


def test_a_map_is_measured_alike_in_any_company():
    maps = np.stack([noise(224, 224, seed) for seed in range(7)])
    together = measured(maps)
    for place, alone in enumerate(maps):
        single = measured(alone[None])
        assert (single.values[0] == together.values[place])[: list(MEASURES).index("on_object")].all()
        assert (single.pooled[0] == together.pooled[place]).all()


# ---------------------------------------------------------------- by place


def slow_pooled(levels: np.ndarray) -> np.ndarray:
    """The slow twin: cuts each pixel into 16 x 16 pieces, so that each cell holds whole pieces."""
    fine = np.kron(levels.astype(np.int64), np.ones((GRID, GRID), np.int64))
    height, width = levels.shape
    return fine.reshape(GRID, height, GRID, width).mean((1, 3))


@pytest.mark.parametrize("size", SIZES)
def test_cells_are_means_by_area(size):
    levels = noise(*size)
    pooled, slow = measured(levels[None]).pooled[0], slow_pooled(levels)
    assert pooled.dtype == np.uint8
    assert (pooled == np.rint(slow)).all()


def slow_mass(levels: np.ndarray, share: float, *, corners: bool) -> float:
    """The slow twin of the shares, pixel by pixel; a pixel on a line is cut."""

    def part(index: int, length: int, start: float, stop: float) -> float:
        return max(0.0, min(index + 1, stop * length) - max(index, start * length))

    inside = 0.0
    for y, row in enumerate(levels.tolist()):
        for x, level in enumerate(row):
            if corners:
                tall = part(y, len(levels), 0, share) + part(y, len(levels), 1 - share, 1)
                wide = part(x, len(row), 0, share) + part(x, len(row), 1 - share, 1)
                inside += level * tall * wide
            else:
                tall, wide = part(y, len(levels), share, 1 - share), part(x, len(row), share, 1 - share)
                inside += level * (1 - tall * wide)
    return inside / int(levels.sum())


@pytest.mark.parametrize("size", [(32, 32), (7, 9), (45, 30), (2, 2), (1, 5)])
def test_mass_at_border_and_corners_agrees_with_its_slow_twin(size):
    levels = noise(*size)
    found = values_of(levels)
    assert found["border_mass"] == pytest.approx(slow_mass(levels, 0.1, corners=False), abs=1e-6)
    assert found["corner_mass"] == pytest.approx(slow_mass(levels, 0.2, corners=True), abs=1e-6)


@pytest.mark.parametrize("size", [(224, 224), (33, 57), (300, 260)])
def test_a_nearly_even_map_has_the_shares_of_the_area(size):
    levels = np.full(size, 254, np.uint8)
    levels[size[0] // 2, size[1] // 2] = 255
    found = values_of(levels)
    assert found["border_mass"] == pytest.approx(0.36, abs=1e-4)
    assert found["corner_mass"] == pytest.approx(0.16, abs=1e-4)
    assert found["centre_x"] == pytest.approx(0.5, abs=1e-4)
    assert found["centre_y"] == pytest.approx(0.5, abs=1e-4)


def test_the_centre_is_that_of_the_pixels_middles():
    levels = np.zeros((10, 20), np.uint8)
    levels[2, 4], levels[2, 8] = 100, 200
    found = values_of(levels)
    assert found["centre_x"] == pytest.approx((100 * 4.5 + 200 * 8.5) / 300 / 20)
    assert found["centre_y"] == pytest.approx(0.25)


@pytest.mark.parametrize(("outside", "is_border"), [(0.79, False), (0.81, True)])
def test_a_map_at_the_border_alone_is_seen(outside, is_border):
    levels = np.zeros((40, 40), np.uint8)
    levels[0, 7], levels[20, 20] = round(250 * outside), round(250 * (1 - outside))
    assert (values_of(levels)["border_mass"] > MAX_BORDER_MASS) is is_border
    assert measured(levels[None]).is_border_only.tolist() == [is_border]


# ---------------------------------------------------------------- checkerboards


@pytest.mark.parametrize(
    ("name", "saliency", "low", "high"),
    [
        ("checkerboard", board(1), 0.999, 1),
        ("of an odd size", board(1, 225, 101), 0.999, 1),
        ("small", board(1, 32, 32), 0.999, 1),
        ("of 2 x 2", board(2), 0.999, 1),
        ("of 4 x 4", board(4), 0.7, 0.76),
        ("stripes", board(1)[:1].repeat(224, 0), 0.99, 1),
        ("from 112 cells", upsampled(112), 0.98, 1),
        ("from 56 cells", upsampled(56), 0.95, 1),
        ("shifted", np.roll(upsampled(56), (3, 1), (0, 1)), 0.9, 1),
        ("a blob times it", bell(30) * board(1), 0.4, 0.6),
        ("a blob with some", bell(30) * (1 + 0.5 * board(1)), 0.02, 0.1),
        ("noise", np.random.default_rng(0).random((224, 224)), 0.03, 0.06),
        ("a pixel", bell(0.2), 0.05, 0.1),
        ("a blob", bell(30), 0, 1e-3),
        ("a small blob", bell(8), 0, 0.01),
        ("an edge", np.mgrid[:224, :224][1] > 100.0, 0, 0.01),
        ("a ramp", np.mgrid[:224, :224].sum(0), 0, 1e-3),
        ("a coarse grid", upsampled(14), 0, 0.05),
    ],
)
def test_what_alternates_is_a_checkerboard(name, saliency, low, high):
    levels = levels_of(saliency)
    found = values_of(levels)["checkerboard"]
    assert low <= found <= high, name
    assert measured(levels[None]).is_checkerboard.tolist() == [found > MAX_CHECKERBOARD]


def slow_checkerboard(levels: np.ndarray) -> float:
    """The slow twin for one window: projects the map on the functions by least squares."""
    height, width = levels.shape
    centred = levels - levels.mean()

    def functions(length: int, *, waves: bool) -> np.ndarray:
        pixels = np.arange(length)
        made = [np.ones(length), pixels]
        if waves:
            made += [np.cos(2 * np.pi * pixels / period) for period in (2, 4, 8)]
            made += [np.sin(2 * np.pi * pixels / period) for period in (4, 8)]
        return np.stack(made, 1)

    def explained(*, waves: bool) -> float:
        basis = np.kron(functions(height, waves=waves), functions(width, waves=waves))
        fitted = basis @ np.linalg.lstsq(basis, centred.ravel(), rcond=None)[0]
        return float((fitted**2).sum())

    return (explained(waves=True) - explained(waves=False)) / float((centred**2).sum())


@pytest.mark.parametrize("size", [(16, 20), (32, 32), (17, 40)])
def test_the_share_that_alternates_agrees_with_its_slow_twin(size):
    levels = levels_of(noise(*size) / 255 + 0.5 * board(2, *size))
    assert values_of(levels)["checkerboard"] == pytest.approx(slow_checkerboard(levels), abs=1e-5)


def test_a_map_of_few_pixels_has_no_share_that_alternates():
    for size in ((15, 40), (7, 7)):
        made = measured(levels_of(noise(*size))[None])
        assert np.isnan(made.of("checkerboard")).all()
        assert not made.is_checkerboard.any()


# ---------------------------------------------------------------- by ground truth


def slow_shares(levels: np.ndarray, region: np.ndarray) -> tuple[float, float, float]:
    reach = 0.1 * max(levels.shape)
    sums = [0, 0, 0]
    objects = np.argwhere(region)
    for y, row in enumerate(levels.tolist()):
        for x, level in enumerate(row):
            distance = np.hypot(*(objects - (y, x)).T).min()
            sums[0 if distance == 0 else 1 if distance <= reach else 2] += level
    on_object, on_context, elsewhere = (part / int(levels.sum()) for part in sums)
    return on_object, on_context, elsewhere


@pytest.mark.parametrize("size", [(32, 32), (20, 33)])
def test_shares_on_object_context_and_elsewhere(size):
    levels, region = noise(*size), np.zeros(size, bool)
    region[4:9, 11:20] = region[15, 2] = True
    found = values_of(levels, region)
    shares = [found[name] for name in ("on_object", "on_context", "elsewhere")]
    assert shares == pytest.approx(slow_shares(levels, region))
    assert sum(shares) == pytest.approx(1)
    assert min(shares) > 0


def test_maps_without_a_region_have_no_such_share():
    levels = noise(16, 16)
    made = measured(np.stack([levels, levels]), [None, levels > 100])
    assert np.isnan(made.of("on_object")).tolist() == [True, False]
    assert np.isnan(made.of("elsewhere")).tolist() == [True, False]
    assert not np.isnan(made.of("entropy")).any()


# ---------------------------------------------------------------- levels


def test_levels_are_those_of_the_stored_picture():
    levels = noise(9, 5)
    buffer = io.BytesIO()
    Image.fromarray(levels).save(buffer, "PNG")
    assert (decode_levels(buffer.getvalue(), (9, 5)) == levels).all()
    assert decode_map(buffer.getvalue(), (9, 5)).tolist() == (levels.astype(np.float32) / np.float32(255)).tolist()
    assert level_counts(levels) == np.bincount(levels.ravel(), minlength=256).tolist()
    with pytest.raises(MapError):
        decode_levels(buffer.getvalue()[:60], (9, 5))
