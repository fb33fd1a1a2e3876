"""Block discovery: where in a traced network SISE reads its feature maps (the paper's phase 1).

A signal can bypass any layer inside a block, but not a tensor through which every path from input to
output passes. At each spatial size the last such tensor carries the block's information.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from blocksight.engine.model.layouts import Layout
from blocksight.engine.model.resample import Grid

SHRINK = 0.75
"""A grid at most this fraction of the last one, along either axis, begins a new block. A strided layer at
least halves a side; an unpadded convolution only trims it, and its stage goes on."""


@dataclass(frozen=True)
class Place:
    """One tensor of the network, in order of execution."""

    name: str
    """What `--blocks` calls it."""
    layout: Layout | None
    """How feature maps lie in it; None where it holds none."""
    unavoidable: bool
    """Every path from input to output passes through it."""
    learned: bool
    """It is computed with weights of its own."""

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
    learned: bool


def _begins_stage(grid: Grid, before: Grid) -> bool:
    return min(size / old for size, old in zip(grid, before, strict=True)) <= SHRINK


def _grows(grid: Grid, before: Grid) -> bool:
    return any(size > old for size, old in zip(grid, before, strict=True))


def _stages(places: Sequence[Place]) -> list[_Stage]:
    stages: list[_Stage] = []
    learned = False
    for place in places:
        learned |= place.learned
        grid = place.grid
        if not place.unavoidable or grid is None:
            continue
        before = stages[-1].last.grid if stages else None
        if before is None or _begins_stage(grid, before):
            stages.append(_Stage(place, learned))
        elif _grows(grid, before):
            continue  # padding: the same features with a rim of zeros
        else:
            stages[-1].last = place
            stages[-1].learned |= learned
        learned = False
    return stages


def discover_blocks(places: Sequence[Place]) -> list[Place]:
    """The blocks' output tensors, shallow to deep.

    Per spatial size the last unavoidable tensor, where some layer at that size has weights (a stage made
    by pooling or padding alone adds no feature maps) and the grid has more than one row and column.
    """
    return [stage.last for stage in _stages(places) if stage.learned and stage.last.grid and min(stage.last.grid) > 1]
