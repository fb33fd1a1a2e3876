"""How far saliency moves: by hand, and against slow loops."""

import numpy as np
import pytest

from blocksight.engine.metrics.shift import CELLS, cell_shares, centre, focus_shift, moved


def slow_shares(saliency_hw):
    """Every pixel cut into 48 x 48 crumbs, each of which lies in one cell where sides divide 48 * 16."""
    height, width = saliency_hw.shape
    shares = np.zeros((CELLS, CELLS))
    for y in range(48 * height):
        for x in range(48 * width):
            shares[y * CELLS // (48 * height), x * CELLS // (48 * width)] += saliency_hw[y // 48, x // 48]
    return shares / shares.sum()


def test_cells_are_those_of_crumbs():
    own = np.random.default_rng(0)
    for shape in [(3, 5), (20, 2)]:
        saliency = own.random(shape)
        assert cell_shares(saliency) == pytest.approx(slow_shares(saliency), abs=1e-12)
    even = cell_shares(own.random((64, 32)))
    assert even.shape == (CELLS, CELLS)
    assert even.sum() == pytest.approx(1)


def test_what_moves_by_hand():
    one, other = np.zeros((32, 32)), np.zeros((32, 32))
    one[0, 0] = one[31, 31] = 0.5
    other[0, 0] = other[31, 0] = 1.0
    assert moved(one, other) == pytest.approx(0.5)
    assert moved(one, 0.3 * one) == pytest.approx(0, abs=1e-15)
    assert moved(one[:16], other[16:]) == pytest.approx(1)
    large = np.kron(one, np.ones((3, 2)))
    assert moved(one, large) == pytest.approx(0, abs=1e-12)
    assert moved(one, other) == moved(other, one)


def test_centres_and_their_distance_by_hand():
    one, other = np.zeros((2, 4)), np.zeros((4, 8))
    one[0, 0] = 1
    other[3, 7] = other[3, 6] = 2
    assert centre(one) == (0.25, 0.125)
    assert centre(other) == (0.875, 0.875)
    assert focus_shift(one, other, (30, 40)) == pytest.approx(np.hypot(30 * 0.625, 40 * 0.75) / 50)
    assert focus_shift(one, one, (30, 40)) == 0
