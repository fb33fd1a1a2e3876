"""What a library does to a picture before its model, as its configuration can be read."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from blocksight.engine.model.resample import Grid

Interpolation = Literal["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"]


@dataclass(frozen=True)
class Resizing:
    """How a picture is brought to the model's size: resized, then its centre cut out."""

    kind: Literal["short", "whole"]
    """`short`: the short side becomes `height`, the proportions stay; `whole`: height and width become these."""
    height: int
    width: int
    interpolation: Interpolation
    rounds_down: bool
    """The first row and column of the centre: rounded down, or to the nearest even number at a half."""


@dataclass(frozen=True)
class Preprocessing:
    """What a library does to a picture before its model."""

    apply: Callable[[NDArray[np.uint8]], Tensor]
    """Model input [3, H, W] of RGB pixels [height, width, 3]."""
    resizings: tuple[Resizing, ...]
    """How its configuration can be read, the likeliest first; which one it is is proved on pictures."""


def scaled_to(resizing: Resizing, own: Grid, asked: Grid) -> Resizing | None:
    """The same resizing for a model that is fed at another size than its own; None: it says nothing of that shape."""
    if own == asked:
        return resizing
    if resizing.kind == "short" and own[0] * asked[1] != own[1] * asked[0]:
        return None
    height, width = (
        round(side * new / old) for side, new, old in zip((resizing.height, resizing.width), asked, own, strict=True)
    )
    return Resizing(resizing.kind, height, width, resizing.interpolation, resizing.rounds_down)
