"""Faithfulness: the score while pixels are removed or kept in the order of the map."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from blocksight.engine.catalog.readouts import READOUTS
from blocksight.engine.metrics.metric import TIES, Maps, Metric, Value, first_pixels, ranks_of, undefined
from blocksight.engine.model.targets import Readout, TopClass
from blocksight.engine.saliency import FLAT, Map, is_flat
from blocksight.engine.scoring.perturb import Perturbation, blurred
from blocksight.engine.scoring.scorer import MaskSet, MaskSource, Scorer

KEPT_FRACTION = 0.15
LEVELS = (1.0, 0.5, 0.15)
NUM_STEPS = 28
"""Steps of a curve from no pixel to all; at 224 pixels a side that is 8 rows per step."""
BLUR_REACH, BLUR_SIGMA = 25 / 224, 50 / 224
"""Blur of the picture that insertion starts from, as shares of the shorter side: 51 pixels wide at 224."""
AGREEMENT_SHARES = tuple(share / 10 for share in range(10))
"""Shares of pixels that POS and NEG remove."""

Removed = Literal["top", "bottom"]


@dataclass(frozen=True)
class RankedMasks(MaskSource):
    """Masks that remove the first pixels of an order."""

    image: int
    ranks_hw: Tensor
    """The place of every pixel in the order, from 0, int64 [H, W]."""
    counts: tuple[int, ...]
    """Pixels that each mask removes."""
    weights_hw: Tensor | None = None
    """Factors of the kept pixels; None: 1."""
    fill: Perturbation | None = None
    """Replaces removed pixels; None: the scorer's baseline."""

    def __len__(self) -> int:
        return len(self.counts)

    def masks(self, start: int, stop: int, image_chw: Tensor) -> Tensor:
        counts = torch.tensor(self.counts[start:stop], device=image_chw.device)
        masks = (self.ranks_hw >= counts[:, None, None]).to(image_chw)
        return masks if self.weights_hw is None else masks * self.weights_hw.to(image_chw)

    def write(self, out_nchw: Tensor, image_chw: Tensor, start: int, perturbation: Perturbation) -> None:
        super().write(out_nchw, image_chw, start, self.fill or perturbation)


@dataclass(frozen=True)
class KeptPixels(MaskSource):
    """One mask, which keeps some pixels."""

    image: int
    kept_hw: Tensor
    """True where a pixel is kept, [H, W]."""

    def __len__(self) -> int:
        return 1

    def masks(self, start: int, stop: int, image_chw: Tensor) -> Tensor:
        return self.kept_hw[None].to(image_chw)


class MaskedMetric(Metric):
    """A metric of the scores of some masked inputs per map."""

    score: str | None = None
    """The scalar that is read from the model; None: the target's score."""

    def __init__(self, scorer: Scorer, baseline: str) -> None:
        """`baseline` is the name of the scorer's baseline."""
        self.scorer, self.baseline = scorer, baseline

    def details(self) -> Mapping[str, Any]:
        return {
            "space": "model input",
            "input": self.scorer.adapter.input_size,
            "baseline": self.baseline,
            "score": self.score or READOUTS[self.scorer.adapter.readout],
        }

    @abstractmethod
    def source(self, maps: Maps, image: int, index: int) -> MaskSource:
        """The masked inputs of one map."""

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
            found = self.scorer.scores(
                maps.inputs_nchw, self.readout(maps), [self.source(maps, *place) for place in usable]
            )
        masked = {place: scores[:, place[1]].tolist() for place, scores in zip(usable, found, strict=True)}
        result: list[list[Mapping[str, Value]]] = [[] for _ in maps.saliency]
        for (image, index), undefined_reason in undefined_reasons.items():
            result[image].append(
                dict.fromkeys(self.names, undefined(undefined_reason))
                if undefined_reason is not None
                else self.values(maps.scores[image][index], masked[image, index], maps.saliency[image][index])
            )
        return result


def _ranks(maps: Maps, image: int, index: int, removed: Removed) -> Tensor:
    """The order in which pixels are removed, [H, W]."""
    ranks = ranks_of(maps.saliency[image][index])
    if removed == "bottom":
        ranks = ranks.size - 1 - ranks
    return torch.from_numpy(ranks).to(maps.inputs_nchw.device)


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

    def source(self, maps: Maps, image: int, index: int) -> MaskSource:
        saliency = maps.saliency[image][index]
        count = int(KEPT_FRACTION * saliency.size)
        kept = first_pixels(saliency, count) if count else np.zeros(saliency.shape, dtype=bool)
        return KeptPixels(image, torch.from_numpy(kept).to(maps.inputs_nchw.device))

    def values(self, score: float, masked: Sequence[float], saliency_hw: Map) -> Mapping[str, Value]:
        (kept,) = masked
        return {"drop": Value(drop(score, kept)), "increase": Value(100.0 * (kept > score))}


