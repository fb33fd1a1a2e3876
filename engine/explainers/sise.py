"""SISE: capture the blocks, select feature maps by gradient, sample with them as masks, fuse the block maps.

Sattarzadeh et al., "Explaining Convolutional Neural Networks through Attribution-Based Input Sampling and
Block-Wise Feature Aggregation", AAAI 2021 (arXiv 2010.00672): "the paper" everywhere in this package.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from blocksight.engine.catalog.parameters import SiseParameters
from blocksight.engine.errors import ModelError
from blocksight.engine.explainers.budget import Candidates, Sampled, sample
from blocksight.engine.explainers.explainer import Explainer, pad
from blocksight.engine.explainers.explanation import BlockMap, Explanation, checked_explanation
from blocksight.engine.explainers.fusion import GATES, cascade, otsu_foreground
from blocksight.engine.model.head import cheap_head
from blocksight.engine.model.resample import Grid, grid_of, pooled, upsampling
from blocksight.engine.model.taps import gradients
from blocksight.engine.model.targets import Target
from blocksight.engine.saliency import Map, minmax


@dataclass(frozen=True)
class _Masks:
    """One block's masks for one image, ready to be scored."""

    masks_khw: Tensor
    """The maps kept for any target, without constant ones, at their native grid: float64 [K, h, w]."""
    channels: Tensor
    """Their channel numbers, ascending, [K]."""
    kept: tuple[Tensor, ...]
    """Per target the channels that passed the selection."""
    mass: Tensor
    """The masks' sums over the full grid, float64 [K]."""
    is_finite: bool
    """No feature map and no gradient held NaN or infinity."""


@dataclass(frozen=True)
class Captured:
    """One image, ready for its masks to be scored."""

    scores: list[float]
    """Of its targets."""
    blocks: Sequence[_Masks]
    """Shallow to deep."""
    candidates: Candidates
    """The same masks, for the sampling."""


