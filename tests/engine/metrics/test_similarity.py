"""How alike two maps are: by hand, and against scipy and scikit-image."""

import numpy as np
import pytest
from scipy import stats
from skimage.metrics import structural_similarity

from blocksight.engine.metrics.similarity import iou_of_tops, pearson, spearman, ssim


@pytest.fixture
def pair():
    """Two maps that are somewhat alike, with many ties, as 8-bit maps have."""
    own = np.random.default_rng(0)
    first = own.random((24, 30))
    second = np.clip(0.7 * first + 0.3 * own.random((24, 30)), 0, 1)
    return np.rint(first * 20) / 20, np.rint(second * 20) / 20


def test_pearson_by_hand():
    assert pearson(np.array([[0.0, 1, 2]]), np.array([[1.0, 3, 5]])) == pytest.approx(1)
    assert pearson(np.array([[0.0, 1, 2]]), np.array([[2.0, 1, 0]])) == pytest.approx(-1)
    assert pearson(np.array([[0.0, 1, 2]]), np.array([[0.0, 2, 1]])) == pytest.approx(0.5)


@pytest.mark.parametrize("measure", [pearson, spearman])
def test_a_constant_map_correlates_with_nothing(measure, pair):
    assert measure(np.full((24, 30), 0.3), pair[0]) == 0


def test_spearman_is_scipys(pair):
    assert spearman(*pair) == pytest.approx(stats.spearmanr(pair[0].ravel(), pair[1].ravel()).statistic, abs=1e-12)


def test_ssim_is_scikit_images(pair):
    assert ssim(*pair) == pytest.approx(structural_similarity(*pair, data_range=1.0), abs=1e-12)
    assert ssim(pair[0], pair[0]) == pytest.approx(1)


def test_tops_overlap_by_hand():
    """The greatest 15 % of 20 pixels are three."""
    one, other = np.zeros((4, 5)), np.zeros((4, 5))
    one[0, :3] = [3, 2, 1]
    other[0, 1:4] = [3, 2, 1]
    assert iou_of_tops(one, other) == 2 / 4
    assert iou_of_tops(one, one) == 1


def test_sparse_maps_without_a_common_pixel_are_not_alike():
    one, other = np.zeros((20, 20)), np.zeros((20, 20))
    one[2, 3:9], other[15, 3:9] = 1, 1
    assert iou_of_tops(one, other) == 0
    other[2, 3:6] = 1
    assert iou_of_tops(one, other) == 3 / 12
    assert iou_of_tops(one, np.zeros((20, 20))) == 0


def test_grey_levels_are_ranked_as_any_values():
    """Spearman of SciPy, over levels with many ties, of any whole type."""
    drawn = np.random.default_rng(4)
    one, other = (drawn.integers(-3, 9, (12, 15)) for _ in range(2))
    wanted = stats.spearmanr(one.ravel(), other.ravel()).statistic
    for kind in (np.int16, np.int64, np.float64):
        assert spearman(one.astype(kind), other.astype(kind)) == pytest.approx(wanted, abs=1e-12)
