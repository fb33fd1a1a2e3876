"""Predicts the scores of masks that were not run: a Gaussian process over masks, fitted to the scores of some.

A block map is `V_b = sum_k q_k C_k`: every C_k is known, and only the scalars q_k cost forward passes. The masks
are exact; the missing q_k are predicted. Rows are the masks of one image, block after block; everything is float64,
on the masks' device, and depends on the image alone. Several images (G, padded to one size) are computed together,
because on a GPU the number of steps costs most.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

SCALES = (0.7, 1.4, 2.8, 5.6)
"""Length scales to try, in median distances between masks."""
NOISES = (1e-3, 1e-2, 1e-1, 1.0)
"""Noise variances to try; the process has variance 1."""
DESIGN_SCALE = 4.0
"""Length scale of the design, in the same unit."""
TREND = 0.3
"""Prior deviation of the trend's two coefficients: a constant, and the head's score."""
PRIOR_WEIGHT = 2.0
"""Weight of the process's own error estimate, in scores of a block."""
TIE_TOLERANCE = 1e-3
"""Leave-one-out errors within this share count as equal: rounding must not choose."""
LEAST_PER_BLOCK = 4


def padded(tensors: Sequence[Tensor], value: float = 0) -> Tensor:
    """The tensors [n, ...] of G images as one [G, longest n, ...]."""
    return pad_sequence(list(tensors), batch_first=True, padding_value=value)


def distances(rows: Tensor, others: Tensor) -> Tensor:
    """Distances [..., n, m] between points [..., n, D] and [..., m, D]."""
    return torch.cdist(rows, others, compute_mode="use_mm_for_euclid_dist")


def matern(distance: Tensor, scale: Tensor | float) -> Tensor:
    """The Matern-5/2 kernel at these distances and this length scale, 0 to 1."""
    far = distance * (5**0.5 / scale)
    return (1 + far + far**2 / 3) * (-far).exp()


