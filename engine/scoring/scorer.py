"""The scorer: packs the masks of many images into full, fixed-size batches and reads the scores."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from blocksight.engine.model.adapter import ModelAdapter
from blocksight.engine.model.resample import grid_of, upsampling
from blocksight.engine.model.targets import Readout
from blocksight.engine.scoring.forward import Forward
from blocksight.engine.scoring.perturb import Perturbation


class MaskSource(ABC):
    """A lazy stream of masks of one image."""

    image: int
    """Index of their input."""

    @abstractmethod
    def __len__(self) -> int:
        """How many masks there are."""

    @abstractmethod
    def masks(self, start: int, stop: int, image_chw: Tensor) -> Tensor:
        """The masks [start, stop) at the size, in the precision and on the device of the image: [n, H, W] in [0, 1]."""

    def perturbed(self, image_chw: Tensor, start: int, stop: int, perturbation: Perturbation) -> Tensor:
        """The masked inputs [start, stop) of the image [3, H, W], [n, 3, H, W]."""
        return perturbation(image_chw[None], self.masks(start, stop, image_chw)[:, None])


@dataclass(frozen=True)
class MaskSet(MaskSource):
    """Masks of one image on one native grid."""

    image: int
    values_khw: Tensor
    """[K, h, w] at the native grid; upsampled to the input's size they lie in [0, 1]."""

    def __len__(self) -> int:
        return len(self.values_khw)

    def masks(self, start: int, stop: int, image_chw: Tensor) -> Tensor:
        native = self.values_khw[start:stop].to(image_chw)
        return upsampling(grid_of(native), grid_of(image_chw), native.device)(native)


@dataclass(frozen=True)
class Piece:
    """Consecutive masks of one source that go into one batch."""

    which: int
    """Index of the mask source."""
    start: int
    stop: int


def pack(counts: Sequence[int], batch_size: int) -> list[list[Piece]]:
    """Fills batches of `batch_size` with masks from sources of these sizes, in order; only the last is short."""
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
    forward: Forward | None = None
    """Logits of one full batch; None: the adapter's own."""

    @torch.inference_mode()
    def scores(self, inputs_nchw: Tensor, target: Readout, sources: Sequence[MaskSource]) -> list[Tensor]:
        """The target's scores under every mask: for each source a float64 tensor [K, T] on the inputs' device.

        Per mask only the masked input is written; never more than one batch of masks exists.
        """
        shapes = [(len(source), target.num_targets) for source in sources]
        results = [torch.empty(shape, dtype=torch.float64, device=inputs_nchw.device) for shape in shapes]
        for batch in pack([rows for rows, _ in shapes], self.batch_size):
            images, perturbed = self._batch(inputs_nchw, sources, batch)
            scores = target.score((self.forward or self.adapter.logits)(perturbed), images)
            offset = 0
            for piece in batch:
                size = piece.stop - piece.start
                results[piece.which][piece.start : piece.stop] = scores[offset : offset + size]
                offset += size
        return results

    def _batch(
        self, inputs_nchw: Tensor, sources: Sequence[MaskSource], batch: Sequence[Piece]
    ) -> tuple[Tensor, Tensor]:
        """Image index [B] and masked input [B, 3, H, W] of every slot; empty slots hold zeros."""
        perturbed = inputs_nchw.new_zeros(self.batch_size, *inputs_nchw.shape[1:])
        images: list[int] = []
        for piece in batch:
            source = sources[piece.which]
            own = source.perturbed(inputs_nchw[source.image], piece.start, piece.stop, self.perturbation)
            perturbed[len(images) : len(images) + len(own)] = own
            images += [source.image] * len(own)
        images += [0] * (self.batch_size - len(images))
        return torch.tensor(images, device=inputs_nchw.device), perturbed
