"""Faithfulness: the score while pixels are removed or kept in the order of the map."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from blocksight.engine.catalog.readouts import READOUTS
from blocksight.engine.metrics.metric import TIES, Maps, Metric, Value, first_pixels, ranks_of, undefined
from blocksight.engine.model.targets import Readout, TopClass
from blocksight.engine.model.transfers import sent, to_host
from blocksight.engine.saliency import FLAT, NEGATIVE, Map, is_flat
from blocksight.engine.scoring.perturb import DROP, Perturbation, blurred
from blocksight.engine.scoring.scorer import MaskSet, MaskSource, Scorer

KEPT_FRACTION = 0.15
LEVELS = (1.0, 0.5, 0.15)
NUM_STEPS = 28
"""Steps of a curve from no pixel to all; at 224 pixels a side that is 8 rows per step."""
BLUR_REACH, BLUR_SIGMA = 25 / 224, 50 / 224
"""Blur of the picture that insertion starts from, as shares of the shorter side: 51 pixels wide at 224."""
AGREEMENT_SHARES = tuple(share / 10 for share in range(10))
"""Shares of pixels that POS and NEG remove."""

DROP_PASSES = "float32; as many whole patches as pixels, at least one"
"""How the baseline `drop` leaves patches out, whatever the job's forward setting."""

Removed = Literal["top", "bottom"]
Place = tuple[int, int]
"""A map's image and the number of its target."""


@dataclass(frozen=True)
class RankedMasks(MaskSource):
    """Masks that remove the first pixels of an order."""

    image: int
    ranks_hw: Tensor
    """The place of every pixel in the order, from 0, int32 [H, W]."""
    counts: Tensor
    """Pixels that each mask removes, int32 [K], on the device of the ranks."""
    weights_hw: Tensor | None = None
    """Factors of the kept pixels; None: 1."""
    fill: Perturbation | None = None
    """Replaces removed pixels; None: the scorer's baseline."""

    @property
    def is_binary(self) -> bool:
        return self.weights_hw is None

    def __len__(self) -> int:
        return len(self.counts)

    def masks(self, start: int, stop: int, image_chw: Tensor) -> Tensor:
        masks = (self.ranks_hw >= self.counts[start:stop, None, None]).to(image_chw)
        return masks if self.weights_hw is None else masks * self.weights_hw.to(image_chw)

    def write(self, out_nchw: Tensor, image_chw: Tensor, start: int, perturbation: Perturbation) -> None:
        super().write(out_nchw, image_chw, start, self.fill or perturbation)


@dataclass(frozen=True)
class OneMask(MaskSource):
    """One mask at the size of the image."""

    image: int
    mask_hw: Tensor
    """Where a pixel is kept, or how much of it, [H, W]."""

    @property
    def is_binary(self) -> bool:
        return self.mask_hw.dtype == torch.bool

    def __len__(self) -> int:
        return 1

    def masks(self, start: int, stop: int, image_chw: Tensor) -> Tensor:
        return self.mask_hw[None].to(image_chw)


class MaskedMetric(Metric):
    """A metric of the scores of some masked inputs per map."""

    score: str | None = None
    """The scalar that is read from the model; None: the target's score."""
    is_painted: bool = False
    """It multiplies pixels by shares, or fills them in its own way, so that no patch can be left out."""

    def __init__(self, scorer: Scorer, baseline: str) -> None:
        """`baseline` is the name of the scorer's baseline."""
        self.scorer, self.baseline = scorer, baseline

    def details(self) -> Mapping[str, Any]:
        return {
            "space": "model input",
            "input": self.scorer.adapter.input_size,
            "baseline": self.baseline,
            **({"passes": DROP_PASSES} if self.baseline == DROP else {}),
            "score": self.score or READOUTS[self.scorer.adapter.readout],
        }

    @abstractmethod
    def sources(self, maps: Maps, places: Sequence[Place]) -> Sequence[MaskSource]:
        """The masked inputs of some maps, at least one. What they need goes to the device in one copy."""

    @abstractmethod
    def values(self, score: float, masked: Sequence[float], saliency_hw: Map) -> Mapping[str, Value]:
        """The values from the score of the whole image and those of the masked inputs."""

    def readout(self, maps: Maps) -> Readout:
        """The target whose scores are read."""
        return maps.target

    def undefined_reason(self, maps: Maps, image: int, index: int) -> str | None:
        """The reason if the metric is undefined for a map."""
        return FLAT if is_flat(maps.saliency[image][index]) else None

    def evaluate(self, maps: Maps) -> list[list[Mapping[str, Value]]]:
        undefined_reasons = {place: self.undefined_reason(maps, *place) for place in maps.positions()}
        usable = [place for place, undefined_reason in undefined_reasons.items() if undefined_reason is None]
        with self.scorer.adapter.borrowed():
            sources = self.sources(maps, usable) if usable else []
            found = self.scorer.scores(maps.inputs_nchw, self.readout(maps), sources)
        masked = {place: scores[:, place[1]].tolist() for place, scores in zip(usable, to_host(found), strict=True)}
        result: list[list[Mapping[str, Value]]] = [[] for _ in maps.saliency]
        for (image, index), undefined_reason in undefined_reasons.items():
            result[image].append(
                dict.fromkeys(self.names, undefined(undefined_reason))
                if undefined_reason is not None
                else self.values(maps.scores[image][index], masked[image, index], maps.saliency[image][index])
            )
        return result


