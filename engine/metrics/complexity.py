"""Complexity: how concentrated a map is, as entropy, Gini index and effective area."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from blocksight.engine.metrics.metric import MapMetric, Region, Value, undefined
from blocksight.engine.saliency import FLAT, Map, is_flat


class Complexity(MapMetric):
    """Entropy and area fall, and the Gini index grows, with concentration; undefined for a flat map."""

    names = ("entropy", "gini", "effective_area")

    def details(self) -> Mapping[str, Any]:
        return {"entropy": "of S / sum(S), over log(H W)", "effective_area": "sum(S)^2 / (H W sum(S^2))"}

    def of(self, saliency_hw: Map, region: Region | str | None) -> Mapping[str, Value]:
        if is_flat(saliency_hw):
            return dict.fromkeys(self.names, undefined(FLAT))
        return {
            "entropy": Value(entropy(saliency_hw)),
            "gini": Value(gini(saliency_hw)),
            "effective_area": Value(100 * effective_area(saliency_hw)),
        }


def entropy(saliency_hw: Map) -> float:
    """`-sum(p log p) / log(H W)`, `p = S / sum(S)`: 0 for one pixel, 1 for an even map (Bhatt et al., IJCAI 2020)."""
    shares = saliency_hw[saliency_hw > 0] / saliency_hw.sum()
    return float(-(shares * np.log(shares)).sum() / np.log(saliency_hw.size))


def gini(saliency_hw: Map) -> float:
    """The Gini index of the values: 0 for an even map, near 1 for one pixel (Chalasani et al., ICML 2020)."""
    values = np.sort(saliency_hw, axis=None)
    weights = values.size - np.arange(values.size) - 0.5
    return float(1 - 2 * (values * weights).sum() / (values.sum() * values.size))


def effective_area(saliency_hw: Map) -> float:
    """`sum(S)^2 / (H W sum(S^2))`: the share of the picture that an even map with the same spread would cover."""
    return float(saliency_hw.sum() ** 2 / (saliency_hw.size * np.square(saliency_hw).sum()))
