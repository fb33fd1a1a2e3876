"""The layout of feature maps in a tensor: channels first, channels last, or a transformer's tokens."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from blocksight.engine.model.resample import Grid

ASPECT_SLACK = 1.5
"""Largest factor between a grid's height to width and the input's; odd sizes and padding stay well inside."""

MAX_PREFIX = 0.5
"""Largest share of the tokens that stand before those of the picture: class, distillation and register tokens."""


@dataclass(frozen=True)
class Layout:
    """The axes of channels and places in a tensor."""

    kind: Literal["channels first", "channels last", "tokens"]
    channels: int
    grid: Grid
    """Height and width."""
    prefix: int = 0
    """Tokens before the picture's; no map holds them."""

    def maps(self, tensor: Tensor) -> Tensor:
        """The feature maps [N, C, h, w] in the tensor."""
        if self.kind == "channels first":
            return tensor
        if self.kind == "channels last":
            return tensor.permute(0, 3, 1, 2)
        return tensor[:, self.prefix :].transpose(1, 2).unflatten(2, self.grid)

    def tensor(self, maps: Tensor, like: Tensor) -> Tensor:
        """A tensor in this layout with the given feature maps; the rest is from `like`."""
        if self.kind == "channels first":
            return maps.clone()
        if self.kind == "channels last":
            return maps.permute(0, 2, 3, 1).clone()
        return torch.cat([like[:, : self.prefix], maps.flatten(2).transpose(1, 2)], 1)


def readings(shape: Sequence[int], full: Grid, grids: Sequence[Grid] = ()) -> Iterator[Layout]:
    """The layouts that a tensor of this shape may have, in a network whose inputs have the size `full`.

    A feature map keeps the input's aspect. Tokens are read in rows, on the `grids` of the tensors before them, the
    latest first, then on all grids of the input's aspect.
    """
    if len(shape) == 4 and _is_picture_like((shape[2], shape[3]), full):
        yield Layout("channels first", shape[1], (shape[2], shape[3]))
    if len(shape) == 4 and _is_picture_like((shape[1], shape[2]), full):
        yield Layout("channels last", shape[3], (shape[1], shape[2]))
    if len(shape) == 3:
        for grid in dict.fromkeys((*reversed(grids), *_grids(shape[1], full))):
            prefix = shape[1] - grid[0] * grid[1]
            if 0 <= prefix <= MAX_PREFIX * shape[1]:
                yield Layout("tokens", shape[2], grid, prefix)


def is_channels_last(shape: Sequence[int], full: Grid) -> bool:
    """True if only the last of four axes can be the channels, because height and width keep the input's aspect."""
    return next((one.kind == "channels last" for one in readings(shape, full)), False)


def _grids(num_tokens: int, full: Grid) -> Iterator[Grid]:
    """Grids of the input's aspect with at most so many cells, the largest first."""
    for height in range(math.isqrt(num_tokens * full[0] // full[1]), 2, -1):
        yield height, max(1, round(height * full[1] / full[0]))


def _is_picture_like(grid: Grid, full: Grid) -> bool:
    aspect = (grid[0] * full[1]) / (grid[1] * full[0])
    return 1 / ASPECT_SLACK <= aspect <= ASPECT_SLACK
