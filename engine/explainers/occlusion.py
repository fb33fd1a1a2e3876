"""Occlusion: the loss of the score when a window hides a part of the image."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from blocksight.engine.errors import ModelError
from blocksight.engine.explainers.explainer import Explainer
from blocksight.engine.explainers.explanation import Explanation, checked_explanation
from blocksight.engine.model.targets import Target
from blocksight.engine.model.transfers import sent, to_host
from blocksight.engine.scoring.dropping import PatchMasks, in_pixels
from blocksight.engine.scoring.scorer import MaskSource


def window_starts(side: int, window: int, stride: int) -> list[int]:
    """First pixels of the windows along one axis, which cover every pixel; the last may cross the border."""
    return list(range(0, max(1, side - window + stride), stride))


@dataclass(frozen=True)
class Windows(MaskSource):
    """One mask per position of the window: 0 inside it, 1 elsewhere."""

    image: int
    rows: Tensor
    """Of each window: 0 in its rows, 1 in the others, [K, H], on the image's device."""
    columns: Tensor
    """As `rows`, [K, W]."""

    @property
    def is_binary(self) -> bool:
        return True

    def __len__(self) -> int:
        return len(self.rows)

    def masks(self, start: int, stop: int, image_chw: Tensor) -> Tensor:
        rows, columns = self.rows[start:stop].to(image_chw), self.columns[start:stop].to(image_chw)
        return torch.maximum(rows[:, :, None], columns[:, None, :])


def outside(starts: Sequence[int], window: int, side: int) -> Tensor:
    """Of each window along one axis: 0 in its pixels, 1 in the others, [n, side]."""
    first, pixels = torch.tensor(starts)[:, None], torch.arange(side)
    return ((pixels < first) | (pixels >= first + window)).float()


def covering(outside_ns: Tensor) -> Tensor:
    """Per pixel of an axis the numbers of the windows over it, ascending, [D, side]; filled up with n."""
    num_windows = len(outside_ns)
    numbers = torch.where(outside_ns == 0, torch.arange(num_windows)[:, None], num_windows).sort(0).values
    return numbers[: int((outside_ns == 0).sum(0).max())]


class Occlusion(Explainer):
    """The positive part of the mean of `s - s(window hidden)` over the windows that hide a pixel.

    Zeiler and Fergus, ECCV 2014, section 4.2.
    """

    def _prepare(self, blocks: Sequence[str]) -> None:
        size, stride = self.adapter.input_size, self.parameters.stride
        self.window = self.parameters.window
        if self.window >= min(size):
            raise ModelError(f"a window of {self.window} pixels hides all of an input of {size[0]} x {size[1]}")
        self.rows, self.columns = (
            outside(window_starts(side, self.window, stride), self.window, side) for side in size
        )
        self.num_windows = len(self.rows) * len(self.columns)
        self.per_pixel = self._summed(torch.ones(1, len(self.rows), len(self.columns), dtype=torch.float64))
        self.dropped = self._dropped()

    def _dropped(self) -> Tensor | None:
        """Which patches each window leaves out, 0 or 1 in float64 [K, h, w]; None: it paints pixels over."""
        blank = torch.zeros(1, 3, *self.adapter.input_size, device=self.adapter.device)
        applied = self.scorer.applied(blank, self._windows(0))
        if not isinstance(applied, PatchMasks):
            return None
        dropped = 1 - applied.values_khw.cpu()
        if not dropped.any(0).all():
            high, wide = blank.shape[2] // dropped.shape[1], blank.shape[3] // dropped.shape[2]
            raise ModelError(
                f"windows of {self.window} pixels, {self.parameters.stride} apart, never leave out some patches of "
                f"{high} x {wide} pixels: take multiples of a patch for both"
            )
        return dropped

    def _windows(self, image: int) -> Windows:
        rows = sent(self.rows.repeat_interleave(len(self.columns), 0), self.adapter.device)
        return Windows(image, rows, sent(self.columns.repeat(len(self.rows), 1), self.adapter.device))

    def _explain_pass(self, inputs_nchw: Tensor, target: Target, seeds: Sequence[int]) -> list[list[Explanation]]:
        windows = self._windows(0)
        own = [replace(windows, image=image) for image in range(len(inputs_nchw))]
        sources = [self.scorer.applied(inputs_nchw, one) for one in own]
        hidden = to_host(self.scorer.scores(inputs_nchw, target, sources))
        whole = self._scores(inputs_nchw, target)
        return [
            [
                checked_explanation(saliency, score, num_forwards=self.num_windows)
                for saliency, score in zip(self._mean_losses(row, scores).relu().numpy(), row, strict=True)
            ]
            for row, scores in zip(whole, hidden, strict=True)
        ]

    def _mean_losses(self, whole: Sequence[float], hidden: Tensor) -> Tensor:
        """Per target the mean loss over the windows that hide each pixel, [T, H, W], from scores [T] and [K, T]."""
        losses = torch.tensor(whole, dtype=torch.float64)[:, None] - hidden.T
        if self.dropped is not None:
            mean = torch.einsum("tk,khw->thw", losses, self.dropped) / self.dropped.sum(0)
            return in_pixels(mean, self.adapter.input_size)
        return self._summed(losses.reshape(-1, len(self.rows), len(self.columns))) / self.per_pixel

    def _summed(self, losses: Tensor) -> Tensor:
        """For each pixel the sum over its windows [T, R, C], in their order, [T, H, W]."""
        padded = functional.pad(losses, (0, 1, 0, 1))
        total = losses.new_zeros(len(losses), self.rows.shape[1], self.columns.shape[1])
        for own in covering(self.rows):
            lines = padded[:, own]
            for other in covering(self.columns):
                total += lines[:, :, other]
        return total
