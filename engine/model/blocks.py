"""Block discovery: finds the tensors of a network where SISE reads feature maps (the paper's phase 1).

A signal can bypass any layer inside a block, but not a tensor that every path from input to output
passes. At each spatial size the last of these tensors is the block's output.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from blocksight.engine.model.layouts import Layout
from blocksight.engine.model.resample import Grid

SHRINK = 0.75
"""A grid at most this fraction of the last one, along either axis, begins a new block. A strided layer at
least halves a side; an unpadded convolution only trims it and begins none."""


@dataclass(frozen=True)
class Place:
    """One tensor of the network."""

    name: str
    """Its name for `--blocks`."""
    layout: Layout | None
    """The layout of its feature maps; None if it holds none."""
    is_unavoidable: bool
    """Every path from input to output passes through it."""
    has_weights: bool
    """It is computed with weights of its own."""
    fault: str = ""
    """Why it holds no feature maps, as a clause."""
    is_assumed: bool = False
    """Its layout is told by its shape alone, because it hardly depends on the picture."""

    @property
    def proof(self) -> str:
        """How its layout was told, as a clause."""
        if self.is_assumed:
            return "by its shape alone: it hardly depends on the picture"
        return "cells follow changed patches; no way around"

    @property
    def grid(self) -> Grid | None:
        """Height and width of its feature maps."""
        return self.layout.grid if self.layout is not None else None

    @property
    def channels(self) -> int:
        """How many feature maps it holds."""
        return self.layout.channels if self.layout is not None else 0


@dataclass
class _Stage:
    """The unavoidable tensors of one spatial size."""

    last: Place
    has_weights: bool


def _begins_stage(grid: Grid, before: Grid) -> bool:
    return min(size / old for size, old in zip(grid, before, strict=True)) <= SHRINK


def _grows(grid: Grid, before: Grid) -> bool:
    return any(size > old for size, old in zip(grid, before, strict=True))


def _stages(places: Sequence[Place]) -> list[_Stage]:
    stages: list[_Stage] = []
    learned = False
    for place in places:
        learned |= place.has_weights
        grid = place.grid
        if not place.is_unavoidable or grid is None:
            continue
        before = stages[-1].last.grid if stages else None
        if before is None or _begins_stage(grid, before):
            stages.append(_Stage(place, learned))
        elif _grows(grid, before):
            continue  # padding: the same features with a rim of zeros
        else:
            stages[-1].last = place
            stages[-1].has_weights |= learned
        learned = False
    return stages


def discover_blocks(places: Sequence[Place]) -> list[Place]:
    """The blocks' output tensors, shallow to deep.

    Per spatial size the last unavoidable tensor, if some layer at that size has weights (a stage of
    pooling or padding alone adds no feature maps) and the grid has more than one row and column.
    """
    return [
        stage.last for stage in _stages(places) if stage.has_weights and stage.last.grid and min(stage.last.grid) > 1
    ]
