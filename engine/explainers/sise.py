"""SISE: capture the blocks, select feature maps by gradient, sample with them as masks, fuse the block maps.

Sattarzadeh et al., "Explaining Convolutional Neural Networks through Attribution-Based Input Sampling and
Block-Wise Feature Aggregation", AAAI 2021 (arXiv 2010.00672): "the paper" everywhere in this package.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.catalog import SiseParameters
from engine.explainers.explainer import Explainer, pad
from engine.explanation import BlockMap, Explanation, sound_explanation
from engine.fusion import GATES, Map, cascade, minmax, otsu_foreground
from engine.resample import Grid, grid_of, upsampling
from engine.scorer import MaskSet
from engine.taps import gradients
from engine.targets import Target


@dataclass(frozen=True)
class _Sampled:
    """One block's masks for one image, ready to be scored."""

    masks_khw: Tensor
    """The maps kept for any target, without constant ones, at their native grid: float64 [K, h, w]."""
    channels: Tensor
    """Their channel numbers, ascending, [K]."""
    kept: tuple[Tensor, ...]
    """Per target the channels that passed the selection."""
    mass: Tensor
    """The masks' sums over the full grid, float64 [K]."""
    finite: bool
    """No feature map and no gradient held NaN or infinity."""


def select(alphas: Tensor, parameters: SiseParameters) -> Tensor:
    """The kept channels of one block, ascending, given alpha [C] (the paper's equations 6 to 8).

    alpha_k is the gradient of the score summed over map k; k is kept where alpha_k > mu max(alpha), and
    nothing is kept where no alpha is positive. Ada-SISE puts Otsu's threshold on the positive alpha in
    place of mu and always keeps the largest.
    """
    largest = alphas.max()
    if largest <= 0:
        return torch.empty(0, dtype=torch.int64)
    if parameters.selection == "mu":
        return (alphas > parameters.mu * largest).nonzero().flatten()
    positive = (alphas > 0).nonzero().flatten()
    above = otsu_foreground((alphas[positive] / largest).double().numpy())
    above[alphas[positive].argmax()] = True
    return positive[torch.from_numpy(above)]


class Sise(Explainer):
    """The four phases; `explain` takes normalised inputs and gives one Explanation per image and target."""

    def _prepare(self, blocks: Sequence[str]) -> None:
        self.blocks = self.adapter.network.blocks(blocks)
        self.taps = self.adapter.network.taps(self.blocks)

    def _explain_pass(self, inputs_nchw: Tensor, target: Target, seeds: Sequence[int]) -> list[list[Explanation]]:
        scores, activations, alphas = self._capture(inputs_nchw, target)
        full = grid_of(inputs_nchw)
        sampled = [
            [self._select(maps[image], alpha[:, image], full) for maps, alpha in zip(activations, alphas, strict=True)]
            for image in range(len(inputs_nchw))
        ]
        mask_scores = iter(
            self.scorer.scores(
                inputs_nchw,
                target,
                [MaskSet(image, block.masks_khw) for image, blocks in enumerate(sampled) for block in blocks],
            )
        )
        explanations = []
        for blocks, score in zip(sampled, scores.tolist(), strict=True):
            block_scores = [next(mask_scores) for _ in blocks]
            explanations.append(
                [self._fuse(blocks, block_scores, index, score[index], full) for index in range(target.num_targets)]
            )
        return explanations

    def _capture(self, inputs_nchw: Tensor, target: Target) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Scores [N, T], and per block the feature maps [N, C, h, w] and alpha [T, N, C] (float64, CPU)."""
        count = len(inputs_nchw)
        logits, activations = self.taps(pad(inputs_nchw, self.images_per_pass))
        own = logits[:count].detach()
        alphas: list[list[Tensor]] = [[] for _ in self.blocks]
        for index in range(target.num_targets):
            direction = torch.zeros_like(logits)
            direction[:count] = target.direction(own, index).to(logits.dtype)
            for block, gradient in enumerate(gradients(logits, direction, activations)):
                alphas[block].append(gradient[:count].sum((2, 3), dtype=torch.float64).cpu())
        scores = target.score(own, torch.arange(count, device=own.device))
        return (
            scores,
            [maps[:count].detach() for maps in activations],
            [torch.stack(alpha) for alpha in alphas],
        )

    def _select(self, maps_chw: Tensor, alphas: Tensor, full: Grid) -> _Sampled:
        """The masks of one block and image; `alphas` is [T, C]. Targets share the masks they both keep."""
        finite = bool(alphas.isfinite().all()) and bool(maps_chw.isfinite().all())
        kept = tuple(select(alpha if finite else torch.zeros_like(alpha), self.parameters) for alpha in alphas)
        union = torch.cat(kept).unique()
        upsample = upsampling(grid_of(maps_chw), full, maps_chw.device)
        masks, varied = upsample.normalise(maps_chw[union.to(maps_chw.device)])
        return _Sampled(masks[varied], union[varied.cpu()], kept, upsample.mass(masks[varied]), finite)

    def _fuse(
        self, blocks: Sequence[_Sampled], block_scores: Sequence[Tensor], index: int, score: float, full: Grid
    ) -> Explanation:
        """Weighs, upsamples and fuses the blocks of one image for its target number `index`."""
        maps = [
            _block_map(block, scores[:, index], index, full) for block, scores in zip(blocks, block_scores, strict=True)
        ]
        present = [saliency for saliency in maps if saliency is not None]
        if not all(block.finite for block in blocks) or not all(np.isfinite(one).all() for one in present):
            saliency = np.full(full, np.nan)
        else:
            saliency = cascade(present, GATES[self.parameters.gate]) if present else np.zeros(full)
        facts = tuple(
            BlockMap(place.name, place.channels, tuple(block.kept[index].tolist()), block_map)
            for place, block, block_map in zip(self.blocks, blocks, maps, strict=True)
        )
        return sound_explanation(saliency, score, facts, num_forwards=sum(len(block.channels) for block in blocks))


def _block_map(block: _Sampled, scores: Tensor, index: int, full: Grid) -> Map | None:
    """`U_b = minmax(U(sum_k q_k / mass_k A~_k))` over the maps kept for the target; None where there is none."""
    chosen = torch.isin(block.channels, block.kept[index]).to(scores.device)
    if not chosen.any():
        return None
    weights = torch.where(chosen, scores / block.mass, 0.0)
    native = torch.einsum("k,khw->hw", weights, block.masks_khw)
    upsample = upsampling(grid_of(native), full, native.device)
    return minmax(upsample(native).cpu().numpy())
