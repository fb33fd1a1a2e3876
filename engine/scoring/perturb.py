"""Perturbations: applies a mask and a baseline to an input."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from torch.nn import functional

if TYPE_CHECKING:
    from blocksight.engine.model.adapter import ModelAdapter


BLUR_REACH = 3
"""Radius of a Gaussian in deviations."""


def blurred(
    images: Tensor, sigma: float, *, reach: int | None = None, rim: Literal["replicate", "reflect"] = "replicate"
) -> Tensor:
    """Images [..., C, H, W] blurred by a Gaussian of this deviation in pixels, cut off after `reach`.

    Outside, the rim is repeated or the picture is mirrored (`reach` is then less than its sides).
    """
    reach = reach or max(1, round(BLUR_REACH * sigma))
    offsets = torch.arange(-reach, reach + 1, dtype=images.dtype, device=images.device)
    bell = torch.exp(-0.5 * (offsets / sigma) ** 2)
    bell = bell / bell.sum()
    flat = images.reshape(-1, 1, *images.shape[-2:])
    down = functional.conv2d(functional.pad(flat, (0, 0, reach, reach), mode=rim), bell.view(1, 1, -1, 1))
    across = functional.conv2d(functional.pad(down, (reach, reach, 0, 0), mode=rim), bell.view(1, 1, 1, -1))
    return across.reshape(images.shape)


@dataclass(frozen=True)
class Perturbation:
    """`x' = m x + (1 - m) b` in the model's input space (the paper's `I * m` for b = 0)."""

    baseline: Tensor
    """The value of removed pixels, broadcastable to [B, 3, H, W]."""

    @cached_property
    def _is_zero(self) -> bool:
        return not self.baseline.any()

    def __call__(self, inputs_nchw: Tensor, masks_n1hw: Tensor, out_nchw: Tensor | None = None) -> Tensor:
        """The masked inputs, [B, 3, H, W]; masks lie in [0, 1] and 1 keeps.

        They are written into `out_nchw`, if there is one, in its precision.
        """
        if self._is_zero:
            return torch.mul(inputs_nchw, masks_n1hw, out=out_nchw)
        return torch.add(inputs_nchw * masks_n1hw, self.baseline * (1 - masks_n1hw), out=out_nchw)


def _zero(adapter: "ModelAdapter") -> Tensor:
    return torch.zeros(1, 3, 1, 1, device=adapter.device)


def _black(adapter: "ModelAdapter") -> Tensor:
    return adapter.normalise(torch.zeros(1, 3, 1, 1, dtype=torch.uint8, device=adapter.device))


DROP = "drop"
"""The baseline that paints nothing: tokens are left out (see `scoring/dropping.py`)."""

BASELINES: Mapping[str, Callable[["ModelAdapter"], Tensor]] = {"zero": _zero, "black": _black}
"""By name: `zero` is 0 in model-input space (the data set's mean colour, as in all known code); `black`
is a black pixel of the picture, as in the paper's formula. They differ if a mean is subtracted."""


def perturbation(adapter: "ModelAdapter", baseline: str) -> Perturbation:
    """The perturbation with the named baseline, on the adapter's device."""
    return Perturbation(BASELINES[baseline](adapter))
