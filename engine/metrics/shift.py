"""How far saliency moves from one map to another: the share of moved mass, and the shift of the centre of mass."""

from functools import cache
from math import hypot

import numpy as np

from blocksight.engine.saliency import Map

CELLS = 16
"""Along each side of the grid on which mass is compared: moves of less than a cell hardly count."""


def cell_shares(saliency_hw: Map) -> Map:
    """The map's mass in equal cells, [CELLS, CELLS], sum 1; cells share a pixel by area.

    A map of zeros gives NaN.
    """
    down, across = (_overlaps(length) for length in saliency_hw.shape)
    mass: Map = down @ saliency_hw @ across.T
    return mass / mass.sum()


@cache
def _overlaps(length: int) -> Map:
    """The share of each pixel in each cell, [CELLS, length]; every column sums to 1."""
    edges = np.linspace(0, length, CELLS + 1)[:, None]
    below: Map = np.clip(edges - np.arange(length), 0, 1)
    return np.diff(below, axis=0)


def moved(one: Map, other: Map) -> float:
    """The share of the mass that must move to turn one map into the other, 0 to 1.

    The total variation distance `sum |p - q| / 2` of the two maps' `cell_shares`; the maps' sizes may differ.
    """
    return float(min(1.0, np.abs(cell_shares(one) - cell_shares(other)).sum() / 2))


def centre(saliency_hw: Map) -> tuple[float, float]:
    """The centre of mass from the top and from the left, each 0 to 1, of a map that holds some mass."""
    down, across = ((np.arange(length) + 0.5) / length for length in saliency_hw.shape)
    total = saliency_hw.sum()
    return float(saliency_hw.sum(1) @ down / total), float(saliency_hw.sum(0) @ across / total)


def focus_shift(one: Map, other: Map, picture: tuple[int, int]) -> float:
    """The distance between the maps' centres of mass as a share of the picture's diagonal, 0 to 1.

    `picture` is the height and width, in any unit, of the picture that the maps cover; map pixels need not be square.
    """
    down, across = (
        side * (second - first) for side, first, second in zip(picture, centre(one), centre(other), strict=True)
    )
    return hypot(down, across) / hypot(*picture)
