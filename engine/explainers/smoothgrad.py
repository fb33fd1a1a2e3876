"""SmoothGrad: another method's signed attributions, averaged over noisy copies of the image."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from blocksight.engine.explainers.explainer import Attribution
from blocksight.engine.explainers.wrapper import Joined, Wrapper


class SmoothGrad(Wrapper):
    """The mean over copies with Gaussian noise; its deviation is a share of the image's range in input space.

    Smilkov et al., arXiv 1706.03825, equation 1 and section 3.1.
    """

    def views(self, image_chw: Tensor, data: Any, generator: torch.Generator) -> Iterator[Tensor]:
        deviation = self.parameters.noise * (image_chw.amax() - image_chw.amin())
        for _ in range(self.parameters.samples):
            noise = torch.randn(image_chw.shape, generator=generator).to(image_chw.device)
            yield image_chw + deviation * noise

    def add(self, joined: Joined, number: int, one: Attribution) -> Tensor:
        own = one.values / self.parameters.samples
        return own if joined.total is None else joined.total + own

    def signed_map(self, values: Tensor) -> Tensor:
        return self.base.signed_map(values)

    def saliency_map(self, signed_hw: Tensor) -> Tensor:
        return self.base.saliency_map(signed_hw)
