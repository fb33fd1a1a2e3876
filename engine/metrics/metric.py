"""The base of all metrics: names, a protocol with its digest, and per map a value or the reason for none."""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from blocksight.engine.catalog.forward_setting import ForwardSetting
from blocksight.engine.catalog.target_expressions import parse_formula
from blocksight.engine.model.targets import Target
from blocksight.engine.saliency import Map

Region = NDArray[np.bool_]
"""Where the target is, [H, W]."""


@dataclass(frozen=True)
class Value:
    """One metric's value for one map."""

    value: float | None
    """None: undefined for this map; `reason` says why."""
    reason: str | None = None
    curve: tuple[float, ...] | None = None
    """The points of the curve, if the value is its area."""


def undefined(reason: str) -> Value:
    """No value; means leave it out."""
    return Value(None, reason)


@dataclass(frozen=True)
class Maps:
    """Some images with their maps, one per target."""

    inputs_nchw: Tensor
    """As `adapter.normalise` gives them."""
    target: Target
    saliency: Sequence[Sequence[Map]]
    """Per image and target the map [H, W], min-maxed to [0, 1]; zeros where it was constant."""
    scores: Sequence[Sequence[float]]
    """The targets' scores on the whole images."""
    ranks: Sequence[Sequence[int | None]]
    """The targets' places among the model's classes; 1 is the prediction. None: the target is no class."""
    regions: Sequence[Sequence[Region | str | None]]
    """The targets' regions; None if not given, or the reason as text if the given region cannot be used."""
    seeds: Sequence[int]
    """One per image, for the metric's random numbers: the same for every method."""
    explainer_seeds: Sequence[int]
    """One per image: the explainer's."""

    def positions(self) -> list[tuple[int, int]]:
        """Image and target number of every map, in order."""
        return [(image, index) for image, own in enumerate(self.saliency) for index in range(len(own))]


def score_of(formula: str) -> str | None:
    """What a metric reads of a row's target, for its protocol; None for a class's score, as the readout says it."""
    found = parse_formula(formula)
    if found.features:
        kinds = sorted({"class" if isinstance(own, int) else own.kind for _, own in found.terms})
        return f"{'a sum of ' if len(found.terms) > 1 else ''}{', '.join(kinds)}"
    return None if found.is_score else f"{found.reading} of {'a sum' if found.target_class is None else 'a class'}"


class Metric(ABC):
    """One evaluation that gives one or more named values."""

    names: tuple[str, ...]

    @cached_property
    def protocol(self) -> Mapping[str, Any]:
        """Everything that a value depends on beside map, model, record and forward setting, as plain values."""
        return {"metric": "/".join(self.names), "map": "8 bit", **self.details()}

    def digest(self, setting: ForwardSetting, score: str | None = None) -> str:
        """First 16 hex digits of the sha256 of the protocol's canonical JSON; different digests are never averaged.

        `setting` is the forward setting of the maps and of the metric's own masks; `score` says what is read of the
        target where it is no class's score (see `score_of`).
        """
        own = {"score": score} if score is not None and "score" in self.protocol else {}
        protocol = {**self.protocol, **own, "forward": setting.protocol}
        return hashlib.sha256(json.dumps(protocol, sort_keys=True).encode()).hexdigest()[:16]

    @abstractmethod
    def details(self) -> Mapping[str, Any]:
        """The metric's part of the protocol: space, baseline, steps, score, tie rule."""

    @abstractmethod
    def evaluate(self, maps: Maps) -> list[list[Mapping[str, Value]]]:
        """Per image and target the values by name."""


class MapMetric(Metric):
    """A metric that reads one map at a time and no model."""

    def evaluate(self, maps: Maps) -> list[list[Mapping[str, Value]]]:
        return [
            [self.of(one, region) for one, region in zip(own, regions, strict=True)]
            for own, regions in zip(maps.saliency, maps.regions, strict=True)
        ]

    @abstractmethod
    def of(self, saliency_hw: Map, region: Region | str | None) -> Mapping[str, Value]:
        """The values of one map."""


TIE_SEED = 17
TIES = f"value descending, then splitmix64({TIE_SEED} + row-major position) ascending"
"""A sparse map has few pixels with a value. In row-major order the top of the picture would be taken for the rest."""


def ranks_of(saliency_hw: Map) -> NDArray[np.int64]:
    """The rank of every pixel by falling value, from 0, [H, W]; ties by `TIES`."""
    scattered = scattered_places(saliency_hw.size)
    order = scattered[np.argsort(-saliency_hw.ravel()[scattered], kind="stable")]
    places = np.empty(order.size, dtype=np.int64)
    places[order] = np.arange(order.size)
    return places.reshape(saliency_hw.shape)


def first_pixels(saliency_hw: Map, count: int) -> NDArray[np.bool_]:
    """Where `ranks_of` is less than `count`, [H, W]: the same pixels, without sorting them. `count` is at least 1."""
    values = saliency_hw.ravel()
    least = np.partition(values, values.size - count)[values.size - count]
    first = values > least
    tied = np.flatnonzero(values == least)
    num_wanted = count - int(first.sum())
    by_hash = np.argpartition(_scattered_ranks(values.size)[tied], num_wanted - 1)
    first[tied[by_hash[:num_wanted]]] = True
    return first.reshape(saliency_hw.shape)


@lru_cache(maxsize=8)
def _scattered_ranks(size: int) -> NDArray[np.intp]:
    """The place of every row-major position in the order of the hash, [size]."""
    return np.argsort(scattered_places(size))


@lru_cache(maxsize=8)
def scattered_places(size: int) -> NDArray[np.intp]:
    """The row-major positions in the order of a hash, [size]: the same on every machine, for every map and method.

    The hash is the finaliser of splitmix64 (Steele, Lea and Flood 2014), a bijection: no two positions tie.
    """
    words = np.arange(size, dtype=np.uint64) + np.uint64(TIE_SEED)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        words = (words ^ (words >> np.uint64(shift))) * np.uint64(factor)
    return np.argsort(words ^ (words >> np.uint64(31)))
