"""Extremal perturbation: the smooth mask of a given area that keeps the class's score highest."""

from collections.abc import Sequence
from math import ceil

import torch
from torch import Tensor
from torch.nn import functional

from blocksight.engine.explainers.explainer import Explainer, chunks
from blocksight.engine.explainers.explanation import Explanation, checked_explanation
from blocksight.engine.model.resample import Grid, grid_of, upsampling
from blocksight.engine.model.targets import Target
from blocksight.engine.scoring.perturb import blurred

STEP = 7
"""Pixels between the mask's parameters."""
SMOOTHNESS = 21 / STEP
"""Deviation of each parameter's bell, in cells of the grid."""
SHARPNESS = 20.0
"""Of the softmax that approximates the maximum over bells."""
NUM_LEVELS, MAX_BLUR = 8, 20.0
"""The pyramid of blurs: level 0 is blurred by 20 pixels, the last level is the image."""
AREA_WEIGHT, AREA_GROWTH = 300.0, 1.0035
"""The weight of the area's term, and its growth per iteration."""
FIRST_VALUE = 0.9
"""Every parameter's first value: nearly the whole picture is kept. The authors begin at 1: there the first step can
only lower a parameter, and rounding decides which pixels rank first."""
LEARNING_RATE, MOMENTUM = 0.01, 0.9
FINAL_BLUR = 0.09
"""Blur of the finished map, as a share of the shorter side."""
MAX_MASKS_PER_PASS = 32


def max_convolved(parameters: Tensor) -> Tensor:
    """The smooth maximum over bells of height `parameters` [n, g, g], on their own grid.

    The bell is flat to half its deviation: `exp(-2 max(0, d - 1/2)^2)`, d in deviations (Fong et al., section 3.2).
    Beyond the border heights are 0, so that a mask does not gather there.
    """
    reach = 1 + ceil(SMOOTHNESS)
    offsets = torch.arange(-reach, reach + 1, device=parameters.device, dtype=parameters.dtype)
    distance = torch.hypot(offsets[:, None], offsets[None, :]) / SMOOTHNESS
    bell = torch.exp(-2 * (distance - 0.5).clamp(min=0) ** 2).flatten()
    around = functional.pad(parameters[:, None], (reach,) * 4)
    heights = functional.unfold(around, 2 * reach + 1) * bell[:, None]
    smooth = (heights * (SHARPNESS * heights).softmax(1)).sum(1)
    return smooth.unflatten(1, grid_of(parameters))


def pyramid(image_chw: Tensor) -> Tensor:
    """The image at decreasing blur, [L, 3, H, W]."""
    levels = [MAX_BLUR * (1 - level / (NUM_LEVELS - 1)) for level in range(NUM_LEVELS)]
    return torch.stack([blurred(image_chw, sigma) if sigma > 0 else image_chw for sigma in levels])


def between_levels(levels: Tensor, masks_nhw: Tensor) -> Tensor:
    """Pixels of the pyramids [n, L, 3, H, W] at the heights in the masks [n, H, W], in [0, 1]: [n, 3, H, W]."""
    height = masks_nhw * (NUM_LEVELS - 1)
    lower = height.detach().floor().clamp(max=NUM_LEVELS - 2).nan_to_num()  # an index; the share stays NaN
    share = (height - lower)[:, None]
    index = lower.long()[:, None, None].expand(-1, 1, 3, -1, -1)
    below, above = (levels.gather(1, index + step)[:, 0] for step in (0, 1))
    return below * (1 - share) + above * share


