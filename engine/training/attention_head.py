"""The attention head of T-TAME and P-TAME: turns feature maps of several depths into one mask per class.

Ntrougkas et al., "T-TAME: Trainable Attention Mechanism for Explaining Convolutional Networks and Vision
Transformers" (IEEE Access 2024); "P-TAME" (2025) is the same head on the feature maps of a second, frozen network.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import sqrt

import torch
from torch import Tensor, nn
from torch.nn import functional

from blocksight.engine.model.resample import Grid, bilinear_matrix

MAX_SIDE = 56
"""The longest side of a mask before it is upsampled to the input."""

Statistics = list[tuple[Tensor, Tensor]]
"""Per branch the mean and the unbiased variance [C] of what its batch norm saw."""


@dataclass(frozen=True)
class TapShape:
    """The feature maps that one branch reads."""

    name: str
    """The place in the network."""
    channels: int
    grid: Grid


@dataclass(frozen=True)
class HeadShape:
    """All that decides the shapes of a head's tensors."""

    taps: tuple[TapShape, ...]
    """Shallow to deep."""
    num_classes: int
    has_bias: bool
    """T-TAME's fusion has a bias, P-TAME's has none."""
    doubles: bool
    """P-TAME upsamples by doubling the size again and again, and T-TAME at once."""

    @property
    def grid(self) -> Grid:
        """Height and width of the masks: those of the first tap, and at most `MAX_SIDE`."""
        height, width = self.taps[0].grid
        return min(height, MAX_SIDE), min(width, MAX_SIDE)

    @property
    def num_parameters(self) -> int:
        """How many numbers are trained."""
        channels = [tap.channels for tap in self.taps]
        per_branch = sum(own * own + 3 * own for own in channels)  # weight; bias, and the batch norm's two
        return per_branch + self.num_classes * (sum(channels) + self.has_bias)


class Branch(nn.Module):
    """`G = relu(BN(conv1x1(F)) + F)`, from maps [N, C, h, w] to maps of the same shape."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 1)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, maps_nchw: Tensor) -> Tensor:
        """With the frozen statistics of the whole training."""
        return torch.relu(self.norm(self.conv(maps_nchw)) + maps_nchw)

    def trained(self, maps_nchw: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """With the statistics of this batch alone, which are returned; the stored ones stay."""
        raw = self.conv(maps_nchw)
        normed = functional.batch_norm(raw, None, None, self.norm.weight, self.norm.bias, training=True)
        variance, mean = torch.var_mean(raw.detach(), (0, 2, 3))
        return torch.relu(normed + maps_nchw), (mean, variance)


class AttentionHead(nn.Module):
    """One mask per class, from the feature maps of the taps.

    `c_k = sum_l U_l (W_kl G_l) + bias_k`: a 1 x 1 convolution over the upsampled, stacked branches. It commutes with
    the upsampling U, whose rows sum to 1, so each branch is weighed at its own size, and only for the classes that
    are asked for.
    """

    def __init__(self, shape: HeadShape, seed: int) -> None:
        """Draws the first weights from the seed alone, within torch's usual bounds for convolutions."""
        super().__init__()
        self.shape = shape
        channels = [tap.channels for tap in shape.taps]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.branches = nn.ModuleList(Branch(own) for own in channels)
            bound = 1 / sqrt(sum(channels))
            self.weight = nn.Parameter(torch.empty(shape.num_classes, sum(channels)).uniform_(-bound, bound))
            bias = torch.empty(shape.num_classes).uniform_(-bound, bound) if shape.has_bias else None
        self.bias = None if bias is None else nn.Parameter(bias)
        self.eval()  # maps take the stored statistics; a step of the training takes its batch's by name

    def features(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """The branches' outputs, of the taps' feature maps [N, C_l, h_l, w_l]."""
        return [branch(own) for branch, own in zip(self.branches, maps, strict=True)]

    def trained_features(self, maps: Sequence[Tensor]) -> tuple[list[Tensor], Statistics]:
        """As `features`, with the statistics of this batch, which are returned."""
        found = [branch.trained(own) for branch, own in zip(self._branches, maps, strict=True)]
        return [own for own, _ in found], [statistics for _, statistics in found]

    def masks(self, features: Sequence[Tensor], classes: Tensor) -> Tensor:
        """The masks c [N, T, h, w] before the sigmoid, of classes [N, T] for the branches' outputs of N images."""
        parts = []
        widths = [tap.channels for tap in self.shape.taps]
        for own, weight, ups in zip(features, self.weight.split(widths, 1), self._upsamplings, strict=True):
            weighed = torch.einsum("ntc,nchw->nthw", weight[classes], own)
            rows, columns = (matrix.to(weighed) for matrix in ups)
            parts.append(rows @ weighed @ columns.T)
        total = torch.stack(parts).sum(0)
        return total if self.bias is None else total + self.bias[classes][:, :, None, None]

    @cached_property
    def _upsamplings(self) -> list[tuple[Tensor, Tensor]]:
        """Per tap the two matrices of U, float32."""
        axis = doubling_matrix if self.shape.doubles else bilinear_matrix
        return [
            (axis(tap.grid[0], self.shape.grid[0]).float(), axis(tap.grid[1], self.shape.grid[1]).float())
            for tap in self.shape.taps
        ]

    @property
    def _branches(self) -> list[Branch]:
        return [branch for branch in self.branches if isinstance(branch, Branch)]

    def move_statistics(self, statistics: Sequence[Statistics], momentum: float = 0.1) -> None:
        """Moves the stored statistics towards the mean over some batches, added up in their order."""
        with torch.no_grad():
            for index, branch in enumerate(self._branches):
                mean = in_order([own[index][0] for own in statistics])
                variance = in_order([own[index][1] for own in statistics])
                for stored, new in ((branch.norm.running_mean, mean), (branch.norm.running_var, variance)):
                    assert stored is not None
                    stored.mul_(1 - momentum).add_(new, alpha=momentum)


def in_order(parts: Sequence[Tensor]) -> Tensor:
    """The parts' mean, added up one after the other: the same bits wherever each part was computed."""
    total = parts[0].clone()
    for part in parts[1:]:
        total += part
    return total / len(parts)


def doubling_matrix(native: int, full: int) -> Tensor:
    """The matrix [full, native] (float64) of one axis that doubles as long as it fits, bilinearly each time."""
    matrix, size = torch.eye(native, dtype=torch.float64), native
    while size * 2 <= full:
        matrix, size = bilinear_matrix(size, size * 2) @ matrix, size * 2
    return matrix if size == full else bilinear_matrix(size, full) @ matrix
