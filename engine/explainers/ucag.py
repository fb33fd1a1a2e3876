"""UCAG: explains overlapping, enlarged crops of the image, and adds up their maps in place."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import floor
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from blocksight.engine.catalog.side_products import Crop, SideProducts
from blocksight.engine.errors import ModelError
from blocksight.engine.explainers.explainer import Attribution, Explainer, Learner
from blocksight.engine.explainers.wrapper import Joined, MakeBase, Wrapper
from blocksight.engine.model.adapter import ModelAdapter
from blocksight.engine.model.resample import Grid, grid_of, scaled, upsampling
from blocksight.engine.model.targets import Target
from blocksight.engine.scoring.perturb import blurred

PUBLISHED_SIDE = 224
"""The input's side, in pixels, of the authors' constants."""
BLUR_SIGMA, BLUR_REACH = 3.0, 2
"""The blur of the finished map: a Gaussian of 5 x 5 pixels."""


def starts(side: int, crop: int, count: int) -> list[int]:
    """First pixels of `count` crops along one axis, from border to border; a single crop is centred."""
    if count == 1:
        return [round((side - crop) / 2)]
    return [round(number * (side - crop) / (count - 1)) for number in range(count)]


class Ucag(Wrapper):
    """`S = sum_i w_i a_i / (1 + overlaps)`, a_i the base's signed map of crop i, `w_i = exp(q_i) / max_j exp(q_j)`.

    Hong et al., Unfold and Conquer Attribution Guidance, AAAI 2023; q_i is the target's value on the crop. The
    1 in the divisor is that of the authors' code. Crops begin at `round(i (H - C) / (n - 1))`: this is their stride
    at 224 pixels, and leaves no gap at other sizes.
    """

    def _base(self, adapter: ModelAdapter, parameters: Any, base: MakeBase, options: dict[str, Any]) -> Explainer:
        """The wrapped method for enlarged crops, with at most as many pixels per pass as at the model's input size.

        `forward` works only at the model's input size, so other sizes do without it.
        """
        height, width = (max(1, parameters.side * side // PUBLISHED_SIDE) for side in adapter.input_size)
        self.crop: Grid = (height, width)
        if parameters.enlarge == "native":
            return base(adapter, **options)
        larger = (floor(parameters.enlarge * height), floor(parameters.enlarge * width))
        if larger == adapter.input_size:
            return base(adapter, **options)
        growth = max(1.0, larger[0] * larger[1] / (adapter.input_size[0] * adapter.input_size[1]))
        fewer = {name: max(1, int(options[name] / growth)) for name in ("batch_size", "images_per_pass")}
        return base(_resized(adapter, larger), **{**options, **fewer, "forward": None})

    def _prepare(self, blocks: Sequence[str]) -> None:
        (height, width), full = self.crop, self.adapter.input_size
        rows, columns = (starts(side, crop, self.parameters.crops) for side, crop in zip(full, self.crop, strict=True))
        self.windows = [(slice(top, top + height), slice(left, left + width)) for top in rows for left in columns]
        overlaps = torch.zeros(full, dtype=torch.float64)
        for window in self.windows:
            overlaps[window] += 1
        self.divisor = overlaps + 1 if self.parameters.divider == "official" else overlaps.clamp(min=1)

    def views(self, image_chw: Tensor, data: Any, generator: torch.Generator) -> Iterator[Tensor]:
        for rows, columns in self.windows:
            yield self._enlarged(image_chw[None, :, rows, columns])[0]

    def _enlarged(self, inputs_nchw: Tensor) -> Tensor:
        """Images of any size, resized to the base's input size."""
        size = self.base.adapter.input_size
        return functional.interpolate(inputs_nchw, size=size, mode="bicubic", align_corners=False)

    def add(self, joined: Joined, number: int, one: Attribution) -> Tensor:
        """The canvas with one more crop's map added; its weight is relative to that of the first crop."""
        flat = self.base.signed_map(one.values).double()
        canvas = flat.new_zeros(self.adapter.input_size) if joined.total is None else joined.total
        weight = _exponential(one.score - joined.scores[0]) if self.parameters.weighted and joined.scores else 1.0
        canvas[self.windows[number]] += weight * upsampling(grid_of(flat), self.crop, flat.device)(flat)
        return canvas

    def joined_values(self, joined: Joined, data: Any) -> Tensor:
        assert joined.total is not None
        return joined.total * self._weights(joined.scores)[0] / self.divisor.to(joined.total.device)

    def _weights(self, scores: Sequence[float]) -> list[float]:
        greatest = max(scores)
        return [_exponential(score - greatest) if self.parameters.weighted else 1.0 for score in scores]

    def saliency_map(self, signed_hw: Tensor) -> Tensor:
        """The positive part, scaled to [0, 1], and blurred if `blur` is set."""
        positive = scaled(signed_hw.relu())
        if not self.parameters.blur:
            return positive
        return blurred(positive[None], BLUR_SIGMA, reach=BLUR_REACH, rim="reflect")[0]

    def products(self, joined: Joined) -> SideProducts:
        crops = tuple(
            Crop(rows.start, columns.start, *self.crop, score, weight)
            for (rows, columns), score, weight in zip(
                self.windows, joined.scores, self._weights(joined.scores), strict=True
            )
        )
        return replace(super().products(joined), crops=crops)

    def learner(self) -> Learner:
        return _EnlargingLearner(self.base.learner(), self._enlarged)


@dataclass(frozen=True)
class _EnlargingLearner:
    """The base's first pass, over whole images at the base's input size."""

    base: Learner
    enlarged: Callable[[Tensor], Tensor]

    def see(self, inputs_nchw: Tensor, target: Target, seeds: Sequence[int]) -> None:
        self.base.see(self.enlarged(inputs_nchw), target, seeds)

    def state(self) -> dict[str, Tensor]:
        return self.base.state()


def _resized(adapter: ModelAdapter, size: Grid) -> ModelAdapter:
    try:
        return adapter.resized(size)
    except ModelError as error:
        raise ModelError(
            f"ucag enlarges its crops to {size[0]} x {size[1]} pixels, and {error}; with enlarge=native the model sees "
            "them at its own size"
        ) from error


def _exponential(difference: float) -> float:
    """`exp(difference)`; infinity on overflow."""
    return float(torch.tensor(difference, dtype=torch.float64).exp())
