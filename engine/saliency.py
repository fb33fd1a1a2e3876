"""Saliency maps as arrays: their type, min-max scaling, and what makes a map flat."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Map = NDArray[np.float64]


def minmax(values: Map) -> Map:
    """Scales the values linearly to exactly [0, 1]; a constant map becomes zeros."""
    low, high = values.min(), values.max()
    if high == low:
        return np.zeros_like(values, dtype=np.float64)
    return (values - low) / (high - low)


FLAT = "the map is flat"
"""Why a metric that needs an order or mass has no value."""


def is_flat(values: NDArray[np.floating[Any]]) -> bool:
    """True if the map [H, W] is constant: it has no order and, after `minmax`, no mass."""
    return bool(values.max() == values.min())