def select(alphas: Tensor, parameters: SiseParameters) -> Tensor:
    """The kept channels of one block, ascending, given alpha [C] (the paper's equations 6 to 8).

    alpha_k is the gradient of the score summed over map k. k is kept if alpha_k > mu max(alpha); nothing is
    kept if no alpha is positive. Ada-SISE uses Otsu's threshold of the positive alphas in place of mu, and
    always keeps the largest.
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
    """The four phases of the paper, for normalised inputs; one Explanation per image and target."""

    def _prepare(self, blocks: Sequence[str]) -> None:
        self.blocks = self.adapter.network.blocks(blocks)
        self.taps = self.adapter.network.taps(self.blocks)
        budget = self.parameters.budget
        self.head = cheap_head(self.adapter, self.blocks[-1]) if budget is not None else None
        if budget == 0 and self.head is None:
            raise ModelError(
                f"without any masked forward the head of {self.adapter.name} would have to score the masks, and it is "
                "too large for that: take a budget above 0"
            )

    def _explain_pass(self, inputs_nchw: Tensor, target: Target, seeds: Sequence[int]) -> list[list[Explanation]]:
        images = self.capture(inputs_nchw, target)

        def run(wanted: Sequence[tuple[Candidates, int, Tensor]]) -> list[Tensor]:
            return self.scorer.scores(inputs_nchw, target, [own.source(rows, block) for own, block, rows in wanted])

        candidates, asked = [image.candidates for image in images], self.parameters
        found = sample(run, candidates, target.num_targets, asked.budget, asked.complete_above)
        return [
            [self.fuse(image, sampled, index) for index in range(target.num_targets)]
            for image, sampled in zip(images, found, strict=True)
        ]

    def capture(self, inputs_nchw: Tensor, target: Target) -> list[Captured]:
        """Phases 1 and 2 for at most `images_per_pass` inputs: the feature maps kept for each image, as masks."""
        scores, activations, alphas = self._record(inputs_nchw, target)
        full, last = grid_of(inputs_nchw), activations[-1]
        cams = _class_activation(last, alphas[-1])
        captured = []
        for image, score in enumerate(scores.tolist()):
            places = zip(activations, alphas, strict=True)
            blocks = [self._select(maps[image], alpha[:, image], full) for maps, alpha in places]
            masks, masses = [block.masks_khw for block in blocks], [block.mass for block in blocks]
            head_scores = self._head_scores(image, masks, last[image], target, full)
            captured.append(Captured(score, blocks, Candidates(image, masks, masses, cams[image], full, head_scores)))
        return captured

    def _head_scores(
        self, image: int, masks: Sequence[Tensor], maps_chw: Tensor, target: Target, full: Grid
    ) -> Tensor | None:
        """The head's scores of the image's last feature maps under each mask, [N, T]; None without finite ones."""
        if self.head is None:
            return None
        native = torch.cat([pooled(own, full, grid_of(maps_chw)) for own in masks])
        with torch.no_grad():
            scores = self.head.scores(maps_chw, native, target, image)
        return scores if scores.isfinite().all() else None

    def _record(self, inputs_nchw: Tensor, target: Target) -> tuple[Tensor, list[Tensor], list[Tensor]]:
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

    def _select(self, maps_chw: Tensor, alphas: Tensor, full: Grid) -> _Masks:
        """The masks of one block and image; `alphas` is [T, C]. Targets share the masks they both keep."""
        is_finite = bool(alphas.isfinite().all()) and bool(maps_chw.isfinite().all())
        kept = tuple(select(alpha if is_finite else torch.zeros_like(alpha), self.parameters) for alpha in alphas)
        union = torch.cat(kept).unique()
        upsample = upsampling(grid_of(maps_chw), full, maps_chw.device)
        masks, varied = upsample.normalise(maps_chw[union.to(maps_chw.device)])
        return _Masks(masks[varied], union[varied.cpu()], kept, upsample.mass(masks[varied]), is_finite)

    def fuse(self, image: Captured, sampled: Sampled, index: int) -> Explanation:
        """Phases 3 and 4: weighs, upsamples and fuses the blocks of one image for its target number `index`."""
        blocks, full = image.blocks, image.candidates.full
        scores = sampled.scores[:, index].split([len(block.channels) for block in blocks])
        maps = [_block_map(block, own, index, full) for block, own in zip(blocks, scores, strict=True)]
        present = [saliency for saliency in maps if saliency is not None]
        if not all(block.is_finite for block in blocks) or not all(np.isfinite(one).all() for one in present):
            saliency = np.full(full, np.nan)
        else:
            saliency = cascade(present, GATES[self.parameters.gate]) if present else np.zeros(full)
        facts = tuple(
            BlockMap(place.name, place.channels, tuple(block.kept[index].tolist()), block_map)
            for place, block, block_map in zip(self.blocks, blocks, maps, strict=True)
        )
        return checked_explanation(
            saliency,
            image.scores[index],
            facts,
            num_forwards=sampled.num_scored,
            quality=sampled.qualities[index],
            was_completed=sampled.was_completed,
        )


def _class_activation(maps: Tensor, alphas: Tensor) -> Tensor:
    """`relu(sum_k alpha_k A_k)` over its maximum, averaged over targets: [N, h, w] of [N, C, h, w] and [T, N, C]."""
    cams = torch.einsum("tnc,nchw->tnhw", alphas.to(maps.device), maps.double()).relu()
    return (cams / cams.amax((2, 3), keepdim=True).clamp(min=1e-300)).mean(0).nan_to_num()


def _block_map(block: _Masks, scores: Tensor, index: int, full: Grid) -> Map | None:
    """`U_b = minmax(U(sum_k q_k / mass_k A~_k))` over the maps kept for the target; None if none is kept."""
    chosen = torch.isin(block.channels, block.kept[index]).to(scores.device)
    if not chosen.any():
        return None
    weights = torch.where(chosen, scores / block.mass, 0.0)
    native = torch.einsum("k,khw->hw", weights, block.masks_khw)
    upsample = upsampling(grid_of(native), full, native.device)
    return minmax(upsample(native).cpu().numpy())
