"""Scores without forward passes: what the network's head says of the last feature maps under a mask."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from engine.blocks import Place
from engine.models import ModelAdapter
from engine.targets import Readout

CHEAP = 0.01
"""Of a forward pass: a head that costs more is not run on every mask."""
SLACK = 1e-4
"""How far, relative to its values, an affine head may be from its own sums."""
TRIALS, SPREAD = 8, 10.0
"""Pairs of random maps that the sums are tried on, and their deviation: of both signs, so that a ReLU shows."""
MAPS_PER_PASS = 64


@dataclass(frozen=True)
class Head:
    """What follows the last block, cheap enough to be run under every mask."""

    run: Callable[[Tensor], Tensor]
    """Logits [N, K] of last feature maps [N, C, h, w]."""
    is_affine: bool
    """Logits of a sum of maps are sums of logits: one pass per cell serves all masks (pooling and a linear layer)."""

    def scores(self, maps_chw: Tensor, masks_khw: Tensor, target: Readout, image: int) -> Tensor:
        """The target's scores [K, T] under masks [K, h, w] at the grid of the image's last maps [C, h, w]."""
        masks = masks_khw.to(maps_chw)
        logits = self._sums(maps_chw, masks) if self.is_affine else self._one_by_one(maps_chw, masks)
        return target.score(logits, torch.full((len(masks),), image, device=logits.device))

    def _one_by_one(self, maps_chw: Tensor, masks: Tensor) -> Tensor:
        return torch.cat([self.run(maps_chw * some[:, None]) for some in masks.split(MAPS_PER_PASS)])

    def _sums(self, maps_chw: Tensor, masks: Tensor) -> Tensor:
        """`z(0) + sum_cells m_cell (z(A on the cell alone) - z(0))`."""
        height, width = maps_chw.shape[1:]
        cells = torch.eye(height * width, dtype=maps_chw.dtype, device=maps_chw.device).view(-1, height, width)
        nothing = self.run(torch.zeros_like(maps_chw)[None])
        return nothing + masks.flatten(1) @ (self._one_by_one(maps_chw, cells) - nothing)


@torch.no_grad()
def head_of(adapter: ModelAdapter, block: Place) -> Head | None:
    """The head behind the last block; None where all masks together would cost more than they are worth.

    Affine heads, run once per cell, may cost one forward pass; others `CHEAP` of one under each mask.
    """
    tail = adapter.network.taps([block]).tail()
    inputs = torch.zeros(1, 3, *adapter.input_size, device=adapter.device)

    def run(maps: Tensor) -> Tensor:
        return tail(inputs.expand(len(maps), -1, -1, -1), maps)

    assert block.grid is not None
    own = torch.Generator().manual_seed(0)
    one, other = SPREAD * torch.randn(2, TRIALS, block.channels, *block.grid, generator=own).to(adapter.device)
    with adapter.borrowed():
        cost, whole = _flops(lambda: run(one[:1])), _flops(lambda: adapter.logits(inputs))
        both, sums = run(one + other) + run(torch.zeros_like(one)), run(one) + run(other)
    is_affine = bool((both - sums).abs().max() <= SLACK * both.abs().max())
    is_affine = is_affine and cost * block.grid[0] * block.grid[1] <= whole  # it is run once for every cell
    return Head(run, is_affine) if is_affine or cost <= CHEAP * whole else None


def _flops(run: Callable[[], Tensor]) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()