def _saliency(maps: Maps, places: Sequence[Place]) -> list[Map]:
    return [maps.saliency[image][index] for image, index in places]


def _sent(arrays: Sequence[NDArray[Any]], maps: Maps) -> Tensor:
    """Arrays of one shape, stacked, on the device of the inputs."""
    return sent(torch.from_numpy(np.stack(arrays)), maps.inputs_nchw.device)


def _sent_weights(arrays: Sequence[Map], maps: Maps) -> Tensor:
    """As `_sent`, in the precision of the inputs."""
    return sent(torch.from_numpy(np.stack(arrays)).to(maps.inputs_nchw.dtype), maps.inputs_nchw.device)


def _ranks(saliency_hw: Map, removed: Removed) -> NDArray[np.int32]:
    """The order in which pixels are removed, [H, W]."""
    ranks = ranks_of(saliency_hw).astype(np.int32)
    return ranks if removed == "top" else ranks.size - 1 - ranks


class RankedMetric(MaskedMetric):
    """A metric that orders the pixels by the map."""

    def details(self) -> Mapping[str, Any]:
        return {**super().details(), "ties": TIES}


class KeepTop(RankedMetric):
    """Drop and Increase: only the top 15 % of pixels are kept (SISE's paper, section 4).

    Drop is `100 max(0, o - q) / o` in percent, o the score of the image and q of its kept pixels; Increase
    is 100 if `q > o`, strictly, else 0. A score of 0 cannot drop. A flat map has no top: both are undefined.
    """

    names = ("drop", "increase")

    def details(self) -> Mapping[str, Any]:
        return {**super().details(), "fraction": KEPT_FRACTION}

    def sources(self, maps: Maps, places: Sequence[Place]) -> list[MaskSource]:
        kept = _sent([self._kept(own) for own in _saliency(maps, places)], maps)
        return [OneMask(image, own) for (image, _), own in zip(places, kept, strict=True)]

    def _kept(self, saliency_hw: Map) -> NDArray[np.bool_]:
        count = int(KEPT_FRACTION * saliency_hw.size)
        return first_pixels(saliency_hw, count) if count else np.zeros(saliency_hw.shape, dtype=bool)

    def values(self, score: float, masked: Sequence[float], saliency_hw: Map) -> Mapping[str, Value]:
        (kept,) = masked
        return {"drop": lost(score, kept), "increase": Value(100.0 * (kept > score))}


def lost(score: float, kept: float) -> Value:
    """`drop` as a value; undefined if the score is negative."""
    return undefined(NEGATIVE) if score < 0 else Value(drop(score, kept))


def drop(score: float, kept: float) -> float:
    """`100 max(0, score - kept) / score`; 0 if the score is 0, NaN if either is not finite."""
    if not (isfinite(score) and isfinite(kept)):
        return float("nan")
    return 100 * max(0.0, score - kept) / score if score > 0 else 0.0


class LevelDrop(RankedMetric):
    """Average drop and increase at levels: the map itself is the mask, its lower pixels set to 0.

    At level v the pixels below the (100 - v)-th percentile are removed; the others keep their value (T-TAME).
    """

    is_painted = True
    levels: tuple[float, ...] = LEVELS
    names = tuple(f"{kind}_{100 * level:.0f}" for level in LEVELS for kind in ("average_drop", "average_increase"))

    def details(self) -> Mapping[str, Any]:
        return {**super().details(), "levels": self.levels, "mask": "the map's values"}

    def sources(self, maps: Maps, places: Sequence[Place]) -> Sequence[MaskSource]:
        saliency = _saliency(maps, places)
        size = saliency[0].size
        counts = _sent([np.array([size - round(level * size) for level in self.levels], np.int32)], maps)[0]
        ranks = _sent([_ranks(own, "bottom") for own in saliency], maps)
        weights = _sent_weights(saliency, maps)
        return [
            RankedMasks(image, own, counts, weight)
            for (image, _), own, weight in zip(places, ranks, weights, strict=True)
        ]

    def values(self, score: float, masked: Sequence[float], saliency_hw: Map) -> Mapping[str, Value]:
        pairs = [(lost(score, kept), Value(100.0 * (kept > score))) for kept in masked]
        return dict(zip(self.names, (value for pair in pairs for value in pair), strict=True))


class WholeDrop(LevelDrop):
    """Only the level of 100 %: one forward pass."""

    levels = LEVELS[:1]
    names = LevelDrop.names[:2]

    def sources(self, maps: Maps, places: Sequence[Place]) -> list[MaskSource]:
        """No pixel is removed, so none is ranked."""
        weights = _sent_weights(_saliency(maps, places), maps)
        return [OneMask(image, own) for (image, _), own in zip(places, weights, strict=True)]


