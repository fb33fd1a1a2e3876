"""SISE: capture the blocks, select feature maps by gradient, sample with them as masks, fuse the block maps.

Sattarzadeh et al., "Explaining Convolutional Neural Networks through Attribution-Based Input Sampling and
Block-Wise Feature Aggregation", AAAI 2021 (arXiv 2010.00672): "the paper" everywhere in this package.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from blocksight.engine.catalog.parameters import SiseParameters
from blocksight.engine.errors import ModelError
from blocksight.engine.explainers.block_masks import BlockMasks, Chosen, block_maps, block_masks
from blocksight.engine.explainers.budget import Candidates, Sampled, sample
from blocksight.engine.explainers.explainer import Explainer, pad
from blocksight.engine.explainers.explanation import BlockMap, Explanation, checked_explanation
from blocksight.engine.explainers.fusion import GATES, cascade, otsu_foreground
from blocksight.engine.model.head import cheap_head
from blocksight.engine.model.resample import Grid, grid_of, pooled
from blocksight.engine.model.taps import gradients
from blocksight.engine.model.targets import Target
from blocksight.engine.model.transfers import to_host, together
from blocksight.engine.saliency import Map
from blocksight.engine.scoring.dropping import DroppingScorer, PatchMasks, in_pixels
from blocksight.engine.scoring.scorer import MaskSet


@dataclass(frozen=True)
class _Recorded:
    """What one forward pass and the backward passes give of N images."""

    scores: list[list[float]]
    """[N][T]."""
    maps: list[Tensor]
    """Per block the feature maps [N, C, h, w]."""
    alphas: list[Tensor]
    """Per block alpha [T, N, C], float64 on the CPU."""
    are_finite: Tensor
    """The block's feature maps of the image hold no NaN and no infinity, bool [blocks, N] on the CPU."""


