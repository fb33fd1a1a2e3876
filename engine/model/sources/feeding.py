"""Feeds a model as its own library does: size, mean, std and colours are measured on plain pictures."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from blocksight.engine.errors import ModelError
from blocksight.engine.model.adapter import ModelAdapter
from blocksight.engine.model.preprocessing import Preprocessing
from blocksight.engine.model.resample import Grid

TRIAL, WIDE_TRIAL = (280, 280), (240, 320)
"""Height and width of the plain pictures that show what is subtracted; no library refuses such a picture."""
SAME = 1e-6
"""How near a measured mean must be to the one that a configuration names."""


@dataclass(frozen=True)
class Measured:
    """What a library does to colours, and the size that it gives."""

    size: Grid
    """Of a square picture, if it depends on the picture."""
    is_fixed: bool
    """The size is the same for pictures of other proportions."""
    mean: tuple[float, ...]
    """Of RGB in [0, 1]."""
    std: tuple[float, ...]
    is_bgr: bool
    """The model takes blue first."""


def measured(own: Preprocessing, mean: Sequence[float] = (), std: Sequence[float] = ()) -> Measured:
    """Size, mean, std and the order of the colours, measured on plain pictures.

    Where the configuration's `mean` and `std` are what was measured they are taken as they are written. Raises
    ModelError if no picture passes, or if more is done to colours than a mean and a deviation say.
    """
    black, white, red, grey = (_plain(own, colour) for colour in ((0, 0, 0), (255,) * 3, (255, 0, 0), (128,) * 3))
    spread = white - black
    is_rgb, is_bgr = (_is_near(red, torch.where(torch.arange(3) == place, white, black)) for place in (0, 2))
    is_straight = bool((spread > 0).all()) and _is_near(black + spread * 128 / 255, grey)
    if not is_straight or not (is_rgb or is_bgr):
        raise ModelError("the model's own preprocessing does more to colours than to subtract a mean and divide by one")
    if is_bgr:
        black, spread = black.flip(0), spread.flip(0)
    own_mean = 0 - black / spread  # no -0
    size, other = (_size_of(own, trial) for trial in (TRIAL, WIDE_TRIAL))
    return Measured(size, size == other, _written(own_mean, mean), _written(1 / spread, std), is_bgr)


def fed_by(
    module: nn.Module,
    own: Preprocessing,
    mean: Sequence[float],
    std: Sequence[float],
    class_names: Sequence[str] | None = None,
) -> ModelAdapter:
    """The adapter of a module that is fed as its library feeds it. Raises ModelError as `measured`."""
    found = measured(own, mean, std)
    adapter = ModelAdapter(
        BlueFirst(module) if found.is_bgr else module,
        input_size=found.size,
        mean=found.mean,
        std=found.std,
        class_names=class_names,
    )
    if found.is_bgr:
        adapter.notes = ("the model takes blue first, as its own preprocessing turns the colours",)
    if not found.is_fixed:
        size = " x ".join(map(str, found.size))
        adapter.assumed = {
            "input_size": f"the model's own preprocessing gives each picture another size: {size} pixels are assumed "
            "(--input-size)"
        }
    return adapter


class BlueFirst(nn.Module):
    """A network that takes blue first, for RGB."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, inputs_nchw: Tensor) -> Tensor:
        """What the network returns for the colours in its order."""
        return self.network(inputs_nchw.flip(1))


def _picture(colour: Sequence[int], size: Grid = TRIAL) -> NDArray[np.uint8]:
    return np.full((*size, 3), colour, np.uint8)


def _size_of(own: Preprocessing, trial: Grid) -> Grid:
    """Height and width of what the library makes of a picture of this size."""
    height, width = own.apply(_picture((0, 0, 0), trial)).shape[-2:]
    return int(height), int(width)


def _plain(own: Preprocessing, colour: Sequence[int]) -> Tensor:
    """The channels in the middle of the input of a picture of one colour, float64 [3]."""
    found = own.apply(_picture(colour)).double()
    if found.dim() == 2:
        raise ModelError(
            "the model's own preprocessing cuts each picture into patches in each picture's own proportions (as "
            "SigLIP 2 does with free sizes), and here all pictures have one size: take a checkpoint of one size, such "
            "as SigLIP 2 at 224 or 384 pixels"
        )
    if found.dim() != 3 or len(found) != 3:
        raise ModelError(f"the model's own preprocessing gives {tuple(found.shape)} for a picture; wanted [3, H, W]")
    return found[:, found.shape[1] // 2, found.shape[2] // 2]


def _is_near(found: Tensor, wanted: Tensor) -> bool:
    return torch.allclose(found, wanted, atol=1e-4)


def _written(measured: Tensor, written: Sequence[float]) -> tuple[float, ...]:
    """The numbers of the configuration if they are those that were measured, else these, to seven digits."""
    numbers = measured.tolist()
    is_same = len(written) == 3 and all(abs(a - b) <= SAME for a, b in zip(written, numbers, strict=True))
    return tuple(float(number) for number in written) if is_same else tuple(round(number, 7) for number in numbers)
