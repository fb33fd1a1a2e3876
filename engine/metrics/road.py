"""ROAD: removed pixels are imputed from their neighbours, so that the mask's shape gives no information."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from blocksight.engine.metrics.faithfulness import Agreement, RankedMasks
from blocksight.engine.metrics.metric import Maps
from blocksight.engine.scoring.perturb import Perturbation

SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 0.9)
NOISE = 0.01
"""Deviation of the noise on imputed pixels, in model-input space."""
NEIGHBOURS = ((1 / 12, 1 / 6, 1 / 12), (1 / 6, 0.0, 1 / 6), (1 / 12, 1 / 6, 1 / 12))
TOLERANCE = 1e-4
"""Of the imputation's residual, relative: far below the noise."""
MAX_ITERATIONS = 2_000


def imputed(image_chw: Tensor, kept_hw: Tensor) -> Tensor:
    """The image [C, H, W]; each pixel that is not kept (bool [H, W]) is the weighted mean of its eight neighbours.

    Direct neighbours inside the image have weight 1/6 and diagonal ones 1/12 (Rong et al., ICML 2022, section 4.3):
    a sparse linear system, solved by conjugate gradients. Zeros if no pixel is kept.
    """
    if not kept_hw.any():
        return torch.zeros_like(image_chw)
    kernel = image_chw.new_tensor(NEIGHBOURS)[None, None]
    missing = (~kept_hw).to(image_chw)

    def around(channels: Tensor) -> Tensor:
        return functional.conv2d(channels[:, None], kernel, padding=1)[:, 0]

    weight = around(torch.ones_like(image_chw[:1]))

    def apply(channels: Tensor) -> Tensor:
        return missing * (weight * channels - around(channels))

    known = image_chw * (1 - missing)
    start = missing * (known.sum((1, 2), keepdim=True) / kept_hw.sum())
    return known + _conjugate_gradients(apply, missing * around(known), start)


def _conjugate_gradients(apply: Any, wanted: Tensor, start: Tensor) -> Tensor:
    """x with apply(x) = wanted, by conjugate gradients per channel [C, H, W], from `start`."""

    def dot(one: Tensor, other: Tensor) -> Tensor:
        return (one * other).sum((1, 2), keepdim=True)

    found = start
    residual = wanted - apply(found)
    step, size = residual, dot(residual, residual)
    enough = TOLERANCE**2 * dot(wanted, wanted).clamp(min=torch.finfo(wanted.dtype).tiny)
    for _ in range(MAX_ITERATIONS):
        if bool((size <= enough).all()):
            break
        image = apply(step)
        length = size / dot(step, image).clamp(min=torch.finfo(wanted.dtype).tiny)
        found = found + length * step
        residual = residual - length * image
        before, size = size, dot(residual, residual)
        step = residual + size / before.clamp(min=torch.finfo(wanted.dtype).tiny) * step
    return found


@dataclass(frozen=True, kw_only=True)
class Imputed(RankedMasks):
    """Masked inputs whose removed pixels are imputed, with a little noise."""

    picture_chw: Tensor
    """The image as the metric got it: the last bits of sums depend on the layout of its memory."""
    seed: int

    def write(self, out_nchw: Tensor, image_chw: Tensor, start: int, perturbation: Perturbation) -> None:
        picture = self.picture_chw
        kept = self.masks(start, start + len(out_nchw), picture) > 0
        filled = torch.stack([imputed(picture, one) for one in kept])
        noise = torch.randn(picture.shape, generator=torch.Generator().manual_seed(self.seed)).to(picture)
        out_nchw.copy_(torch.where(kept[:, None], picture, filled + NOISE * noise))


class Road(Agreement):
    """The area under the share of unchanged predictions, from (0, 1) to (1, 0)."""

    shares = SHARES

    def details(self) -> Mapping[str, Any]:
        return {**super().details(), "baseline": "noisy linear imputation", "noise": NOISE, "seed": "of the record"}

    def source(self, maps: Maps, image: int, index: int) -> RankedMasks:
        plain = super().source(maps, image, index)
        return Imputed(
            image=image,
            ranks_hw=plain.ranks_hw,
            counts=plain.counts,
            picture_chw=maps.inputs_nchw[image],
            seed=maps.seeds[image],
        )

    def area(self, masked: Sequence[float]) -> float:
        """In percent, by the trapezoid rule over uneven shares."""
        places, heights = (0.0, *self.shares, 1.0), (1.0, *masked, 0.0)
        return 100 * sum(
            (places[i + 1] - places[i]) * (heights[i] + heights[i + 1]) / 2 for i in range(len(places) - 1)
        )


class MostRelevantFirst(Road):
    """ROAD-MoRF: the most salient pixels are removed first (lower is better)."""

    names = ("road_morf",)


class LeastRelevantFirst(Road):
    """ROAD-LeRF: the least salient pixels are removed first (higher is better)."""

    names = ("road_lerf",)
    removed = "bottom"
