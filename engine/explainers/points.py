"""The base classes of explainers that take gradients at the image itself, or at points on a path to it.

A batch of images or of points costs one forward pass, and one backward pass per target.
"""

from abc import abstractmethod
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from blocksight.engine.explainers.explainer import Attribution, SignedExplainer, chunks, pad, scores_of
from blocksight.engine.explainers.explanation import BlockMap
from blocksight.engine.model.targets import Target
from blocksight.engine.model.transfers import sent

MAX_POINTS_PER_PASS = 32
"""A backward pass keeps all activations, and more points per pass would not be faster."""

Point = tuple[Tensor, Tensor | float]
"""An input [3, H, W], and the factor of its attribution, broadcastable to it."""


class ImageExplainer(SignedExplainer):
    """The values of an image are the signed attributions at the image itself."""

    blocks: tuple[BlockMap, ...] = ()

    @abstractmethod
    def attributions(self, inputs_nchw: Tensor, target: Target) -> tuple[Tensor, list[Tensor]]:
        """The logits [N, K] without gradient, and per target the signed attributions, float64 [N, ...]."""

    def _attribute_pass(self, inputs_nchw: Tensor, target: Target, seeds: Sequence[int]) -> list[list[Attribution]]:
        count, size = len(inputs_nchw), self.images_per_pass
        filled = sent(torch.arange(size).clamp(max=count - 1), inputs_nchw.device)  # as `pad`
        logits, found = self.attributions(pad(inputs_nchw, size), target.of(filled))
        return [
            [Attribution(own[image], score, 0, self.blocks) for own, score in zip(found, row, strict=True)]
            for image, row in enumerate(scores_of(logits, target, count))
        ]


class PointExplainer(SignedExplainer):
    """The values of an image are the sum of its points' signed attributions.

    A method yields an image's points, each with the factor of its attribution.
    """

    num_forwards: int
    """Forward passes per image: the number of its points."""

    @abstractmethod
    def points(self, image_chw: Tensor, generator: torch.Generator) -> Iterator[Point]:
        """The points of one image [3, H, W]."""

    @abstractmethod
    def attributions(self, points_nchw: Tensor, target: Target) -> list[Tensor]:
        """Per target the signed attributions of the points, float64 [N, ...]."""

    def _attribute_pass(self, inputs_nchw: Tensor, target: Target, seeds: Sequence[int]) -> list[list[Attribution]]:
        sums: list[Tensor | float] = [0.0] * len(inputs_nchw)
        size = min(self.scorer.batch_size, MAX_POINTS_PER_PASS)
        for batch in chunks(self._all_points(inputs_nchw, seeds), size):
            images, points, factors = zip(*batch, strict=True)
            chosen = sent(torch.tensor([*images, *images[-1:] * (size - len(images))]), inputs_nchw.device)
            found = torch.stack(self.attributions(pad(torch.stack(points), size), target.of(chosen)), 1)
            for image, factor, own in zip(images, factors, found, strict=False):
                sums[image] = sums[image] + own * factor
        return [
            [
                Attribution(own, score, self.num_forwards, ())
                for own, score in zip(torch.as_tensor(total), row, strict=True)
            ]
            for total, row in zip(sums, self._scores(inputs_nchw, target), strict=True)
        ]

    def _all_points(self, inputs_nchw: Tensor, seeds: Sequence[int]) -> Iterator[tuple[int, Tensor, Tensor | float]]:
        for image, (own, seed) in enumerate(zip(inputs_nchw, seeds, strict=True)):
            for point, factor in self.points(own, torch.Generator().manual_seed(seed)):
                yield image, point, factor