def median_distance(rows: Tensor) -> Tensor:
    """The median distance of points [n, D] to the point half the list away: above zero."""
    apart = (rows - rows.roll(len(rows) // 2, 0)).norm(dim=1)
    return apart.median().clamp(min=1e-9)


def design_order(distance: Tensor, weights: Tensor, count: int, scale: Tensor) -> Tensor:
    """The order [G, count] in which to score masks of one block, at these distances [G, n, n].

    Pivoted Cholesky: each step takes the row whose score is most uncertain, by posterior variance times weight
    [G, n]; a negative weight marks padding; `scale` is [G]. A longer order begins with the shorter one. Ties go to
    the first row. Entries after an image's last row have no meaning.
    """
    images = torch.arange(len(weights), device=weights.device)
    factor = weights.new_zeros(len(weights), count, weights.shape[1])
    variance = torch.ones_like(weights)
    taken = weights < 0
    order = torch.zeros(len(weights), count, dtype=torch.int64, device=weights.device)
    for step in range(count):
        chosen = (variance * weights).masked_fill(taken, -1).argmax(1)
        order[:, step], taken[images, chosen] = chosen, True
        kernel = matern(distance[images, chosen], scale[:, None])
        known = factor[images, :step, chosen][:, None] @ factor[:, :step]
        column = (kernel - known[:, 0]) / variance[images, chosen].clamp(min=1e-12).sqrt()[:, None]
        factor[:, step] = column
        variance = (variance - column**2).clamp(min=0)
    return order


def signed_root(scores: Tensor) -> Tensor:
    """The scale on which scores are predicted: the square signed_root, with the sign kept."""
    return scores.sign() * scores.abs().sqrt()


@dataclass(frozen=True)
class Known:
    """The known scores of one image's masks, for one target."""

    rows: Tensor
    """The masks as points, [N, D]."""
    anchors: Tensor
    """Row numbers of the masks that were run, [m], at least one."""
    scores: Tensor
    """Their scores, [m]."""
    guess: Tensor | None
    """A first estimate of every score, [N]."""

    @cached_property
    def mean(self) -> Tensor:
        """The process's mean, on the scale of roots, [N]."""
        if self.guess is not None:
            return signed_root(self.guess)
        return signed_root(self.scores).mean().expand(len(self.rows))

    @cached_property
    def trend(self) -> Tensor:
        """The columns [N, 2] of the trend beside the mean: a constant, and the guess's scale."""
        constant = torch.full_like(self.mean, TREND)
        if self.guess is None:
            return torch.stack([constant, torch.zeros_like(constant)], 1)
        centred = self.mean - self.mean.mean()
        return torch.stack([constant, TREND * centred / (centred.std(correction=0) + 1e-9)], 1)

    @cached_property
    def wanted(self) -> Tensor:
        """What the process is fitted to, [m]."""
        return signed_root(self.scores) - self.mean[self.anchors]


@dataclass(frozen=True)
class Imputed:
    """The scores of all masks of one image, for one target."""

    known: Known
    scores: Tensor
    """[N]; exact for masks that were run."""
    r2: Tensor
    """R squared of leave-one-out predictions of the roots of the scores that were run: one number, at most 1."""
    cross: Tensor
    """The masks' kernel with those that were run, whitened: [m, N]."""
    scale: Tensor
    noise: Tensor
    """Its variance; the process has 1."""
    variance: Tensor
    """Of the process."""
    squared_errors: Tensor
    """Squared error of each score's leave-one-out prediction, over its predicted variance, [m]."""

    def map_error(self, block: slice, measured: slice | Tensor, maps_nd: Tensor, distance: Tensor) -> Tensor:
        """The predicted relative error of `V = sum_k q_k C_k` over one block: its deviation over that of the map.

        `measured` says which of the measured scores are the block's; `maps_nd` holds its C_k on a coarse grid
        [n, cells], `distance` [n, n] the distances of its masks. To first order `dV = sum_k 2 sqrt(q_k) ds_k C_k` over
        the masks that were not run. Adding a constant to V or scaling it is no error, because the block map is
        min-maxed. All blocks share one process; the errors of the block's own scores correct it for each.
        """
        whole = self.scores[block] @ maps_nd
        shape = whole - whole.mean()
        slopes = 2 * self.scores[block].abs().sqrt()[:, None] * maps_nd
        slopes = slopes - slopes.mean(1, keepdim=True)
        strength = shape.square().sum().clamp(min=1e-300)
        slopes = slopes - (slopes @ shape / strength)[:, None] * shape
        own_anchors, own_errors = self.known.anchors[measured], self.squared_errors[measured]
        slopes[own_anchors - block.start] = 0
        trend = self.known.trend[block]
        prior = matern(distance, self.scale) + trend @ trend.T
        uncertain = (slopes * (prior @ slopes)).sum() - (self.cross[:, block] @ slopes).square().sum()
        uncertain = uncertain.clamp(min=0) + self.noise * slopes.square().sum()
        missed = (own_errors.sum() + PRIOR_WEIGHT) / (len(own_errors) + PRIOR_WEIGHT)
        return (self.variance * missed * uncertain / strength).sqrt()


@dataclass(frozen=True)
class _Anchors:
    """The masks that were run, of G images, padded to m."""

    is_used: Tensor
    """False for padding, [G, m]."""
    rows: Tensor
    """As points, [G, m, D]."""
    distance: Tensor
    """[G, m, m]"""
    trend: Tensor
    """[G, m, 2]"""
    wanted: Tensor
    """[G, m]"""

    @classmethod
    def of(cls, known: Sequence[Known]) -> "_Anchors":
        rows = padded([one.rows[one.anchors] for one in known])
        return cls(
            padded([torch.ones_like(one.anchors, dtype=torch.bool) for one in known]),
            rows,
            distances(rows, rows),
            padded([one.trend[one.anchors] for one in known]),
            padded([one.wanted for one in known]),
        )

    def kernel(self, scale: Tensor, noise: Tensor | float) -> Tensor:
        """The kernel with noise on the diagonal, [G, m, m]; 0 between padding and others. `scale` is [G, 1, 1]."""
        pairs = self.is_used[:, :, None] & self.is_used[:, None]
        smooth = torch.where(pairs, matern(self.distance, scale) + self.trend @ self.trend.mT, 0.0)
        return smooth + noise * torch.eye(smooth.shape[1], dtype=smooth.dtype, device=smooth.device)

    def solved(self, kernel: Tensor) -> tuple[Tensor, Tensor]:
        """`K^-1 y` and the diagonal of `K^-1`, [G, m] each; their ratio is the leave-one-out errors."""
        inverse = torch.linalg.inv(kernel)
        return (inverse @ self.wanted[..., None])[..., 0], inverse.diagonal(dim1=1, dim2=2)

    def fitted(self, middle: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The length scale and the noise, [G, 1, 1], of least mean squared leave-one-out error, and the error, [G].

        In closed form (Rasmussen and Williams 2006, section 5.4.2). `middle` [G, 1, 1] is the unit of length.
        """
        scale, noise = SCALES[0] * middle, torch.full_like(middle, NOISES[0])
        least = torch.full_like(middle[:, 0, 0], torch.inf)
        for own_scale, own_noise in product(SCALES, NOISES):
            weights, diagonal = self.solved(self.kernel(own_scale * middle, own_noise))
            missed = (weights / diagonal).square().sum(1) / self.is_used.sum(1)
            better = missed < (1 - TIE_TOLERANCE) * least
            least = torch.where(better, missed, least)
            scale = torch.where(better[:, None, None], own_scale * middle, scale)
            noise = torch.where(better[:, None, None], own_noise, noise)
        return scale, noise, least


def impute(known: Sequence[Known]) -> list[Imputed]:
    """The scores of all N masks of each image, given those of the anchors."""
    anchors = _Anchors.of(known)
    scale, noise, least = anchors.fitted(torch.stack([median_distance(one.rows) for one in known])[:, None, None])
    rows, trend = padded([one.rows for one in known]), padded([one.trend for one in known])
    cross = matern(distances(anchors.rows, rows), scale) + anchors.trend @ trend.mT
    kernel = anchors.kernel(scale, noise)
    lower = torch.linalg.cholesky(kernel)
    whitened = torch.linalg.solve_triangular(lower, torch.where(anchors.is_used[..., None], cross, 0.0), upper=False)
    solved = torch.linalg.solve_triangular(lower, anchors.wanted[..., None], upper=False)
    shift = (whitened.mT @ solved)[..., 0]
    variance = solved.square().sum((1, 2)) / anchors.is_used.sum(1)
    weights, diagonal = anchors.solved(kernel)
    squared_errors = weights.square() / diagonal / variance[:, None].clamp(min=1e-300)
    return [
        Imputed(
            one,
            _predicted_scores(one, shift[image]),
            _r_squared(one, least[image]),
            whitened[image, : len(one.anchors), : len(one.rows)],
            scale[image, 0, 0],
            noise[image, 0, 0],
            variance[image],
            squared_errors[image, : len(one.anchors)],
        )
        for image, one in enumerate(known)
    ]


def _predicted_scores(known: Known, shift: Tensor) -> Tensor:
    """The scores [N]; the process adds `shift` to its mean on the scale of roots."""
    roots = known.mean + shift[: len(known.rows)]
    found = (roots.sign() * roots.square()).clamp(min=known.scores.min().clamp(max=0))
    found[known.anchors] = known.scores
    return found


def _r_squared(known: Known, missed: Tensor) -> Tensor:
    """The share of the variance of the roots that leave-one-out predictions explain; 0 if all roots are equal."""
    roots = signed_root(known.scores)
    total = (roots - roots.mean()).square().mean()
    return torch.where(total > 0, 1 - missed / total, 0.0)


def shares_by_block(sizes: Sequence[int], count: int) -> list[int]:
    """How many of `count` scores each block gets: by the square signed_root of its number of masks, and a few at least.

    Highest averages: the shares add up exactly, and none falls when `count` grows.
    """
    if count >= sum(sizes):
        return list(sizes)
    least = min(LEAST_PER_BLOCK, count // max(1, len(sizes)))
    given = [min(size, least) for size in sizes]
    for _ in range(count - sum(given)):
        open_blocks = [block for block, size in enumerate(sizes) if given[block] < size]
        given[max(open_blocks, key=lambda block: (sizes[block] ** 0.5 / (given[block] + 1), -block))] += 1
    return given
