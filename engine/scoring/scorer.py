"""The scorer: packs the masks of many images into full, fixed-size batches and reads the scores."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from blocksight.engine.model.adapter import ModelAdapter
from blocksight.engine.model.resample import grid_of, upsampling
from blocksight.engine.model.targets import Readout
from blocksight.engine.model.transfers import sent
from blocksight.engine.scoring.forward import BufferedForward, Forward
from blocksight.engine.scoring.perturb import Perturbation


class MaskSource(ABC):
    """A lazy stream of masks of one image."""

    image: int
    """Index of their input."""

    @property
    def is_binary(self) -> bool:
        """True if every mask keeps a pixel or removes it."""
        return False

    @abstractmethod
    def __len__(self) -> int:
        """How many masks there are."""

    @abstractmethod
    def masks(self, start: int, stop: int, image_chw: Tensor) -> Tensor:
        """The masks [start, stop) at the size, in the precision and on the device of the image: [n, H, W] in [0, 1]."""

    def write(self, out_nchw: Tensor, image_chw: Tensor, start: int, perturbation: Perturbation) -> None:
        """Writes as many masked inputs as `out_nchw` takes, from `start` on, of the image [3, H, W]."""
        perturbation(image_chw[None], self.masks(start, start + len(out_nchw), image_chw)[:, None], out_nchw)


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

    def applied(self, inputs_nchw: Tensor, source: MaskSource) -> MaskSource:  # noqa: ARG002 - others need the inputs
        """The masks as they are applied to the inputs: of this perturbation the masks themselves."""
        return source

    @torch.inference_mode()
    def scores(self, inputs_nchw: Tensor, target: Readout, sources: Sequence[MaskSource]) -> list[Tensor]:
        """The target's scores under every mask: for each source a float64 tensor [K, T] on the inputs' device.

        Every batch is written into one buffer: the forward pass's own, if it has one.
        """
        sizes = [len(source) for source in sources]
        buffer = self._buffer(inputs_nchw)
        images = inputs_nchw.contiguous(memory_format=_layout(buffer))
        owners = self._owners([source.image for source in sources], sizes, inputs_nchw.device)
        scores = [torch.empty(0, target.num_targets, dtype=torch.float64, device=inputs_nchw.device)]
        for batch, owner in zip(pack(sizes, self.batch_size), owners, strict=True):
            self._fill(buffer, images, sources, batch)
            scores.append(target.score((self.forward or self.adapter.logits)(buffer), owner))
        return list(torch.cat(scores)[: sum(sizes)].split(sizes)) if sizes else []

    def _buffer(self, inputs_nchw: Tensor) -> Tensor:
        """A batch [B, 3, H, W] to write into: on a CPU plane by plane, where masks are multiplied fastest."""
        if isinstance(self.forward, BufferedForward):
            return self.forward.buffer_nchw
        batch = inputs_nchw.new_empty(self.batch_size, *inputs_nchw.shape[1:])
        return batch if batch.device.type == "cpu" else batch.to(memory_format=torch.channels_last)

    def _owners(self, images: Sequence[int], sizes: Sequence[int], device: torch.device) -> Sequence[Tensor]:
        """For each batch, the image number [B] of every slot; 0 for empty ones. One copy, which nothing waits for."""
        owners = torch.tensor(images, dtype=torch.int64).repeat_interleave(torch.tensor(sizes, dtype=torch.int64))
        filled = functional.pad(owners, (0, -len(owners) % self.batch_size))
        return sent(filled, device).split(self.batch_size) if len(filled) else ()

    def _fill(
        self, buffer_nchw: Tensor, images_nchw: Tensor, sources: Sequence[MaskSource], batch: Sequence[Piece]
    ) -> None:
        """Writes a batch's masked inputs; empty slots hold zeros."""
        first = 0
        for piece in batch:
            source, stop = sources[piece.which], first + piece.stop - piece.start
            source.write(buffer_nchw[first:stop], images_nchw[source.image], piece.start, self.perturbation)
            first = stop
        buffer_nchw[first:].zero_()


def _layout(tensor_nchw: Tensor) -> torch.memory_format:
    return torch.contiguous_format if tensor_nchw.is_contiguous() else torch.channels_last
