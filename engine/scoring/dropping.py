"""Scores pictures of which only some patches are shown to a vision transformer: the perturbation `drop`."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from blocksight.engine.model.adapter import ModelAdapter
from blocksight.engine.model.targets import Readout
from blocksight.engine.model.token_dropping import TokenDropping
from blocksight.engine.scoring.forward import Forward
from blocksight.engine.scoring.perturb import DROP, perturbation
from blocksight.engine.scoring.scorer import MaskSource, Scorer

THRESHOLD = 0.5
"""A soft mask keeps a patch where its mean is above this."""
RESOLUTION = 2**-16
"""Means that are nearer to each other are equal: rounding must not decide which patch is the higher one."""
NUM_LEVELS = 8
"""Soft masks keep a multiple of this part of the patches, so that many fill one batch."""
MASKS_AT_ONCE = 64
"""Masks at full size while their patches are chosen."""


@dataclass(frozen=True)
class PatchMasks(MaskSource):
    """Masks that keep whole patches."""

    image: int
    values_khw: Tensor
    """1 for a kept patch, else 0, at the grid of the patches [K, h, w]."""

    @property
    def is_binary(self) -> bool:
        return True

    def __len__(self) -> int:
        return len(self.values_khw)

    def masks(self, start: int, stop: int, image_chw: Tensor) -> Tensor:
        return in_pixels(self.values_khw[start:stop], image_chw.shape[1:]).to(image_chw)


def in_pixels(patches_khw: Tensor, full: Sequence[int]) -> Tensor:
    """Every patch's value in all of its pixels, [K, H, W]."""
    high, wide = full[0] // patches_khw.shape[1], full[1] // patches_khw.shape[2]
    return patches_khw.repeat_interleave(high, 1).repeat_interleave(wide, 2)


@dataclass(frozen=True)
class DroppingScorer(Scorer):
    """A scorer that leaves tokens out. Masks that keep as many patches share batches of one shape."""

    dropping: TokenDropping = field(kw_only=True)

    def applied(self, inputs_nchw: Tensor, source: MaskSource) -> MaskSource:
        """The patches that each mask keeps: those with the highest means, the first of equal ones, at least one.

        A binary mask keeps as many as its area; a soft one as many as have a mean above a half, to the nearest eighth.
        """
        if isinstance(source, PatchMasks):
            return source
        kept = [self._patches(masks, source.is_binary) for masks in _some_masks(source, inputs_nchw[source.image])]
        kept = torch.cat(kept) if kept else inputs_nchw.new_zeros(0, self.dropping.num_patches)
        return PatchMasks(source.image, kept.unflatten(1, self.dropping.grid).double())

    def _patches(self, masks_khw: Tensor, is_binary: bool) -> Tensor:
        """Which patches are kept, bool [K, P]."""
        exact = functional.avg_pool2d(masks_khw[:, None].double(), self.dropping.patch_size).flatten(1)
        means = (exact / RESOLUTION).round() * RESOLUTION
        counts = means.sum(1).round().clamp(min=1) if is_binary else _nearest_level((means > THRESHOLD).sum(1), means)
        order = means.sort(dim=1, descending=True, stable=True).indices
        is_first = torch.arange(means.shape[1], device=means.device) < counts[:, None]
        return torch.zeros_like(is_first).scatter_(1, order, is_first)

    @torch.inference_mode()
    def scores(self, inputs_nchw: Tensor, target: Readout, sources: Sequence[MaskSource]) -> list[Tensor]:
        """As `Scorer.scores`; every mask stands for the patches that it keeps."""
        if not sources:
            return []
        masks = [self.applied(inputs_nchw, source) for source in sources]
        assert all(isinstance(one, PatchMasks) for one in masks)
        kept = torch.cat([one.values_khw.flatten(1) for one in masks if isinstance(one, PatchMasks)]) > 0
        sizes = [len(one) for one in masks]
        owners = torch.tensor([one.image for one in masks]).repeat_interleave(torch.tensor(sizes)).to(kept.device)
        scores = torch.empty(len(kept), target.num_targets, dtype=torch.float64, device=kept.device)
        counts = kept.sum(1)
        for count in counts.unique().tolist():
            rows = (counts == count).nonzero().flatten()
            for some in rows.split(self.batch_size):
                filled = torch.cat([some, some[-1:].expand(self.batch_size - len(some))])
                patches = kept[filled].nonzero()[:, 1].view(-1, count)
                logits = self.dropping.logits(inputs_nchw[owners[filled]], patches)
                scores[some] = target.score(logits, owners[filled])[: len(some)]
        return list(scores.split(sizes))


def _some_masks(source: MaskSource, image_chw: Tensor) -> Iterator[Tensor]:
    for start in range(0, len(source), MASKS_AT_ONCE):
        yield source.masks(start, min(len(source), start + MASKS_AT_ONCE), image_chw)


def _nearest_level(counts: Tensor, means_kp: Tensor) -> Tensor:
    """The nearest of 1, P/8, 2P/8, ..., P; the lower of two."""
    num_patches = means_kp.shape[1]
    levels = [max(1, round(num_patches * part / NUM_LEVELS)) for part in range(NUM_LEVELS + 1)]
    known = torch.tensor(levels, device=counts.device)
    return known[(counts[:, None] - known).abs().argmin(1)]


def make_scorer(adapter: ModelAdapter, baseline: str, batch_size: int, forward: Forward | None = None) -> Scorer:
    """The scorer with the named baseline. With `drop` passes are of the model itself, in float32.

    Raises ModelError if tokens of this model cannot be left out.
    """
    if baseline == DROP:
        removed = perturbation(adapter, "zero")
        return DroppingScorer(adapter, removed, batch_size, dropping=TokenDropping(adapter))
    return Scorer(adapter, perturbation(adapter, baseline), batch_size, forward)