class Curve(RankedMetric):
    """A curve of scores over the share of removed pixels, with its area."""

    shares: tuple[float, ...] = tuple(step / NUM_STEPS for step in range(NUM_STEPS + 1))
    removed: Removed = "top"

    def details(self) -> Mapping[str, Any]:
        return {**super().details(), "shares": self.shares, "removed": self.removed, "area": "trapezoid"}

    def sources(self, maps: Maps, places: Sequence[Place]) -> Sequence[MaskSource]:
        return self.ranked(maps, places)

    def ranked(self, maps: Maps, places: Sequence[Place]) -> list[RankedMasks]:
        """The masks of some maps."""
        saliency = _saliency(maps, places)
        removed = [round(share * saliency[0].size) for share in self.shares]
        counts = _sent([np.array(removed, np.int32)], maps)[0]
        ranks = _sent([_ranks(own, self.removed) for own in saliency], maps)
        return [RankedMasks(image, own, counts) for (image, _), own in zip(places, ranks, strict=True)]

    def values(self, score: float, masked: Sequence[float], saliency_hw: Map) -> Mapping[str, Value]:
        return {self.names[0]: Value(self.area(masked), curve=tuple(masked))}

    def area(self, masked: Sequence[float]) -> float:
        """The mean of the curve by the trapezoid rule."""
        return trapezoid(masked) / (len(masked) - 1)


def trapezoid(values: Sequence[float]) -> float:
    """The area under values at unit distance."""
    return float(sum(values) - (values[0] + values[-1]) / 2)


class Deletion(Curve):
    """The most salient pixels become the baseline first (Petsiuk et al., 2018, section 4.1; lower is better)."""

    names = ("deletion",)


class Insertion(Curve):
    """The most salient pixels return first, to a blurred picture (Petsiuk et al., 2018; higher is better).

    With the baseline `drop` the most salient patches return, to none but one.
    """

    names = ("insertion",)
    shares = Curve.shares[::-1]
    removed = "bottom"

    def details(self) -> Mapping[str, Any]:
        if self.baseline == DROP:
            return super().details()
        return {**super().details(), "baseline": "blur", "reach": BLUR_REACH, "sigma": BLUR_SIGMA}

    def sources(self, maps: Maps, places: Sequence[Place]) -> list[MaskSource]:
        if self.baseline == DROP:
            return list(self.ranked(maps, places))
        fills = {image: self._fill(maps.inputs_nchw[image]) for image, _ in places}
        return [replace(own, fill=fills[own.image]) for own in self.ranked(maps, places)]

    def _fill(self, picture_chw: Tensor) -> Perturbation:
        side = min(picture_chw.shape[1:])
        blur = blurred(picture_chw, BLUR_SIGMA * side, reach=max(1, round(BLUR_REACH * side)))
        return Perturbation(blur[None])


class Agreement(Curve):
    """The curve is 1 where the prediction is unchanged, else 0; defined for the predicted class alone."""

    score = "prediction unchanged"
    shares = AGREEMENT_SHARES

    def readout(self, maps: Maps) -> Readout:
        return TopClass(maps.target.leading, len(self.scorer.adapter.features))

    def undefined_reason(self, maps: Maps, image: int, index: int) -> str | None:
        if maps.ranks[image][index] is None:
            return "the target is no class, so that it cannot be the prediction"
        if maps.ranks[image][index] != 1:
            return "the target is not the prediction"
        return super().undefined_reason(maps, image, index)

    def area(self, masked: Sequence[float]) -> float:
        """In percent, over shares 0 to 0.9: 90 if the prediction never changes."""
        return 100 * trapezoid(masked) / 10


class Positive(Agreement):
    """POS: the most salient pixels are removed first (Chefer et al., CVPR 2021; lower is better)."""

    names = ("pos",)


class Negative(Agreement):
    """NEG: the least salient pixels are removed first (Chefer et al., CVPR 2021; higher is better)."""

    names = ("neg",)
    removed = "bottom"


NEGATIVE_DENSITY = "the score of the masked picture is negative, and has no density"


class Density(MaskedMetric):
    """`p(x m) H W / sum(m)`, and the same of `1 - m`: the score per share of the picture (CAMERAS, CVPR 2021)."""

    names = ("positive_density", "negative_density")
    is_painted = True

    def sources(self, maps: Maps, places: Sequence[Place]) -> list[MaskSource]:
        weights = _sent_weights([np.stack([own, 1 - own]) for own in _saliency(maps, places)], maps)
        return [MaskSet(image, own) for (image, _), own in zip(places, weights, strict=True)]

    def values(self, score: float, masked: Sequence[float], saliency_hw: Map) -> Mapping[str, Value]:
        sums = saliency_hw.sum(), (1 - saliency_hw).sum()
        pairs = zip(self.names, masked, sums, strict=True)
        return {
            name: undefined(NEGATIVE_DENSITY) if one < 0 else Value(one * saliency_hw.size / float(total))
            for name, one, total in pairs
        }
