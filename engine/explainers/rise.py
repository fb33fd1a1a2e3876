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
from blocksight.engine.model.transfers import sent, to_host
from blocksight.engine.scoring.scorer import MaskSource

MASKS_PER_SUM = 64
"""Masks on the device at once while they are summed."""


@dataclass(frozen=True)
class RandomGrids(MaskSource):
    """Random cells of a coarse grid, upsampled to one cell more than the image and cropped at a random shift."""

    image: int
    cells_kgg: Tensor
    """0 or 1, in the image's precision, [K, g, g]."""
    shifts: Tensor
    """Rows and columns that each crop is moved by, [K, 2], each less than a cell's side."""
    crops: Sequence[Tensor]
    """Of rows and of columns: the upsampling inside the crop at each shift, [cell's side, side, g].

    All tensors are on the image's device.
    """

    def __len__(self) -> int:
        return len(self.cells_kgg)

    def masks(self, start: int, stop: int, image_chw: Tensor) -> Tensor:
        rows, columns = (own[self.shifts[start:stop, axis]].to(image_chw) for axis, own in enumerate(self.crops))
        return rows @ self.cells_kgg[start:stop] @ columns.transpose(1, 2)


def all_crops(side: int, grid: int) -> Tensor:
    """The matrices from a grid's axis to one cell more than `side` pixels, cropped at each shift [cell, side, grid]."""
    cell = cell_side(side, grid)
    matrix = bilinear_matrix(grid, (grid + 1) * cell).float()
    return torch.stack([matrix[shift : shift + side] for shift in range(cell)])


def cell_side(side: int, grid: int) -> int:
    """Pixels of one cell along an axis."""
    return ceil(side / grid)


class Rise(Explainer):
    """`1 / (N p) sum_i s(M_i) M_i` (Petsiuk et al., BMVC 2018, equation 6), masks as in their section 3.2.

    With signs the positive part of `1 / N sum_i (s(M_i) - mean s) M_i`, the covariance of score and mask: the sum
    itself has no zero.
    """

    def _prepare(self, blocks: Sequence[str]) -> None:
        sides = self.adapter.input_size
        self.crops = [sent(all_crops(side, self.parameters.grid), self.adapter.device) for side in sides]

    def _explain_pass(self, inputs_nchw: Tensor, target: Target, seeds: Sequence[int]) -> list[list[Explanation]]:
        cells, shifts = zip(*(self._draw(seed, grid_of(inputs_nchw)) for seed in seeds), strict=True)
        sent_cells = sent(torch.stack(cells), inputs_nchw.device).to(inputs_nchw)
        drawn = zip(sent_cells, sent(torch.stack(shifts), inputs_nchw.device), strict=True)
        grids = [RandomGrids(image, *own, self.crops) for image, own in enumerate(drawn)]
        sources = [self.scorer.applied(inputs_nchw, own) for own in grids]
        found = self.scorer.scores(inputs_nchw, target, sources)
        weighed = [self._weighed(*pair, inputs_nchw[0]) for pair in zip(sources, found, strict=True)]
        rows = zip(to_host(weighed), self._scores(inputs_nchw, target), strict=True)
        return [
            [
                checked_explanation(one, score, num_forwards=self.parameters.num_masks)
                for one, score in zip(saliency.numpy(), row, strict=True)
            ]
            for saliency, row in rows
        ]

    def _draw(self, seed: int, full: Grid) -> tuple[Tensor, Tensor]:
        """Cells and shifts of one image's masks."""
        generator = torch.Generator().manual_seed(seed)
        count, grid, keep = self.parameters.num_masks, self.parameters.grid, self.parameters.keep
        cells = torch.rand(count, grid, grid, generator=generator) < keep
        shifts = [torch.randint(cell_side(side, grid), (count,), generator=generator) for side in full]
        return cells.to(torch.uint8), torch.stack(shifts, 1)

    def _weighed(self, source: MaskSource, scores: Tensor, image_chw: Tensor) -> Tensor:
        """Per target the weighted mean of the masks, float64 [T, H, W]; signed: the positive part of the covariance."""
        if self.is_signed:
            scores = scores - scores.mean(0)
        total = scores.new_zeros(scores.shape[1], *grid_of(image_chw))
        for start in range(0, len(source), MASKS_PER_SUM):
            some = slice(start, min(len(source), start + MASKS_PER_SUM))
            total += torch.einsum("kt,khw->thw", scores[some], source.masks(some.start, some.stop, image_chw).double())
        return total.relu() / len(source) if self.is_signed else total / (len(source) * self.parameters.keep)
