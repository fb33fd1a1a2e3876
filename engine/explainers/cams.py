"""Class activation maps: the last block's feature maps, weighted by the gradient of a class's logit.

Each method is one function from feature maps A [N, C, h, w] and gradients G of the logit by them to a map
[N, h, w]. The saliency map is its positive part, upsampled.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from blocksight.engine.catalog.parameters import NoParameters
from blocksight.engine.explainers.explanation import BlockMap
from blocksight.engine.explainers.points import ImageExplainer
from blocksight.engine.model.adapter import ModelAdapter
from blocksight.engine.model.blocks import Place
from blocksight.engine.model.taps import gradients
from blocksight.engine.model.targets import Target

Weigh = Callable[[Tensor, Tensor], Tensor]


def gradcam(maps: Tensor, slopes: Tensor) -> Tensor:
    """`sum_k mean_ij(G_k) A_k` (Selvaraju et al., ICCV 2017, equations 1 and 2)."""
    return (slopes.mean((2, 3), keepdim=True) * maps).sum(1)


def gradcam_plus_plus(maps: Tensor, slopes: Tensor) -> Tensor:
    """`w_k = sum_ij alpha_kij relu(G_kij)`, `alpha = G^2 / (2 G^2 + sum_ab(A_kab) G^3)`, 0 where G = 0.

    Chattopadhay et al., WACV 2018, equations 5 and 19, for Y = exp(logit): the factor exp(logit) is one
    per image and is left out.
    """
    denominator = 2 * slopes**2 + maps.sum((2, 3), keepdim=True) * slopes**3
    alphas = _ratio(slopes**2, denominator)
    return ((alphas * slopes.relu()).sum((2, 3), keepdim=True) * maps).sum(1)


def xgradcam(maps: Tensor, slopes: Tensor) -> Tensor:
    """`w_k = sum_ij G_kij A_kij / sum_ij A_kij` (Fu et al., BMVC 2020, equation 9); weight 0 if the sum is 0."""
    weights = _ratio((slopes * maps).sum((2, 3), keepdim=True), maps.sum((2, 3), keepdim=True))
    return (weights * maps).sum(1)


def layercam(maps: Tensor, slopes: Tensor) -> Tensor:
    """`sum_k relu(G_k) A_k`, place by place (Jiang et al., TIP 2021, equations 5 and 6)."""
    return (slopes.relu() * maps).sum(1)


def hirescam(maps: Tensor, slopes: Tensor) -> Tensor:
    """`sum_k G_k A_k`, place by place (Draelos and Carin, arXiv 2011.08891, equation 3)."""
    return (slopes * maps).sum(1)


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """The quotient, and 0 where the denominator is 0."""
    is_zero = denominator == 0
    return torch.where(is_zero, 0.0, numerator / denominator.masked_fill(is_zero, 1.0))


WEIGHINGS: Mapping[str, Weigh] = {
    "gradcam": gradcam,
    "gradcam++": gradcam_plus_plus,
    "xgradcam": xgradcam,
    "layercam": layercam,
    "hirescam": hirescam,
}


class Cam(ImageExplainer):
    """One of `WEIGHINGS` at the deepest block: one forward pass, and one backward pass per target."""

    def __init__(self, adapter: ModelAdapter, parameters: NoParameters, *, weigh: Weigh, **options: Any) -> None:
        """`weigh` is one of `WEIGHINGS`; the deepest of the named blocks is used."""
        self.weigh = weigh
        super().__init__(adapter, parameters, **options)

    def _prepare(self, blocks: Sequence[str]) -> None:
        self.block, self.taps = self.adapter.network.last_block(blocks)
        self.blocks = (whole_block(self.block),)

    def attributions(self, inputs_nchw: Tensor, target: Target) -> tuple[Tensor, list[Tensor]]:
        """The logits, and the signed weighted maps at the block's grid, [N, h, w]."""
        logits, (maps,) = self.taps(inputs_nchw)
        found = []
        for index in range(target.num_targets):
            (slopes,) = gradients(logits, target.raw.direction(logits.detach(), index), [maps])
            found.append(self.weigh(maps.detach().double(), slopes.double()))
        return logits.detach(), found


def whole_block(block: Place) -> BlockMap:
    """The `BlockMap` of a block whose feature maps were all used."""
    return BlockMap(block.name, block.channels, tuple(range(block.channels)), None)
