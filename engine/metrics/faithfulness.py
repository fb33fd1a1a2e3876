"""Drop and Increase: what the score does when only the most salient pixels are kept (as SISE's paper measures)."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import isfinite

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.fusion import Map
from engine.scorer import MaskSet, Scorer
from engine.targets import Target


@dataclass(frozen=True)
class KeepTopProtocol:
    """Everything that a value of Drop or Increase depends on, beside the map and the model."""

    baseline: str
    """What stands where a pixel is removed."""
    fraction: float = 0.15
    """Share of the pixels that is kept."""
    space: str = "model input"
    """Where the mask is applied."""
    score: str = "softmax probability"
    ties: str = "value descending, then row-major position ascending"

    @property
    def digest(self) -> str:
        """First 16 hex digits of the sha256 of the canonical JSON; values of two digests are never averaged."""
        text = json.dumps({"metric": "keep-top", **asdict(self)}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class KeepTopValues:
    """Drop and Increase of one map."""

    drop: float
    """100 max(0, o - q) / o, in percent; o the score of the image, q of its kept pixels. Lower is better."""
    increase: bool
    """q > o, strictly; its mean over records is Increase %. Higher is better."""


def top_pixels(saliency_hw: Map, fraction: float) -> NDArray[np.bool_]:
    """The floor(fraction H W) greatest pixels, exactly; ties go to the earlier position in row-major order."""
    count = int(np.floor(fraction * saliency_hw.size))
    order = np.argsort(-saliency_hw, axis=None, kind="stable")
    kept = np.zeros(saliency_hw.size, dtype=np.bool_)
    kept[order[:count]] = True
    return kept.reshape(saliency_hw.shape)


def keep_top_values(score: float, kept_score: float) -> KeepTopValues:
    """Drop and Increase from the two scores. A score of 0 cannot drop: Drop is 0; NaN gives NaN."""
    if not (isfinite(score) and isfinite(kept_score)):
        return KeepTopValues(float("nan"), False)
    drop = 100 * max(0.0, score - kept_score) / score if score > 0 else 0.0
    return KeepTopValues(drop, kept_score > score)


@dataclass(frozen=True)
class KeepTop:
    """Evaluates Drop and Increase with one forward per map."""

    scorer: Scorer
    protocol: KeepTopProtocol

    def evaluate(
        self,
        inputs_nchw: Tensor,
        target: Target,
        saliency: Sequence[Sequence[Map]],
        scores: Sequence[Sequence[float]],
    ) -> list[list[KeepTopValues]]:
        """Per image and target, given its saliency map [H, W] and its score on the whole image."""
        mask_sets = [
            MaskSet(image, torch.stack([self._mask(one) for one in maps]).to(inputs_nchw.device))
            for image, maps in enumerate(saliency)
        ]
        with self.scorer.adapter.borrowed():
            kept = self.scorer.scores(inputs_nchw, target, mask_sets)
        return [
            [keep_top_values(score, float(own)) for score, own in zip(row, scored.diagonal(), strict=True)]
            for row, scored in zip(scores, kept, strict=True)
        ]

    def _mask(self, saliency_hw: Map) -> Tensor:
        return torch.from_numpy(top_pixels(saliency_hw, self.protocol.fraction)).float()
