"""The sanity check: a map must change when the model's weights become random, layer by layer from the top."""

import copy
from collections.abc import Callable, Mapping
from math import ceil
from typing import Any

import numpy as np
import torch
from torch import nn

from blocksight.engine.explainers.explainer import Explainer
from blocksight.engine.metrics.metric import Maps, Metric, Value, undefined
from blocksight.engine.model.adapter import ModelAdapter
from blocksight.engine.saliency import Map, is_flat, minmax

STAGES = (0.25, 0.5, 0.75, 1.0)
"""Shares of the layers, from the output down, whose weights are random."""


def randomised(module: nn.Module, share: float, seed: int) -> nn.Module:
    """A copy in which the last `share` of the layers with weights is reset, as before training.

    Layers without a method to reset them get their own weights in a random order.
    """
    fresh = copy.deepcopy(module)
    layers = [layer for layer in fresh.modules() if any(True for _ in layer.parameters(recurse=False))]
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        for layer in layers[len(layers) - ceil(share * len(layers)) :]:
            reset = getattr(layer, "reset_parameters", None) or getattr(layer, "_reset_parameters", None)
            if callable(reset):
                reset()
            else:
                for parameter in layer.parameters(recurse=False):
                    order = torch.randperm(parameter.numel()).to(parameter.device)
                    parameter.copy_(parameter.flatten()[order].view_as(parameter))
    return fresh


def rank_correlation(one: Map, other: Map) -> float:
    """Spearman's rank correlation of two maps, -1 to 1; ties share the mean of their ranks. NaN where one is flat."""
    if is_flat(one) or is_flat(other):
        return float("nan")
    return float(np.corrcoef(_mean_ranks(one), _mean_ranks(other))[0, 1])


def _mean_ranks(values: Map) -> Map:
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    last = count.cumsum()
    return (last - (count - 1) / 2)[place.ravel()]


class Sanity(Metric):
    """The absolute rank correlation with the map under random weights (Adebayo et al., NeurIPS 2018): 0 to 1.

    The curve has one point per share of random layers. The value is its last one, where all weights are random.
    """

    names = ("sanity",)

    def __init__(self, adapter: ModelAdapter, make: Callable[[ModelAdapter], Explainer], seed: int) -> None:
        """`make` builds the explainer that made the maps, for any model; `seed` draws the weights."""
        self.adapter, self.make, self.seed = adapter, make, seed

    def details(self) -> Mapping[str, Any]:
        return {"stages": STAGES, "similarity": "Spearman", "order": "output to input", "seed": self.seed}

    def evaluate(self, maps: Maps) -> list[list[Mapping[str, Value]]]:
        curves: dict[tuple[int, int], list[float]] = {place: [] for place in maps.positions()}
        for share in STAGES:
            module = randomised(self.adapter.module, share, self.seed)
            explanations = self.make(self.adapter.with_module(module)).explain(
                maps.inputs_nchw, maps.target, maps.explainer_seeds
            )
            for image, index in curves:
                other = np.nan_to_num(explanations[image][index].saliency_hw)
                curves[image, index].append(abs(rank_correlation(maps.saliency[image][index], minmax(other))))
        result: list[list[Mapping[str, Value]]] = [[] for _ in maps.saliency]
        for (image, _), curve in curves.items():
            is_known = np.isfinite(curve[-1])
            value = (
                Value(curve[-1], curve=tuple(curve)) if is_known else undefined("the map is flat, or the random one")
            )
            result[image].append({"sanity": value})
        return result
