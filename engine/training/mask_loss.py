"""The loss of T-TAME and P-TAME: keep the class, cover little, be smooth.

The authors sum over the B x B maps "every image x every label of the batch", so that the balance of the terms depends
on the batch's size. Written per image it does not, and equals theirs for B = 32 (`LABELS`).
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

LABELS = 32
"""Number of labels that each image's maps are taken for: its own and those of 31 other images."""

AREA_OFFSET = 5e-4
BORDER_WEIGHT = 0.3


@dataclass(frozen=True)
class LossWeights:
    """The weights of the three terms. The defaults are T-TAME's."""

    cross_entropy: float = 1.5
    area: float = 2.0
    smoothness: float = 0.01
    power: float = 0.3
    """Exponent of a mask's values in the area term."""


@dataclass(frozen=True)
class LossTerms:
    """The terms of N images, each [N], already weighted."""

    cross_entropy: Tensor
    area: Tensor
    smoothness: Tensor

    @property
    def total(self) -> Tensor:
        """Their sum, [N]."""
        return self.cross_entropy + self.area + self.smoothness


def area(masks: Tensor, power: float) -> Tensor:
    """`mean_pixels (m + 0.0005)^power` of masks [..., h, w] in [0, 1]."""
    return (masks + AREA_OFFSET).pow(power).mean((-2, -1))


def variation(masks: Tensor) -> Tensor:
    """`sum (d_i m)^2 + sum (d_j m)^2 + 0.3 sum_border m^2` of masks [..., h, w]; each pixel of the rim counts once."""
    down = masks.diff(dim=-2).square().sum((-2, -1))
    across = masks.diff(dim=-1).square().sum((-2, -1))
    rim = masks.square()
    inner = rim[..., 1:-1, 1:-1].sum((-2, -1))
    return down + across + BORDER_WEIGHT * (rim.sum((-2, -1)) - inner)


def mask_loss(
    logits_nk: Tensor, own_nhw: Tensor, others_nohw: Tensor, labels: Tensor, counts: Tensor, weights: LossWeights
) -> LossTerms:
    """The terms of N images.

    `logits_nk` are of the masked images, `labels` [N] the classes to keep. `own_nhw` are the masks of these classes,
    and `others_nohw` those of `LABELS - 1` other images' classes, each in [0, 1]. `counts` [N, LABELS - 1] is 1 for a
    map that counts and 0 for one that is left out; an image whose others are all left out has no such term.
    """
    share = 1 / LABELS
    number = counts.sum(1).clamp(min=1)
    areas = (area(others_nohw, weights.power) * counts).sum(1) / number
    variations = (variation(others_nohw) * counts).sum(1) / number
    return LossTerms(
        weights.cross_entropy * functional.cross_entropy(logits_nk, labels, reduction="none"),
        weights.area * (share * area(own_nhw, weights.power) + (1 - share) * areas),
        weights.smoothness * 0.5 * (variation(own_nhw) + (LABELS - 1) * variations),
    )


def other_labels(labels: Tensor, first: int, count: int, *, keeps_own: bool) -> tuple[Tensor, Tensor]:
    """The labels [count, LABELS - 1] of the other images, for the images `first` to `first + count` of all `LABELS`.

    The second tensor is as `counts` of `mask_loss`. `keeps_own`: also those equal to an image's own label count, as
    in the authors' code; it matters where a model has few classes.
    """
    rows = torch.arange(first, first + count, device=labels.device)
    every = torch.arange(LABELS, device=labels.device)
    others = torch.stack([labels[every != row] for row in rows.tolist()])
    counts = torch.ones_like(others) if keeps_own else (others != labels[rows][:, None]).long()
    return others, counts.float()