def drop(score: float, kept: float) -> float:
    """`100 max(0, score - kept) / score`; 0 if the score is 0, NaN if either is not finite."""
    if not (isfinite(score) and isfinite(kept)):
        return float("nan")
    return 100 * max(0.0, score - kept) / score if score > 0 else 0.0


class LevelDrop(RankedMetric):
    """Average drop and increase at levels: the map itself is the mask, its lower pixels set to 0.

    At level v the pixels below the (100 - v)-th percentile are removed; the others keep their value (T-TAME).
    """

    levels: tuple[float, ...] = LEVELS
    names = tuple(f"{kind}_{100 * level:.0f}" for level in LEVELS for kind in ("average_drop", "average_increase"))

    def details(self) -> Mapping[str, Any]:
        return {**super().details(), "levels": self.levels, "mask": "the map's values"}

    def source(self, maps: Maps, image: int, index: int) -> MaskSource:
        saliency = maps.saliency[image][index]
        counts = tuple(saliency.size - round(level * saliency.size) for level in self.levels)
        weights = torch.from_numpy(saliency).to(maps.inputs_nchw)
        return RankedMasks(image, _ranks(maps, image, index, "bottom"), counts, weights)

    def values(self, score: float, masked: Sequence[float], saliency_hw: Map) -> Mapping[str, Value]:
        pairs = [(Value(drop(score, kept)), Value(100.0 * (kept > score))) for kept in masked]
        return dict(zip(self.names, (value for pair in pairs for value in pair), strict=True))


class WholeDrop(LevelDrop):
    """Only the level of 100 %: one forward pass."""

    levels = LEVELS[:1]
    names = LevelDrop.names[:2]


class Curve(RankedMetric):
    """A curve of scores over the share of removed pixels, with its area."""

    shares: tuple[float, ...] = tuple(step / NUM_STEPS for step in range(NUM_STEPS + 1))
    removed: Removed = "top"

    def details(self) -> Mapping[str, Any]:
        return {**super().details(), "shares": self.shares, "removed": self.removed, "area": "trapezoid"}

    def source(self, maps: Maps, image: int, index: int) -> RankedMasks:
        size = maps.saliency[image][index].size
        counts = tuple(round(share * size) for share in self.shares)
        return RankedMasks(image, _ranks(maps, image, index, self.removed), counts)

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
    """The most salient pixels return first, to a blurred picture (Petsiuk et al., 2018; higher is better)."""

    names = ("insertion",)
    shares = Curve.shares[::-1]
    removed = "bottom"

    def details(self) -> Mapping[str, Any]:
        return {**super().details(), "baseline": "blur", "reach": BLUR_REACH, "sigma": BLUR_SIGMA}

    def source(self, maps: Maps, image: int, index: int) -> RankedMasks:
        plain = super().source(maps, image, index)
        picture = maps.inputs_nchw[image]
        side = min(picture.shape[1:])
        blur = blurred(picture, BLUR_SIGMA * side, reach=max(1, round(BLUR_REACH * side)))
        return RankedMasks(image, plain.ranks_hw, plain.counts, fill=Perturbation(blur[None]))


class Agreement(Curve):
    """The curve is 1 where the prediction is unchanged, else 0; defined for the predicted class alone."""

    score = "prediction unchanged"
    shares = AGREEMENT_SHARES

    def readout(self, maps: Maps) -> Readout:
        return TopClass(maps.target.classes)

    def undefined_reason(self, maps: Maps, image: int, index: int) -> str | None:
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


class Density(MaskedMetric):
    """`p(x m) H W / sum(m)`, and the same of `1 - m`: the score per share of the picture (CAMERAS, CVPR 2021)."""

    names = ("positive_density", "negative_density")

    def source(self, maps: Maps, image: int, index: int) -> MaskSource:
        saliency = torch.from_numpy(maps.saliency[image][index])
        return MaskSet(image, torch.stack([saliency, 1 - saliency]).to(maps.inputs_nchw))

    def values(self, score: float, masked: Sequence[float], saliency_hw: Map) -> Mapping[str, Value]:
        sums = saliency_hw.sum(), (1 - saliency_hw).sum()
        pairs = zip(self.names, masked, sums, strict=True)
        return {name: Value(one * saliency_hw.size / float(total)) for name, one, total in pairs}
