"""Regions of a map: thresholds and parts by hand, equal values together, flat maps, and what is no threshold."""

import numpy as np
import pytest

from blocksight.engine.regions import MAX_PARTS, RegionRule, foreground_of

HAND = np.array(
    [
        [0.0, 0.0, 0.0, 0.0, 0.2],
        [0.0, 0.9, 1.0, 0.0, 0.0],
        [0.0, 0.8, 0.0, 0.0, 0.0],
        [0.0, 0.0, 0.0, 0.5, 0.6],
        [0.0, 0.0, 0.0, 0.0, 0.0],
    ]
)
"""Sum 4.0: three cells that touch hold 2.7, two hold 1.1, one holds 0.2."""


def inside(threshold: str, parts: str = "all", smooth: float = 0.0) -> list[list[tuple[int, int]]]:
    rule = RegionRule.parse(threshold, parts, smooth)
    found = foreground_of(HAND, rule)
    assert found is not None
    return [list(zip(*map(np.ndarray.tolist, np.nonzero(part.mask_hw)), strict=True)) for part in found.chosen(parts)]


CORNER, PAIR, DOT = [(1, 1), (1, 2), (2, 1)], [(3, 3), (3, 4)], [(0, 4)]


@pytest.mark.parametrize(
    ("threshold", "wanted"),
    [
        ("share:0.04", [[(1, 2)]]),
        ("share:0.041", [[(1, 1), (1, 2)]]),
        ("share:0.12", [CORNER]),
        ("share:0.20", [CORNER, PAIR]),
        ("share:0.9", [CORNER, PAIR, DOT]),  # the least value is never inside
        ("energy:0.25", [[(1, 2)]]),
        ("energy:0.5", [CORNER]),
        ("energy:0.95", [CORNER, PAIR]),
        ("energy:0.96", [CORNER, PAIR, DOT]),
        ("otsu", [CORNER, PAIR]),
    ],
)
def test_thresholds_by_hand(threshold, wanted):
    assert inside(threshold) == wanted
    assert inside(threshold, "largest") == wanted[:1]


def test_a_part_says_its_shares():
    found = foreground_of(HAND, RegionRule.parse("otsu"))
    assert found is not None
    first, second = found.chosen("all")
    assert (first.area, second.area) == (3 / 25, 2 / 25)
    assert (first.energy, second.energy) == pytest.approx((2.7 / 4, 1.1 / 4))
    assert found.threshold == 0.5
    assert found.num_parts == 2


def test_equal_values_are_inside_together():
    values = np.zeros((4, 4))
    values[:2] = 0.5
    values[0, 0] = 1.0
    found = foreground_of(values, RegionRule.parse("share:0.2"))
    assert found is not None
    assert (found.labels_hw > 0).sum() == 8


def test_cells_that_touch_at_a_corner_are_one_part():
    found = foreground_of(np.eye(4), RegionRule.parse("otsu"))
    assert found is not None
    assert found.num_parts == 1


def test_smoothing_joins_and_drops_specks():
    noise = np.kron(HAND, np.ones((8, 8)))
    noise[::5, ::5] = 0.7
    rough, smooth = (foreground_of(noise, RegionRule.parse("otsu", "all", sigma)) for sigma in (0, 3))
    assert rough is not None
    assert smooth is not None
    assert smooth.num_parts < 4 < rough.num_parts
    (part,) = smooth.chosen("largest")
    assert part.energy == pytest.approx(noise[part.mask_hw].sum() / noise.sum())  # of the map itself


def test_no_more_parts_are_listed_than_the_limit():
    values = np.zeros((40, 40))
    values[::2, ::2] = 1.0
    found = foreground_of(values, RegionRule.parse("otsu", "all"))
    assert found is not None
    assert (found.num_parts, len(list(found.chosen("all")))) == (400, MAX_PARTS)


@pytest.mark.parametrize("threshold", ["otsu", "share:0.5", "energy:0.5"])
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_a_flat_map_has_no_region(threshold, value):
    assert foreground_of(np.full((6, 6), value), RegionRule.parse(threshold, "all", 1.0)) is None


def test_what_is_no_rule_is_refused_with_the_forms():
    for text in ("", "share", "share:0", "share:1", "share:-1", "energy:2", "level:0.5", "share:0.5 ", "share:nan"):
        with pytest.raises(ValueError, match=r"known: otsu, share:0\.2"):
            RegionRule.parse(text)
    with pytest.raises(ValueError, match=r"0\.2 may be share:0\.2 or energy:0\.2"):
        RegionRule.parse("0.2")
    for sigma in (-1, float("nan"), 1000):
        with pytest.raises(ValueError, match="is not from 0 to 100"):
            RegionRule.parse("otsu", "all", sigma)
    with pytest.raises(ValueError, match="NaN"):
        foreground_of(np.array([[0, np.nan]]), RegionRule())
