"""Makes masks of feature maps, and block maps of the masks' scores, for some images at once."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from blocksight.engine.model.resample import Grid, grid_of, upsampling
from blocksight.engine.model.transfers import to_device, to_host
from blocksight.engine.saliency import Map, minmax


@dataclass(frozen=True)
class Chosen:
    """The channels of one block that one image keeps, on the CPU."""

    channels: Tensor
    """Kept for any target, ascending, [K]."""
    kept: tuple[Tensor, ...]
    """Per target the channels that passed the selection."""
    is_finite: bool
    """No feature map and no gradient held NaN or infinity."""


@dataclass(frozen=True)
class BlockMasks:
    """One block's masks for one image, ready to be scored."""

    masks_khw: Tensor
    """The maps kept for any target, without constant ones, at their native grid: float64 [K, h, w]."""
    mass: Tensor
    """The masks' sums over the full grid, float64 [K]."""
    channels: Tensor
    """Their channel numbers, ascending, [K], on the CPU."""
    kept: tuple[Tensor, ...]
    """Per target the channels that passed the selection."""
    is_finite: bool
    """As in `Chosen`."""


def block_masks(
    maps: Sequence[Tensor], chosen: Sequence[Sequence[Chosen]], images: range, full: Grid
) -> list[list[BlockMasks]]:
    """Per image its masks of each block. `maps` are [N, C, h, w] per block; `chosen` is per block and image.

    Indices go to the device in one copy, and one copy says which masks are constant.
    """
    picked = _picked(maps, chosen, images)
    samplings = [upsampling(grid_of(own), full, own.device) for own in picked]
    scaled = [sampling.normalise(own) for sampling, own in zip(samplings, picked, strict=True)]
    varied = [own.bool() for own in to_host([varied for _, varied in scaled])]
    rows = to_device([own.nonzero().flatten() for own in varied], maps[0].device)
    masks = [own[places] for (own, _), places in zip(scaled, rows, strict=True)]
    mass = [sampling.mass(own) for sampling, own in zip(samplings, masks, strict=True)]
    per_block = [_split(*own) for own in zip(masks, mass, varied, chosen, strict=True)]
    return [list(own) for own in zip(*per_block, strict=True)]


def _picked(maps: Sequence[Tensor], chosen: Sequence[Sequence[Chosen]], images: range) -> list[Tensor]:
    """Per block the chosen feature maps of all images, image after image, [M, h, w]."""
    sizes = [torch.tensor([len(one.channels) for one in own]) for own in chosen]
    owners = [torch.tensor(list(images)).repeat_interleave(own) for own in sizes]
    channels = [torch.cat([one.channels for one in own]) for own in chosen]
    moved = to_device([*owners, *channels], maps[0].device)
    pairs = zip(maps, moved[: len(maps)], moved[len(maps) :], strict=True)
    return [own[image, channel] for own, image, channel in pairs]


def _split(masks: Tensor, mass: Tensor, varied: Tensor, chosen: Sequence[Chosen]) -> list[BlockMasks]:
    """One block's masks [M, h, w] of all images, by image; `varied` says which of the chosen maps have a mask."""
    have_mask = varied.split([len(one.channels) for one in chosen])
    sizes = [int(own.sum()) for own in have_mask]
    parts = zip(masks.split(sizes), mass.split(sizes), have_mask, chosen, strict=True)
    return [
        BlockMasks(own, own_mass, one.channels[has_mask], one.kept, one.is_finite)
        for own, own_mass, has_mask, one in parts
    ]


def block_maps(
    images: Sequence[Sequence[BlockMasks]],
    scores: Sequence[Tensor],
    index: int,
    full: Grid,
    *,
    is_signed: bool = False,
) -> list[list[Map | None]]:
    """Per image its block maps for target `index`, each None if no map is kept for it.

    `U_b = minmax(U(sum_k q_k / mass_k A~_k))` over the maps kept for the target. `scores` holds q of each image's
    masks, block after block. All maps come to the host in one copy. `is_signed`: U_b is the positive part of
    `U(mean_k (q_k - mean q) A~_k)`, the covariance of masks and scores, relative to its largest absolute value.
    """
    blocks = list(zip(*images, strict=True))
    weighed = [torch.stack(_weighed(own, index)) for own in blocks]
    is_weighed = to_device([own.flatten() for own in weighed], scores[0].device)
    by_image = [own.split([len(block.channels) for block in masks]) for own, masks in zip(scores, images, strict=True)]
    joined = _covariances if is_signed else _weighted_sums
    sums = [
        joined(own, torch.cat(q), wanted.view(len(images), -1))
        for own, q, wanted in zip(blocks, zip(*by_image, strict=True), is_weighed, strict=True)
    ]
    finish = _positive_part if is_signed else minmax
    made = to_host([upsampling(grid_of(own), full, own.device)(own).reshape(-1, *full) for own in sums])
    per_block = [
        [finish(one.numpy()) if wanted.any() else None for one, wanted in zip(own, rows, strict=True)]
        for own, rows in zip(made, weighed, strict=True)
    ]
    return [list(own) for own in zip(*per_block, strict=True)]


def _weighed(masks: Sequence[BlockMasks], index: int) -> list[Tensor]:
    """Per image which of one block's masks, of all images [M], count in its map for the target: on the CPU."""
    own = [torch.isin(one.channels, one.kept[index]) for one in masks]
    sizes = [len(one) for one in own]
    found = []
    for image, counts in enumerate(own):
        before, after = sum(sizes[:image]), sum(sizes[image + 1 :])
        found.append(torch.cat([counts.new_zeros(before), counts, counts.new_zeros(after)]))
    return found


def _weighted_sums(masks: Sequence[BlockMasks], scores: Tensor, is_weighed: Tensor) -> Tensor:
    """`sum_k q_k / mass_k A~_k` of each image, [G, h, w]; of one image [h, w], whose bits are those of a matrix."""
    values, mass = (torch.cat(own) for own in zip(*((one.masks_khw, one.mass) for one in masks), strict=True))
    weights = torch.where(is_weighed, scores / mass, 0.0)
    return torch.einsum("gk,khw->ghw", weights, values).squeeze(0)


def _covariances(masks: Sequence[BlockMasks], scores: Tensor, is_weighed: Tensor) -> Tensor:
    """`mean_k (q_k - mean q) A~_k` of each image, [G, h, w]; of one image [h, w]."""
    values = torch.cat([one.masks_khw for one in masks])
    counts = is_weighed.sum(1, keepdim=True).clamp(min=1)
    means = torch.where(is_weighed, scores, 0.0).sum(1, keepdim=True) / counts
    weights = torch.where(is_weighed, (scores - means) / counts, 0.0)
    return torch.einsum("gk,khw->ghw", weights, values).squeeze(0)


def _positive_part(signed_hw: Map) -> Map:
    """The positive part, 1 where the absolute value is largest; zeros where there is none."""
    greatest = np.abs(signed_hw).max()
    return np.maximum(signed_hw, 0) / greatest if greatest else np.zeros_like(signed_hw)
