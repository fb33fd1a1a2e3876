"""Controls: maps that do not use the model. A method must beat them to explain anything."""

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from blocksight.engine.explainers.edges import SOBEL, gradient_magnitude
from blocksight.engine.explainers.explainer import Explainer
from blocksight.engine.explainers.explanation import Explanation, checked_explanation
from blocksight.engine.model.resample import grid_of
from blocksight.engine.model.targets import Target


class Control(Explainer):
    """One map per image, the same for every target."""

    @abstractmethod
    def draw(self, image_chw: Tensor, generator: torch.Generator) -> Tensor:
        """The map [H, W], at least 0, of an image [3, H, W] on the CPU."""

    def _explain_pass(self, inputs_nchw: Tensor, target: Target, seeds: Sequence[int]) -> list[list[Explanation]]:
        maps = [
            self.draw(image, torch.Generator().manual_seed(seed)).double().numpy()
            for image, seed in zip(inputs_nchw.cpu(), seeds, strict=True)
        ]
        return [
            [checked_explanation(own, score, num_forwards=0) for score in row]
            for own, row in zip(maps, self._scores(inputs_nchw, target), strict=True)
        ]


class RandomMap(Control):
    """Uniform noise in [0, 1), pixel by pixel."""

    def draw(self, image_chw: Tensor, generator: torch.Generator) -> Tensor:
        return torch.rand(grid_of(image_chw), generator=generator, dtype=torch.float64)


class CentredGaussian(Control):
    """A Gaussian at the centre, where most objects are; its standard deviation is a quarter of each side."""

    def draw(self, image_chw: Tensor, generator: torch.Generator) -> Tensor:
        down, across = (
            torch.exp(-0.5 * ((torch.arange(side, dtype=torch.float64) + 0.5) / side * 4 - 2) ** 2)
            for side in grid_of(image_chw)
        )
        return down[:, None] * across[None, :]


class Edges(Control):
    """An edge detector: the Sobel gradient magnitude of the image's mean over channels."""

    def draw(self, image_chw: Tensor, generator: torch.Generator) -> Tensor:
        return gradient_magnitude(image_chw[None].double(), SOBEL)[0]