@dataclass(frozen=True)
class Captured:
    """One image, ready for its masks to be scored."""

    scores: list[float]
    """Of its targets."""
    blocks: Sequence[BlockMasks]
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
    """The four phases of the paper, for normalised inputs; one Explanation per image and target.

    With signs a block's map is the positive part of the covariance of its masks and their scores.
    """

    def _prepare(self, blocks: Sequence[str]) -> None:
        self.blocks = self.adapter.network.blocks(blocks)
        self.taps = self.adapter.network.taps(self.blocks)
        self.kind = PatchMasks if isinstance(self.scorer, DroppingScorer) else MaskSet
        budget = self.parameters.budget
        self.head = cheap_head(self.adapter, self.blocks[-1]) if budget is not None else None
        if budget == 0 and self.head is None:
            raise ModelError(
                f"without any masked forward the head of {self.adapter.name} would have to score the masks, and it is "
                "too large for that: take a budget above 0, such as --fidelity balanced"
            )

    def _explain_pass(self, inputs_nchw: Tensor, target: Target, seeds: Sequence[int]) -> list[list[Explanation]]:
        images = self.capture(inputs_nchw, target)

        def run(wanted: Sequence[tuple[Candidates, int, Tensor | slice]]) -> list[Tensor]:
            return self.scorer.scores(inputs_nchw, target, [own.source(rows, block) for own, block, rows in wanted])

        candidates, asked = [image.candidates for image in images], self.parameters
        found = sample(run, candidates, target.num_targets, asked.budget, asked.complete_above)
        per_target = [self._fused(images, found, index) for index in range(target.num_targets)]
        return [list(own) for own in zip(*per_target, strict=True)]

    def capture(self, inputs_nchw: Tensor, target: Target) -> list[Captured]:
        """Phases 1 and 2 for at most `images_per_pass` inputs: the feature maps kept for each image, as masks."""
        full = grid_of(inputs_nchw)
        recorded = self._record(inputs_nchw, target)
        last = recorded.maps[-1]
        cams = _class_activation(last, recorded.alphas[-1])
        captured = []
        for some in together(len(inputs_nchw), last.device):
            chosen = [[self._chosen(recorded, block, image) for image in some] for block in range(len(self.blocks))]
            made = zip(some, block_masks(recorded.maps, chosen, some, full), strict=True)
            blocks = [self._applied(inputs_nchw, *own) for own in made]
            heads = self._head_scores(some, blocks, last, target, full)
            for image, own, scores in zip(some, blocks, heads, strict=True):
                masks, masses = [block.masks_khw for block in own], [block.mass for block in own]
                candidates = Candidates(image, masks, masses, cams[image], full, scores, self.kind)
                captured.append(Captured(recorded.scores[image], own, candidates))
        return captured

    def _applied(self, inputs_nchw: Tensor, image: int, blocks: Sequence[BlockMasks]) -> list[BlockMasks]:
        """An image's masks as they are applied: where tokens are left out, the patches that each keeps."""
        found = []
        for own in blocks:
            masks = self.scorer.applied(inputs_nchw, MaskSet(image, own.masks_khw))
            if isinstance(masks, PatchMasks):
                mass = in_pixels(masks.values_khw, grid_of(inputs_nchw)).sum((1, 2))
                own = replace(own, masks_khw=masks.values_khw, mass=mass)
            found.append(own)
        return found

    def _head_scores(
        self, some: range, blocks: Sequence[Sequence[BlockMasks]], maps_nchw: Tensor, target: Target, full: Grid
    ) -> list[Tensor | None]:
        """Per image the head's scores of its last feature maps under each mask, [N, T]; None without finite ones."""
        if self.head is None:
            return [None] * len(some)
        cells, found = grid_of(maps_nchw), []
        with torch.no_grad():
            for image, own in zip(some, blocks, strict=True):
                native = torch.cat([pooled(block.masks_khw, full, cells) for block in own])
                found.append(self.head.scores(maps_nchw[image], native, target, image))
        (are_finite,) = to_host([torch.stack([scores.isfinite().all() for scores in found])])
        return [scores if is_finite else None for scores, is_finite in zip(found, are_finite.tolist(), strict=True)]

    def _record(self, inputs_nchw: Tensor, target: Target) -> _Recorded:
        """One forward pass, and one backward pass per target."""
        count = len(inputs_nchw)
        logits, activations = self.taps(pad(inputs_nchw, self.images_per_pass))
        own = logits[:count].detach()
        alphas: list[list[Tensor]] = [[] for _ in self.blocks]
        for index in range(target.num_targets):
            direction = torch.zeros_like(logits)
            direction[:count] = target.direction(own, index).to(logits.dtype)
            for block, gradient in enumerate(gradients(logits, direction, activations)):
                alphas[block].append(gradient[:count].sum((2, 3), dtype=torch.float64))
        maps = [own[:count].detach() for own in activations]
        finite = torch.stack([own.isfinite().flatten(1).all(1) for own in maps])
        scores = target.score(own, torch.arange(count, device=own.device))
        moved, are_finite, *moved_alphas = to_host([scores, finite, *(torch.stack(alpha) for alpha in alphas)])
        return _Recorded(moved.tolist(), maps, moved_alphas, are_finite.bool())

    def _chosen(self, recorded: _Recorded, block: int, image: int) -> Chosen:
        """The channels of a block that an image keeps. Targets share the masks they both keep."""
        alphas = recorded.alphas[block][:, image]
        is_finite = bool(recorded.are_finite[block, image]) and bool(alphas.isfinite().all())
        kept = tuple(select(alpha if is_finite else torch.zeros_like(alpha), self.parameters) for alpha in alphas)
        return Chosen(torch.cat(kept).unique(), kept, is_finite)

    def _fused(self, images: Sequence[Captured], sampled: Sequence[Sampled], index: int) -> list[Explanation]:
        """`fuse` of all images of a pass."""
        found = []
        for some in together(len(images), sampled[0].scores.device) if images else ():
            found += self.fuse([images[image] for image in some], [sampled[image] for image in some], index)
        return found

    def fuse(self, images: Sequence[Captured], sampled: Sequence[Sampled], index: int) -> list[Explanation]:
        """Phases 3 and 4: weighs, upsamples and fuses the blocks of images for their target number `index`."""
        full = images[0].candidates.full
        scores = [own.scores[:, index] for own in sampled]
        maps = block_maps([image.blocks for image in images], scores, index, full, is_signed=self.is_signed)
        return [self._explanation(*own, index) for own in zip(images, sampled, maps, strict=True)]

    def _explanation(self, image: Captured, sampled: Sampled, maps: Sequence[Map | None], index: int) -> Explanation:
        blocks, full = image.blocks, image.candidates.full
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
