"""SmoothGrad: another method's signed attributions, averaged over noisy copies of the image."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from engine.catalog import SmoothGradParameters
from engine.explainers.points import Point, PointExplainer
from engine.models import ModelAdapter
from engine.targets import Target


class SmoothGrad(PointExplainer):
    """The mean over copies with Gaussian noise, whose deviation is a share of the image's range in input space.

    Smilkov et al., arXiv 1706.03825, equation 1 and section 3.1.
    """

    def __init__(
        self,
        adapter: ModelAdapter,
        parameters: SmoothGradParameters,
        *,
        bases: Mapping[str, Callable[..., PointExplainer]],
        **options: Any,
    ) -> None:
        """`bases` makes the method that is wrapped, by `parameters.base`."""
        self.base = bases[parameters.base](adapter, **options)
        super().__init__(adapter, parameters, **options)

    def _prepare(self, blocks: Sequence[str]) -> None:
        self.blocks = self.base.blocks
        self.num_forwards = self.parameters.samples * max(1, self.base.num_forwards)

    def points(self, image_chw: Tensor, generator: torch.Generator) -> Iterator[Point]:
        deviation = self.parameters.noise * (image_chw.amax() - image_chw.amin())
        for _ in range(self.parameters.samples):
            noise = torch.randn(image_chw.shape, generator=generator).to(image_chw.device)
            for point, factor in self.base.points(image_chw + deviation * noise, generator):
                yield point, factor / self.parameters.samples

    def attributions(self, points_nchw: Tensor, target: Target) -> list[Tensor]:
        return self.base.attributions(points_nchw, target)

    def finish(self, summed: Tensor) -> Tensor:
        return self.base.finish(summed)
