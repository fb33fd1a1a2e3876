"""Scores without full forward passes: the network's head runs on masked last feature maps."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from blocksight.engine.model.adapter import ModelAdapter
from blocksight.engine.model.blocks import Place
from blocksight.engine.model.nearness import are_near
from blocksight.engine.model.taps import Tail, gradients
from blocksight.engine.model.targets import Readout

MAX_HEAD_COST = 0.01
"""Share of a forward pass: a head that costs more is not run on every mask."""
NUM_TRIALS, TRIAL_DEVIATION = 8, 10.0
"""Pairs of random maps that test the sums, and their deviation: both signs occur, so that a ReLU shows."""
NUM_POOLED_TRIALS = 2
"""Random maps that test for a head of pooling and one linear layer."""
MAPS_PER_PASS = 64


@dataclass(frozen=True)
class Head:
    """The layers behind the last block, cheap enough to run under every mask."""

    run: Callable[[Tensor], Tensor]
    """Logits [N, K] of last feature maps [N, C, h, w]."""
    is_affine: bool
    """Logits of a sum of maps are sums of logits: one pass per cell gives all masks (pooling and a linear layer)."""

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
def cheap_head(adapter: ModelAdapter, block: Place) -> Head | None:
    """The head behind the last block; None if it costs too much to run under every mask.

    Affine heads, run once per cell, may cost one forward pass; others `MAX_HEAD_COST` of one under each mask.
    """
    tail = adapter.network.taps([block]).tail()
    inputs = torch.zeros(1, 3, *adapter.input_size, device=adapter.device)

    def run(maps: Tensor) -> Tensor:
        return tail(inputs.expand(len(maps), -1, -1, -1), maps)

    assert block.grid is not None
    own = torch.Generator().manual_seed(0)
    one, other = TRIAL_DEVIATION * torch.randn(2, NUM_TRIALS, block.channels, *block.grid, generator=own).to(
        adapter.device
    )
    with adapter.borrowed():
        cost, whole = _flops(lambda: run(one[:1])), _flops(lambda: adapter.logits(inputs))
        both, sums = run(one + other) + run(torch.zeros_like(one)), run(one) + run(other)
    is_affine = are_near(sums, both)
    is_affine = is_affine and cost * block.grid[0] * block.grid[1] <= whole  # it is run once for every cell
    return Head(run, is_affine) if is_affine or cost <= MAX_HEAD_COST * whole else None


def pooled_weights(adapter: ModelAdapter, block: Place) -> Tensor | None:
    """The weights [classes, C] (float64) of a linear layer on the maps' spatial means; None: the head is another.

    Tested on random maps: their logits must equal those of their means, for any image, and the sums that the weights
    give. The weights are gradients of one pass of the network.
    """
    tail = adapter.network.taps([block]).tail()
    assert block.grid is not None
    own = torch.Generator().manual_seed(0)
    shapes = ((block.channels, 1, 1), (block.channels, *block.grid), (3, *adapter.input_size), (3, *adapter.input_size))
    drawn = [
        TRIAL_DEVIATION * torch.randn(NUM_POOLED_TRIALS, *shape, generator=own).to(adapter.device) for shape in shapes
    ]
    levels, spread, one, other = drawn
    maps = levels + spread
    means = maps.mean((2, 3), keepdim=True)
    with adapter.borrowed():
        with torch.no_grad():
            wanted = tail(one, maps)
            if not are_near(tail(other, means.expand_as(maps)), wanted):
                return None
            nothing = tail(one[:1], torch.zeros_like(maps[:1]))
        weights = _slopes(tail, one[:1], maps[:1])
    if weights is None:
        return None
    predicted = means.flatten(1).double() @ weights.T + nothing.double()
    return weights if are_near(predicted, wanted.double()) else None


def _slopes(tail: Tail, inputs: Tensor, maps: Tensor) -> Tensor | None:
    """How much each logit grows with each channel's mean at these maps [1, C, h, w], float64 [classes, C].

    None if the network computes without gradients.
    """
    with torch.enable_grad():
        own = maps.detach().requires_grad_(True)
        logits = tail(inputs, own)
    if not logits.requires_grad:
        return None
    directions = torch.eye(logits.shape[1], device=maps.device)
    return torch.cat([gradients(logits, one[None], [own])[0].double().sum((2, 3)) for one in directions])


def _flops(run: Callable[[], Tensor]) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()
