"""The layout of feature maps in a tensor: channels first, channels last, or a transformer's tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from blocksight.engine.model.resample import Grid

ASPECT_SLACK = 1.5
"""Largest factor between a grid's height to width and the input's; odd sizes and padding stay well inside."""

MAX_PREFIX = 8
"""Most tokens before those of the picture: class, distillation and register tokens."""


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


def layout_of(shape: Sequence[int], full: Grid, before: Grid | None) -> Layout | None:
    """The layout of a tensor of this shape, in a network whose inputs have the size `full`; None: it holds no maps.

    A feature map keeps the input's aspect. Tokens are recognised by their number: the places of the feature
    map `before`, plus at most `MAX_PREFIX`.
    """
    if len(shape) == 4 and _is_picture_like((shape[2], shape[3]), full):
        return Layout("channels first", shape[1], (shape[2], shape[3]))
    if len(shape) == 4 and _is_picture_like((shape[1], shape[2]), full):
        return Layout("channels last", shape[3], (shape[1], shape[2]))
    if len(shape) == 3 and before is not None and 0 <= shape[1] - before[0] * before[1] <= MAX_PREFIX:
        return Layout("tokens", shape[2], before, shape[1] - before[0] * before[1])
    return None


def _is_picture_like(grid: Grid, full: Grid) -> bool:
    aspect = (grid[0] * full[1]) / (grid[1] * full[0])
    return 1 / ASPECT_SLACK <= aspect <= ASPECT_SLACK
