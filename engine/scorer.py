"""The scorer: packs the masks of many images into full, fixed-size batches and reads the scores."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.models import ModelAdapter
from engine.perturb import Perturbation
from engine.resample import upsampling
from engine.targets import Target


@dataclass(frozen=True)
class MaskSet:
    """Masks of one image on one native grid."""

    image: int
    """Which of the inputs they are for."""
    values_khw: Tensor
    """[K, h, w] at the native grid; upsampled to the input's size they lie in [0, 1]."""


@dataclass(frozen=True)
class Piece:
    """A run of masks of one set that goes into one batch."""

    which: int
    """Index of the mask set."""
    start: int
    stop: int


def pack(counts: Sequence[int], batch_size: int) -> list[list[Piece]]:
    """Fills batches of `batch_size` with the masks of sets of these sizes, in order; only the last is short."""
    batches: list[list[Piece]] = []
    room = 0
    for which, count in enumerate(counts):
        start = 0
        while start < count:
            if room == 0:
                batches.append([])
                room = batch_size
            stop = min(count, start + room)
            batches[-1].append(Piece(which, start, stop))
            room -= stop - start
            start = stop
    return batches


@dataclass(frozen=True)
class Scorer:
    """Scores masked inputs. Every forward has the same shape, so results do not depend on the packing."""

    adapter: ModelAdapter
    perturbation: Perturbation
    batch_size: int
    """Masked inputs per forward pass; memory grows with it, results do not change beyond rounding."""

    @torch.inference_mode()
    def scores(self, inputs_nchw: Tensor, target: Target, mask_sets: Sequence[MaskSet]) -> list[Tensor]:
        """The target's scores under every mask: for each set a float64 tensor [K, T] on the inputs' device.

        Per mask only the masked input is written; never more than one batch of masks exists.
        """
        shapes = [(len(masks.values_khw), target.num_targets) for masks in mask_sets]
        results = [torch.empty(shape, dtype=torch.float64, device=inputs_nchw.device) for shape in shapes]
        for batch in pack([rows for rows, _ in shapes], self.batch_size):
            images, masks = self._batch(inputs_nchw, mask_sets, batch)
            logits = self.adapter.logits(self.perturbation(inputs_nchw[images], masks))
            scores = target.score(logits, images)
            offset = 0
            for piece in batch:
                size = piece.stop - piece.start
                results[piece.which][piece.start : piece.stop] = scores[offset : offset + size]
                offset += size
        return results

    def _batch(
        self, inputs_nchw: Tensor, mask_sets: Sequence[MaskSet], batch: Sequence[Piece]
    ) -> tuple[Tensor, Tensor]:
        """Image index [B] and mask [B, 1, H, W] of every slot; slots that nothing fills hold an empty mask."""
        full = (inputs_nchw.shape[2], inputs_nchw.shape[3])
        masks = inputs_nchw.new_zeros(self.batch_size, 1, *full)
        images: list[int] = []
        for piece in batch:
            mask_set = mask_sets[piece.which]
            native = mask_set.values_khw[piece.start : piece.stop].to(inputs_nchw.dtype)
            upsample = upsampling((native.shape[1], native.shape[2]), full, native.device)
            masks[len(images) : len(images) + len(native), 0] = upsample(native)
            images += [mask_set.image] * len(native)
        images += [0] * (self.batch_size - len(images))
        return torch.tensor(images, device=inputs_nchw.device), masks
