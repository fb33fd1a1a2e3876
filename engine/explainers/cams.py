"""Class activation maps: the last block's feature maps, weighted by the gradient of a class's logit.

Each method is one function from feature maps A [N, C, h, w] and gradients G of the logit by them to a map
[N, h, w]; its positive part, upsampled, is the saliency map.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from engine.explanation import BlockMap, Explanation
from engine.models import ModelAdapter
from engine.perturb import perturbation
from engine.resample import upsampling
from engine.scorer import Scorer
from engine.taps import gradients
from engine.targets import Target

Weigh = Callable[[Tensor, Tensor], Tensor]


def gradcam(maps: Tensor, slopes: Tensor) -> Tensor:
    """`sum_k mean_ij(G_k) A_k` (Selvaraju et al., ICCV 2017, equations 1 and 2)."""
    return (slopes.mean((2, 3), keepdim=True) * maps).sum(1)


def gradcam_plus_plus(maps: Tensor, slopes: Tensor) -> Tensor:
    """`w_k = sum_ij alpha_kij relu(G_kij)`, `alpha = G^2 / (2 G^2 + sum_ab(A_kab) G^3)`, 0 where G is.

    Chattopadhay et al., WACV 2018, equations 5 and 19, for Y = exp(logit): the factor exp(logit) is one
    per image and is left out.
    """
    denominator = 2 * slopes**2 + maps.sum((2, 3), keepdim=True) * slopes**3
    alphas = _ratio(slopes**2, denominator)
    return ((alphas * slopes.relu()).sum((2, 3), keepdim=True) * maps).sum(1)


def xgradcam(maps: Tensor, slopes: Tensor) -> Tensor:
    """`w_k = sum_ij G_kij A_kij / sum_ij A_kij` (Fu et al., BMVC 2020, equation 9); an empty map weighs 0."""
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


class Cam:
    """One of the weighings at the deepest of the blocks: one forward pass, and a backward pass per target."""

    def __init__(
        self,
        adapter: ModelAdapter,
        parameters: object,
        *,
        weigh: Weigh,
        blocks: Sequence[str] = (),
        batch_size: int = 8,
        images_per_pass: int = 4,
    ) -> None:
        """`blocks` named by hand, of which the deepest counts; none: the rule's last one. The sizes set memory
        and speed alone. Raises ModelError for an unknown block."""
        self.adapter = adapter
        self.weigh = weigh
        (self.block,) = adapter.network.blocks(blocks)[-1:]
        self.taps = adapter.network.taps([self.block])
        self.scorer = Scorer(adapter, perturbation(adapter, "zero"), batch_size)
        self.images_per_pass = images_per_pass

    def explain(self, inputs_nchw: Tensor, target: Target) -> list[list[Explanation]]:
        """One Explanation per image and target, for inputs [N, 3, H, W] as `adapter.normalise` gives them."""
        explanations = []
        with self.adapter.borrowed():
            for start in range(0, len(inputs_nchw), self.images_per_pass):
                images = slice(start, start + self.images_per_pass)
                explanations += self._explain_pass(inputs_nchw[images], target.of(images))
        return explanations

    def _explain_pass(self, inputs_nchw: Tensor, target: Target) -> list[list[Explanation]]:
        """The pass is padded to a fixed number of images, so that rounding does not depend on how many there are."""
        count = len(inputs_nchw)
        filler = inputs_nchw[-1:].expand(self.images_per_pass - count, -1, -1, -1)
        logits, (maps,) = self.taps(torch.cat([inputs_nchw, filler]))
        own = logits[:count].detach()
        scores = target.score(own, torch.arange(count, device=own.device))
        upsample = upsampling((maps.shape[2], maps.shape[3]), (inputs_nchw.shape[2], inputs_nchw.shape[3]), maps.device)
        explanations: list[list[Explanation]] = [[] for _ in range(count)]
        for index in range(target.num_targets):
            direction = torch.zeros_like(logits)
            direction[:count] = target.logit_direction(own, index).to(logits.dtype)
            (slopes,) = gradients(logits, direction, [maps])
            native = self.weigh(maps[:count].detach().double(), slopes[:count].double()).relu()
            for image, saliency in enumerate(upsample(native).cpu().numpy()):
                explanations[image].append(self._explanation(saliency, float(scores[image, index])))
        return explanations

    def _explanation(self, saliency_hw: np.ndarray, score: float) -> Explanation:
        whole = BlockMap(self.block.name, self.block.channels, tuple(range(self.block.channels)), None)
        sound = np.isfinite(saliency_hw).all() and np.isfinite(score)
        return Explanation(saliency_hw if sound else np.full_like(saliency_hw, np.nan), score, (whole,), 0)
