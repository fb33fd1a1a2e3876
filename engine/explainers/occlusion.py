"""Occlusion: the loss of the score when a window hides a part of the image."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from blocksight.engine.errors import ModelError
from blocksight.engine.explainers.explainer import Explainer
from blocksight.engine.explainers.explanation import Explanation, checked_explanation
from blocksight.engine.model.resample import Grid, grid_of
from blocksight.engine.model.targets import Target
from blocksight.engine.scoring.scorer import MaskSource


def window_starts(side: int, window: int, stride: int) -> list[int]:
    """First pixels of the windows along one axis, which cover every pixel; the last may cross the border."""
    return list(range(0, max(1, side - window + stride), stride))


@dataclass(frozen=True)
class Windows(MaskSource):
    """One mask per position of the window: 0 inside it, 1 elsewhere."""

    image: int
    corners: tuple[tuple[int, int], ...]
    """Top and left of each window."""
    side: int

    def __len__(self) -> int:
        return len(self.corners)

    def masks(self, start: int, stop: int, image_chw: Tensor) -> Tensor:
        masks = image_chw.new_ones(stop - start, *grid_of(image_chw))
        for mask, (top, left) in zip(masks, self.corners[start:stop], strict=True):
            mask[top : top + self.side, left : left + self.side] = 0
        return masks


class Occlusion(Explainer):
    """The positive part of the mean of `s - s(window hidden)` over the windows that hide a pixel.

    Zeiler and Fergus, ECCV 2014, section 4.2.
    """

    def _prepare(self, blocks: Sequence[str]) -> None:
        size, stride = self.adapter.input_size, self.parameters.stride
        self.window = self.parameters.window
        if self.window >= min(size):
            raise ModelError(f"a window of {self.window} pixels hides all of an input of {size[0]} x {size[1]}")
        rows, columns = (window_starts(side, self.window, stride) for side in size)
        self.corners = tuple((top, left) for top in rows for left in columns)

    def _explain_pass(self, inputs_nchw: Tensor, target: Target, seeds: Sequence[int]) -> list[list[Explanation]]:
        full = grid_of(inputs_nchw)
        sources = [Windows(image, self.corners, self.window) for image in range(len(inputs_nchw))]
        hidden = self.scorer.scores(inputs_nchw, target, sources)
        whole = self._scores(inputs_nchw, target)
        return [
            [
                checked_explanation(
                    self._mean_loss(score - own, full).relu().numpy(), score, num_forwards=len(self.corners)
                )
                for score, own in zip(row, scores.T.cpu(), strict=True)
            ]
            for row, scores in zip(whole, hidden, strict=True)
        ]

    def _mean_loss(self, losses: Tensor, full: Grid) -> Tensor:
        """For every pixel, the mean loss over its windows, [H, W]."""
        total, count = torch.zeros(2, *full, dtype=torch.float64)
        for loss, (top, left) in zip(losses, self.corners, strict=True):
            place = slice(top, top + self.window), slice(left, left + self.window)
            total[place] += loss
            count[place] += 1
        return total / count
