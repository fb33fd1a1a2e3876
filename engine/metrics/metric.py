"""What every metric is: names, a protocol whose hash stands beside each value, and a value or a reason per map."""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from blocksight.engine.catalog.forward_setting import ForwardSetting
from blocksight.engine.model.targets import ClassProbability
from blocksight.engine.saliency import Map

Region = NDArray[np.bool_]
"""Where the target is, [H, W]."""


@dataclass(frozen=True)
class Value:
    """What one metric says of one map."""

    value: float | None
    """None: it is not defined for this map, and `reason` says why."""
    reason: str | None = None
    curve: tuple[float, ...] | None = None
    """The points that the value sums up, where it sums up a curve."""


def undefined(reason: str) -> Value:
    """No value, never zero: means leave it out."""
    return Value(None, reason)


@dataclass(frozen=True)
class Maps:
    """Some images with their maps, one per target."""

    inputs_nchw: Tensor
    """As `adapter.normalise` gives them."""
    target: ClassProbability
    saliency: Sequence[Sequence[Map]]
    """Per image and target the map [H, W], min-maxed to [0, 1]; zeros where it was constant."""
    scores: Sequence[Sequence[float]]
    """The targets' scores on the whole images."""
    ranks: Sequence[Sequence[int]]
    """The targets' places among the model's classes; 0 is the prediction."""
    regions: Sequence[Sequence[Region | str | None]]
    """Where the targets are; None where nobody has said, or in words why what was said is of no use."""
    seeds: Sequence[int]
    """One per image, for what is random about the metric: the same for every method."""
    explainer_seeds: Sequence[int]
    """One per image, from which the explainer drew."""

    def each(self) -> list[tuple[int, int]]:
        """Image and target number of every map, in order."""
        return [(image, index) for image, own in enumerate(self.saliency) for index in range(len(own))]


class Metric(ABC):
    """One evaluation, which may give several named values."""

    names: tuple[str, ...]

    @cached_property
    def protocol(self) -> Mapping[str, Any]:
        """Everything that a value depends on beside map, model, record and forward setting, as plain values."""
        return {"metric": "/".join(self.names), "map": "8 bit", **self.details()}

    def digest(self, setting: ForwardSetting) -> str:
        """First 16 hex digits of the sha256 of the protocol's canonical JSON; values of two are never averaged.

        `setting` is how the maps, and the metric's own masks, were scored.
        """
        protocol = {**self.protocol, "forward": setting.protocol}
        return hashlib.sha256(json.dumps(protocol, sort_keys=True).encode()).hexdigest()[:16]

    @abstractmethod
    def details(self) -> Mapping[str, Any]:
        """Space, baseline, steps, score, tie rule: whatever applies."""

    @abstractmethod
    def evaluate(self, maps: Maps) -> list[list[Mapping[str, Value]]]:
        """Per image and target the values by name."""


class MapMetric(Metric):
    """A metric that looks at one map at a time and asks no model."""

    def evaluate(self, maps: Maps) -> list[list[Mapping[str, Value]]]:
        return [
            [self.of(one, region) for one, region in zip(own, regions, strict=True)]
            for own, regions in zip(maps.saliency, maps.regions, strict=True)
        ]

    @abstractmethod
    def of(self, saliency_hw: Map, region: Region | str | None) -> Mapping[str, Value]:
        """The values of one map."""


TIES = "value descending, then row-major position ascending"


def ranks_of(saliency_hw: Map) -> NDArray[np.int64]:
    """The place of every pixel in the order of falling value, 0 first, [H, W]; ties by `TIES`."""
    order = np.argsort(-saliency_hw, axis=None, kind="stable")
    places = np.empty(order.size, dtype=np.int64)
    places[order] = np.arange(order.size)
    return places.reshape(saliency_hw.shape)


def is_flat(saliency_hw: Map) -> bool:
    """Whether the map is constant and so says nothing."""
    return bool(saliency_hw.max() == saliency_hw.min())
