"""RISE: the mean of random masks, each weighted by the score of what it keeps."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor

from blocksight.engine.explainers.explainer import Explainer
from blocksight.engine.explainers.explanation import Explanation, checked_explanation
from blocksight.engine.model.resample import Grid, bilinear_matrix, grid_of
from blocksight.engine.model.targets import Target
from blocksight.engine.saliency import Map
from blocksight.engine.scoring.scorer import MaskSource

MASKS_PER_SUM = 64
"""Masks on the device at once while they are summed."""


@dataclass(frozen=True)
class RandomGrids(MaskSource):
    """Random cells of a coarse grid, upsampled to one cell more than the image and cropped at a random shift."""

    image: int
    cells_kgg: Tensor
    """0 or 1, float32 [K, g, g]."""
    shifts: Tensor
    """Rows and columns that each crop is moved by, [K, 2], each less than a cell's side."""

    def __len__(self) -> int:
        return len(self.cells_kgg)

    def masks(self, start: int, stop: int, image_chw: Tensor) -> Tensor:
        cells = self.cells_kgg[start:stop].to(image_chw)
        rows, columns = (
            self._cropped(side, self.shifts[start:stop, axis]).to(cells) for axis, side in enumerate(grid_of(image_chw))
        )
        return rows @ cells @ columns.transpose(1, 2)

    def _cropped(self, side: int, shifts: Tensor) -> Tensor:
        """For each mask, the rows [side, g] of the upsampling matrix inside its crop."""
        grid = self.cells_kgg.shape[-1]
        matrix = bilinear_matrix(grid, (grid + 1) * cell_side(side, grid))
        return matrix[shifts[:, None] + torch.arange(side)]


def cell_side(side: int, grid: int) -> int:
    """Pixels of one cell along an axis."""
    return ceil(side / grid)


class Rise(Explainer):
    """`1 / (N p) sum_i s(M_i) M_i` (Petsiuk et al., BMVC 2018, equation 6), masks as in their section 3.2."""

    def _explain_pass(self, inputs_nchw: Tensor, target: Target, seeds: Sequence[int]) -> list[list[Explanation]]:
        sources = [self._draw(image, seed, grid_of(inputs_nchw)) for image, seed in enumerate(seeds)]
        found = self.scorer.scores(inputs_nchw, target, sources)
        return [
            [
                checked_explanation(one, score, num_forwards=len(source))
                for one, score in zip(self._weighed(source, scores, inputs_nchw[source.image]), row, strict=True)
            ]
            for source, scores, row in zip(sources, found, self._scores(inputs_nchw, target), strict=True)
        ]

    def _draw(self, image: int, seed: int, full: Grid) -> RandomGrids:
        generator = torch.Generator().manual_seed(seed)
        count, grid, keep = self.parameters.num_masks, self.parameters.grid, self.parameters.keep
        cells = (torch.rand(count, grid, grid, generator=generator) < keep).float()
        shifts = [torch.randint(cell_side(side, grid), (count,), generator=generator) for side in full]
        return RandomGrids(image, cells, torch.stack(shifts, 1))

    def _weighed(self, source: RandomGrids, scores: Tensor, image_chw: Tensor) -> Map:
        """Per target the weighted mean of the masks, [T, H, W]."""
        total = scores.new_zeros(scores.shape[1], *grid_of(image_chw))
        for start in range(0, len(source), MASKS_PER_SUM):
            some = slice(start, min(len(source), start + MASKS_PER_SUM))
            total += torch.einsum("kt,khw->thw", scores[some], source.masks(some.start, some.stop, image_chw).double())
        return (total / (len(source) * self.parameters.keep)).cpu().numpy()