class ExtremalPerturbation(Explainer):
    """The sum of the best masks over the areas, blurred (Fong, Patrick and Vedaldi, ICCV 2019, arXiv 1910.08485).

    Equations 4 to 8 in the preserving form, with the constants of the authors' benchmark; every second step
    sees the picture mirrored, as in their code. The maximum over bells is taken on the parameters' grid, and the
    result is upsampled bilinearly; areas are shares of the picture, without padding.
    """

    def _prepare(self, blocks: Sequence[str]) -> None:
        height, width = self.adapter.input_size
        self.grid: Grid = (ceil(height / STEP), ceil(width / STEP))

    def _explain_pass(self, inputs_nchw: Tensor, target: Target, seeds: Sequence[int]) -> list[list[Explanation]]:
        areas = self.parameters.areas
        jobs = [
            (image, index, area)
            for image in range(len(inputs_nchw))
            for index in range(target.num_targets)
            for area in areas
        ]
        totals = torch.zeros(len(inputs_nchw), target.num_targets, *grid_of(inputs_nchw), dtype=torch.float64)
        for batch in chunks(jobs, min(self.scorer.batch_size, MAX_MASKS_PER_PASS)):
            masks = self._optimised(inputs_nchw, target, batch)
            for (image, index, _), mask in zip(batch, masks, strict=True):
                totals[image, index] += mask
        sigma = FINAL_BLUR * min(grid_of(inputs_nchw))
        forwards = self.parameters.iterations * len(areas) * target.num_targets
        return [
            [
                checked_explanation(blurred(total[None], sigma)[0].numpy(), score, num_forwards=forwards)
                for total, score in zip(own, row, strict=True)
            ]
            for own, row in zip(totals, self._scores(inputs_nchw, target), strict=True)
        ]

    def _optimised(self, inputs_nchw: Tensor, target: Target, batch: list[tuple[int, int, float]]) -> Tensor:
        """The finished masks [n, H, W] on the CPU for images, targets and areas, each optimised alone."""
        size = min(self.scorer.batch_size, MAX_MASKS_PER_PASS)
        filled = [*batch, *batch[-1:] * (size - len(batch))]
        images = torch.tensor([image for image, _, _ in filled], device=inputs_nchw.device)
        pyramids = {image: pyramid(inputs_nchw[image]) for image in {image for image, _, _ in filled}}
        levels = torch.stack([pyramids[image] for image, _, _ in filled])
        wanted = self._ideal([area for _, _, area in filled], inputs_nchw)
        indices = [index for _, index, _ in filled]
        weights = inputs_nchw.new_full((size, *self.grid), FIRST_VALUE).requires_grad_(True)
        optimiser = torch.optim.SGD([weights], lr=LEARNING_RATE, momentum=MOMENTUM, dampening=MOMENTUM)
        for iteration in range(self.parameters.iterations):
            # the first mask is constant: its ranks mean nothing, and rounding would decide where it grows
            area_weight = AREA_WEIGHT * AREA_GROWTH**iteration if iteration else 0.0
            with torch.enable_grad():
                masks = self._masks(weights, inputs_nchw)
                perturbed = between_levels(levels, masks)
                logits = self.adapter.logits(perturbed.flip(3) if iteration % 2 else perturbed)
                ordered = masks.flatten(1).sort(1).values
                penalty = area_weight * ((ordered - wanted) ** 2).mean(1).sum()
            own = target.of(images).raw
            directions = [own.direction(logits.detach(), index) for index in range(target.num_targets)]
            direction = torch.stack([directions[index][slot] for slot, index in enumerate(indices)])
            optimiser.zero_grad()
            torch.autograd.backward([logits, penalty], [-direction.to(logits.dtype), torch.ones_like(penalty)])
            optimiser.step()
            with torch.no_grad():
                weights.clamp_(0, 1)
        with torch.no_grad():
            return self._masks(weights, inputs_nchw)[: len(batch)].double().cpu()

    def _masks(self, weights: Tensor, inputs_nchw: Tensor) -> Tensor:
        smooth = max_convolved(weights)
        return upsampling(self.grid, grid_of(inputs_nchw), smooth.device)(smooth).clamp(0, 1)

    def _ideal(self, areas: Sequence[float], inputs_nchw: Tensor) -> Tensor:
        """The sorted values of an ideal mask of each area: zeros, then ones, [n, H W]."""
        size = grid_of(inputs_nchw)[0] * grid_of(inputs_nchw)[1]
        wanted = inputs_nchw.new_zeros(len(areas), size)
        for row, area in zip(wanted, areas, strict=True):
            row[size - round(area * size) :] = 1
        return wanted
