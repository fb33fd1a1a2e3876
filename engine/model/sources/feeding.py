"""Feeds a model as its own library does: size, mean, std and colours are measured on plain pictures."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from blocksight.engine.errors import ModelError
from blocksight.engine.model.adapter import ModelAdapter
from blocksight.engine.model.preprocessing import Preprocessing

TRIAL = (240, 320)
"""Height and width of the plain pictures that show what is subtracted; no library refuses such a picture."""
SAME = 1e-6
"""How near a measured mean must be to the one that a configuration names."""


def fed_by(
    module: nn.Module,
    own: Preprocessing,
    mean: Sequence[float],
    std: Sequence[float],
    class_names: Sequence[str] | None = None,
) -> ModelAdapter:
    """The adapter of a module that is fed as its library feeds it.

    Size, mean, std and the order of the colours are measured on plain pictures; where the configuration's `mean` and
    `std` are what was measured they are taken as they are written. Raises ModelError if no picture passes, or if more
    is done to colours than a mean and a deviation say.
    """
    black, white, red, grey = (_plain(own, colour) for colour in ((0, 0, 0), (255,) * 3, (255, 0, 0), (128,) * 3))
    spread = (white - black).double()
    if not bool((spread > 0).all()) or not torch.allclose(black + spread * 128 / 255, grey.double(), atol=1e-4):
        raise ModelError("the model's own preprocessing does more to colours than to subtract a mean and divide by one")
    measured_std = 1 / spread
    measured_mean = 0 - black * measured_std  # no -0
    is_bgr = bool(red[2] == white[2]) and not bool(red[0] == white[0])
    size = own.apply(_picture((0, 0, 0))).shape[-2:]
    adapter = ModelAdapter(
        BlueFirst(module) if is_bgr else module,
        input_size=(int(size[0]), int(size[1])),
        mean=_written(measured_mean.flip(0) if is_bgr else measured_mean, mean),
        std=_written(measured_std.flip(0) if is_bgr else measured_std, std),
        class_names=class_names,
    )
    adapter.preprocessing = own
    return adapter


class BlueFirst(nn.Module):
    """A network that takes blue first, for RGB."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, inputs_nchw: Tensor) -> Tensor:
        """What the network returns for the colours in its order."""
        return self.network(inputs_nchw.flip(1))


def _picture(colour: Sequence[int]) -> NDArray[np.uint8]:
    return np.full((*TRIAL, 3), colour, np.uint8)


def _plain(own: Preprocessing, colour: Sequence[int]) -> Tensor:
    """The channels in the middle of the input of a picture of one colour, float64 [3]."""
    found = own.apply(_picture(colour)).double()
    if found.dim() != 3 or len(found) != 3:
        raise ModelError(f"the model's own preprocessing gives {tuple(found.shape)} for a picture; wanted [3, H, W]")
    return found[:, found.shape[1] // 2, found.shape[2] // 2]


def _written(measured: Tensor, written: Sequence[float]) -> tuple[float, ...]:
    """The numbers of the configuration if they are those that were measured, else these, to seven digits."""
    numbers = measured.tolist()
    is_same = len(written) == 3 and all(abs(a - b) <= SAME for a, b in zip(written, numbers, strict=True))
    return tuple(float(number) for number in written) if is_same else tuple(round(number, 7) for number in numbers)
