"""Bilinear upsampling as two small matrices, so that masks can stay at their native grid.

With `U A = R_h A R_w^T` (half-pixel centres, rows of R sum to 1) three things follow exactly: min-max
commutes with U once the extremes are those of U A, those extremes need only the samples next to each
native centre, and a mask's mass is `w_h^T A w_w` with `w = R^T 1`.
"""

from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import ceil, floor

import torch
from torch import Tensor

Grid = tuple[int, int]
"""Height and width."""


def grid_of(tensor: Tensor) -> Grid:
    """Height and width of [..., H, W]."""
    return (tensor.shape[-2], tensor.shape[-1])


def bilinear_matrix(native: int, full: int) -> Tensor:
    """The matrix R [full, native] (float64) of one axis: `F.interpolate(mode="bilinear", align_corners=False)`."""
    centres = (torch.arange(full, dtype=torch.float64) + 0.5) * (native / full) - 0.5
    centres = centres.clamp(0, native - 1)
    lower = centres.floor().long()
    upper = (lower + 1).clamp(max=native - 1)
    share = centres - lower
    matrix = torch.zeros(full, native, dtype=torch.float64)
    every = torch.arange(full)
    matrix[every, lower] += 1 - share
    matrix[every, upper] += share
    return matrix


def corner_samples(native: int, full: int) -> list[int]:
    """Output positions of one axis that can hold an extreme of the upsampled map.

    Between two native centres a bilinear patch is monotone along each axis, so its extremes are at the
    first or the last sample inside: at most 2 * native + 2 positions.
    """
    centres = [(index + 0.5) * full / native - 0.5 for index in range(native)]
    near = {step(centre) for centre in centres for step in (floor, ceil)}
    return sorted({0, full - 1} | {position for position in near if 0 <= position < full})


@dataclass(frozen=True)
class Upsampling:
    """U from one native grid to the full one, as float64 matrices on one device."""

    rows: Tensor
    """R_h [H, h]."""
    columns: Tensor
    """R_w [W, w]."""
    row_samples: Tensor
    """The rows of R_h that can hold an extreme."""
    column_samples: Tensor
    """The rows of R_w that can hold an extreme."""

    def __call__(self, maps_khw: Tensor) -> Tensor:
        """U A in the maps' own precision: [..., h, w] to [..., H, W]."""
        rows, columns = self._float32 if maps_khw.dtype == torch.float32 else (self.rows, self.columns)
        return rows.to(maps_khw.dtype) @ maps_khw @ columns.to(maps_khw.dtype).T

    @cached_property
    def _float32(self) -> tuple[Tensor, Tensor]:
        """The matrices in the precision of masked inputs; ordinary tensors, which autograd takes too."""
        with torch.inference_mode(mode=False):
            return self.rows.float(), self.columns.float()

    def extremes(self, maps_khw: Tensor) -> tuple[Tensor, Tensor]:
        """Least and greatest value of each *upsampled* map [..., h, w], as float64 [..., 1, 1]."""
        samples = self.row_samples @ maps_khw.double() @ self.column_samples.T
        return samples.amin((-2, -1), keepdim=True), samples.amax((-2, -1), keepdim=True)

    def mass(self, maps_khw: Tensor) -> Tensor:
        """Sum of each upsampled map [..., h, w] over the full grid, as float64 [...]."""
        return ((maps_khw.double() @ self.columns.sum(0)) * self.rows.sum(0)).sum(-1)

    def normalise(self, maps_khw: Tensor) -> tuple[Tensor, Tensor]:
        """Masks at the native grid whose upsampled values span [0, 1], float64 [K, h, w].

        The second tensor says which maps are not constant; a constant one has no mask and becomes
        zeros (SISE section 3: it would contribute nothing).
        """
        low, high = self.extremes(maps_khw)
        # a sample's weights may not sum to exactly 1: the map itself decides what varies
        varied = (high > low) & (maps_khw.amax((-2, -1), keepdim=True) > maps_khw.amin((-2, -1), keepdim=True))
        masks = torch.where(varied, (maps_khw.double() - low) / torch.where(varied, high - low, 1.0), 0.0)
        return masks, varied.flatten()


@lru_cache(maxsize=64)
def upsampling(native: Grid, full: Grid, device: torch.device) -> Upsampling:
    """U from `native` to `full` (both height, width) on a device; cached."""
    rows, columns = (bilinear_matrix(*axis).to(device) for axis in zip(native, full, strict=True))
    row_picks, column_picks = (corner_samples(*axis) for axis in zip(native, full, strict=True))
    return Upsampling(rows, columns, rows[row_picks], columns[column_picks])


def scaled(maps: Tensor) -> Tensor:
    """Each map [..., h, w] scaled linearly to [0, 1]; a constant map becomes zeros, a map with NaN all NaN."""
    low, high = maps.amin((-2, -1), keepdim=True), maps.amax((-2, -1), keepdim=True)
    return torch.where(high == low, 0.0, (maps - low) / torch.where(high == low, 1.0, high - low))


def pooling_matrix(full: int, cells: int) -> Tensor:
    """The matrix [cells, full] (float64) of one axis that averages over cells: `adaptive_avg_pool`."""
    matrix = torch.zeros(cells, full, dtype=torch.float64)
    for cell in range(cells):
        start, stop = cell * full // cells, -(-(cell + 1) * full // cells)
        matrix[cell, start:stop] = 1 / (stop - start)
    return matrix


@lru_cache(maxsize=64)
def _pooled_axis(native: int, full: int, cells: int, device: torch.device) -> Tensor:
    return (pooling_matrix(full, cells) @ bilinear_matrix(native, full)).to(device)


def pooled(maps_khw: Tensor, full: Grid, cells: Grid) -> Tensor:
    """The *upsampled* maps' means over a grid of cells, float64 [..., cells]: no full map is made."""
    native, device = grid_of(maps_khw), maps_khw.device
    rows, columns = (_pooled_axis(*axis, device) for axis in zip(native, full, cells, strict=True))
    return rows @ maps_khw.double() @ columns.T
