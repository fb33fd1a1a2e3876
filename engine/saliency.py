"""Saliency maps as arrays: their type, and min-max scaling."""

import numpy as np
from numpy.typing import NDArray

Map = NDArray[np.float64]


def minmax(values: Map) -> Map:
    """Scales the values linearly to exactly [0, 1]; a constant map becomes zeros."""
    low, high = values.min(), values.max()
    if high == low:
        return np.zeros_like(values, dtype=np.float64)
    return (values - low) / (high - low)
