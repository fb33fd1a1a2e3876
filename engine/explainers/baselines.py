"""Random baselines of feature maps: five families, each one function of an image's maps and a generator."""

from collections.abc import Callable, Mapping, Sequence
from math import prod, sqrt

import torch
from torch import Tensor

from blocksight.engine.catalog.parameters import Family
from blocksight.engine.model.transfers import sent

NUM_NOISE_STEPS, FIRST_NOISE, LAST_NOISE = 500, 1e-4, 0.02
SIGNAL_SHARE = prod(
    1 - FIRST_NOISE - (LAST_NOISE - FIRST_NOISE) * step / NUM_NOISE_STEPS for step in range(1, NUM_NOISE_STEPS + 1)
)
"""The share of the signal's variance that is left after a linear diffusion schedule of these steps, 0.00629."""

MIN_BLUR, MAX_BLUR = 3, 50
"""Deviations of the blur, in cells of the feature map."""
BLUR_REACH = 4
"""Radius of the blur in deviations."""

Baseline = Callable[[Tensor, torch.Generator, Sequence[Tensor]], Tensor]
"""Makes a baseline [K, h, w] from an image's maps [K, h, w] and the pool's; it draws numbers on the CPU."""


def normal(maps_khw: Tensor, generator: torch.Generator, _pool: Sequence[Tensor]) -> Tensor:
    """The maps at the end of a diffusion, almost pure Gaussian noise, in each channel's own range."""
    return _diffused(maps_khw, torch.randn(maps_khw.shape, generator=generator))


def uniform(maps_khw: Tensor, generator: torch.Generator, _pool: Sequence[Tensor]) -> Tensor:
    """As `normal`, with uniform noise from 0 to 1."""
    return _diffused(maps_khw, torch.rand(maps_khw.shape, generator=generator))


def _diffused(maps: Tensor, noise: Tensor) -> Tensor:
    """`sqrt(a) h + (1 - a) e`, stretched to the least and the greatest value of each channel of h."""
    mixed = sqrt(SIGNAL_SHARE) * maps + (1 - SIGNAL_SHARE) * sent(noise, maps.device).to(maps)
    low, high = mixed.amin((1, 2), keepdim=True), mixed.amax((1, 2), keepdim=True)
    own_low, own_high = _range(maps)
    share = (mixed - low) / torch.where(high > low, high - low, 1.0)
    return own_low + (own_high - own_low) * share


def _range(maps: Tensor) -> tuple[Tensor, Tensor]:
    """Least and greatest value of each channel, over both axes, [K, 1, 1]."""
    return maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)


def blur(maps_khw: Tensor, generator: torch.Generator, _pool: Sequence[Tensor]) -> Tensor:
    """The maps under a Gaussian whose deviation is a whole number of cells, from 3 to 50."""
    sigma = int(torch.randint(MIN_BLUR, MAX_BLUR + 1, (), generator=generator))
    rows, columns = (sent(blur_matrix(side, sigma), maps_khw.device).to(maps_khw) for side in maps_khw.shape[1:])
    return rows @ maps_khw @ columns.T


def blur_matrix(side: int, sigma: float) -> Tensor:
    """The matrix [side, side] (float64) of one axis under a Gaussian; the axis is mirrored at its ends.

    So a wide blur tends to the mean of the axis; with the ends repeated it would tend to the ends.
    """
    reach = round(BLUR_REACH * sigma)
    offsets = torch.arange(-reach, reach + 1)
    bell = torch.exp(-0.5 * (offsets.double() / sigma) ** 2)
    sources = (torch.arange(side)[:, None] + offsets) % (2 * side)
    sources = torch.minimum(sources, 2 * side - 1 - sources)
    matrix = torch.zeros(side, side, dtype=torch.float64)
    return matrix.scatter_add_(1, sources, (bell / bell.sum()).expand(side, -1))


def const(maps_khw: Tensor, generator: torch.Generator, _pool: Sequence[Tensor]) -> Tensor:
    """One value per channel, uniform from its least to its greatest over both axes."""
    low, high = _range(maps_khw)
    share = sent(torch.rand(len(maps_khw), 1, 1, generator=generator), maps_khw.device).to(maps_khw)
    return (low + (high - low) * share).expand_as(maps_khw)


def train(maps_khw: Tensor, generator: torch.Generator, pool: Sequence[Tensor]) -> Tensor:
    """The maps of another image of the data set; the image's own, whose path has no length, if the pool is empty."""
    if not pool:
        return maps_khw
    chosen = pool[int(torch.randint(len(pool), (), generator=generator))]
    return sent(chosen, maps_khw.device).to(maps_khw)


FAMILIES: Mapping[Family, Baseline] = {
    "normal": normal,
    "uniform": uniform,
    "blur": blur,
    "const": const,
    "train": train,
}

NOISY: tuple[Family, ...] = ("normal", "uniform")
"""Families whose paths have their own number of steps."""
