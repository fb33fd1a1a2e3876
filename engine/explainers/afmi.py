"""A-FMI: differences of the last block's feature maps from a reference's, each weighted by its importance.

A reconstruction from the abstract ("Attribution by feature-map importance"): no code and no full text was available.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from blocksight.engine.catalog.side_products import SideProducts
from blocksight.engine.errors import ImageError
from blocksight.engine.explainers.cams import whole_block
from blocksight.engine.explainers.explainer import Attribution, SignedExplainer, pad
from blocksight.engine.model.adapter import ModelAdapter
from blocksight.engine.model.head import pooled_weights
from blocksight.engine.model.taps import logits_with_replaced
from blocksight.engine.model.targets import Target
from blocksight.engine.scoring.perturb import blurred

BLUR = 10 / 224
"""Standard deviation of the blurred reference's Gaussian, as a share of the shorter side."""
MAX_GAP = 1e-3
"""Largest error of the head's shortcut, as a share of the largest logit."""
MIN_NET_SHARE = 1e-6
"""A sum below this share of the sum of absolute values counts as 0."""


def _black(adapter: ModelAdapter, image_chw: Tensor, _seed: int) -> Tensor:
    return adapter.normalise(torch.zeros(1, *image_chw.shape, dtype=torch.uint8))[0]


def _mean(_adapter: ModelAdapter, image_chw: Tensor, _seed: int) -> Tensor:
    return torch.zeros_like(image_chw)


def _blur(_adapter: ModelAdapter, image_chw: Tensor, _seed: int) -> Tensor:
    return blurred(image_chw, BLUR * min(image_chw.shape[1:]))


def _noise(adapter: ModelAdapter, image_chw: Tensor, seed: int) -> Tensor:
    own = torch.Generator().manual_seed(seed)
    return adapter.normalise(torch.randint(0, 256, (1, *image_chw.shape), dtype=torch.uint8, generator=own))[0]


REFERENCES: Mapping[str, Callable[[ModelAdapter, Tensor, int], Tensor]] = {
    "black": _black,
    "mean": _mean,
    "blur": _blur,
    "noise": _noise,
}
"""The references of an image [3, H, W] by name; `mean` is 0 in model-input space, the data set's mean colour."""


@dataclass(frozen=True)
class Captured:
    """What the network computes for an image or for its reference."""

    image_chw: Tensor
    maps_khw: Tensor
    """The block's feature maps."""
    logits: Tensor
    """[classes]."""


class AFmi(SignedExplainer):
    """`sum_k w_k D_k`, D_k the difference of map k to the reference's, w_k its importance where that is relevant.

    A map's importance is `s - s(map k replaced)`. If the head is pooling and one linear layer, the logits under a
    replacement are `z + W_k mean(difference)`, without a pass; else only the network behind the block runs again.
    Several references are averaged. Without `rectify` the saliency map is the absolute value of the signed one.
    """

    def _prepare(self, blocks: Sequence[str]) -> None:
        self.block, self.taps = self.adapter.network.last_block(blocks)
        self.tail = self.taps.tail()
        self.weights = pooled_weights(self.adapter, self.block) if self.parameters.tail == "auto" else None

    def _attribute_pass(self, inputs_nchw: Tensor, target: Target, seeds: Sequence[int]) -> list[list[Attribution]]:
        images = self._captured(inputs_nchw)
        references = [
            self._captured(torch.stack([make(self.adapter, *of) for of in zip(inputs_nchw, seeds, strict=True)]))
            for make in map(REFERENCES.__getitem__, self.parameters.references)
        ]
        return [
            self._attributions(image, [own[place] for own in references], target.of(slice(place, place + 1)), row)
            for place, (image, row) in enumerate(zip(images, self._scores(inputs_nchw, target), strict=True))
        ]

    def saliency_map(self, signed_hw: Tensor) -> Tensor:
        return super().saliency_map(signed_hw if self.parameters.rectify else signed_hw.abs())

    def _captured(self, inputs_nchw: Tensor) -> list[Captured]:
        logits, (maps,) = self.taps(pad(inputs_nchw, self.images_per_pass))
        return [Captured(*one) for one in zip(inputs_nchw, maps.detach(), logits.detach(), strict=False)]

    @torch.no_grad()
    def _attributions(
        self, image: Captured, references: Sequence[Captured], target: Target, scores: Sequence[float]
    ) -> list[Attribution]:
        """The attributions of one image's targets."""
        importance = torch.stack([self._importance(image, reference, target) for reference in references])
        signed = sum(
            self._map(own, image.maps_khw, reference.maps_khw)
            for own, reference in zip(importance, references, strict=True)
        )
        products = [SideProducts(channel_importance=own.float().cpu().numpy()) for own in importance.mean(0).unbind(1)]
        forwards = len(references) * (1 + self._num_passes())
        return [
            Attribution(values / len(references), score, forwards, (whole_block(self.block),), own)
            for values, score, own in zip(torch.as_tensor(signed), scores, products, strict=True)
        ]

    def _num_passes(self) -> int:
        """Passes of the network behind the block, per image and reference."""
        each = min(self.parameters.channels or self.block.channels, self.block.channels)
        num_directions = 2 if self.parameters.removal == "two_sided" else 1
        return each * num_directions if self.weights is None else 0

    def _map(self, importance: Tensor, maps_khw: Tensor, reference_khw: Tensor) -> Tensor:
        """The signed maps [T, h, w] of importance [K, T]."""
        differences = maps_khw.double() - reference_khw.double()
        factors = importance
        if self.parameters.keep == "relevant":
            factors = importance.masked_fill(importance <= self.parameters.threshold, 0.0)
        if self.parameters.conserve:
            total, size = differences.sum((1, 2)), differences.abs().sum((1, 2))
            is_zero = total.abs() <= MIN_NET_SHARE * size
            factors = factors.masked_fill(is_zero[:, None], 0.0) / total.masked_fill(is_zero, 1.0)[:, None]
        return torch.einsum("kt,khw->thw", factors, differences)

    def _importance(self, image: Captured, reference: Captured, target: Target) -> Tensor:
        """The importances [K, T], float64; 0 for maps that are left out."""
        if self.weights is not None:
            self._check_shortcut(image, reference, self.weights)
        removal, chosen = self.parameters.removal, self._chosen(image, reference)
        gains = []
        if removal in ("reference", "two_sided"):
            gains.append(-self._gains(image, reference.maps_khw, chosen, target))
        if removal in ("insert", "two_sided"):
            gains.append(self._gains(reference, image.maps_khw, chosen, target))
        if removal == "zero":
            gains.append(-self._gains(image, torch.zeros_like(image.maps_khw), chosen, target))
        found = gains[0].new_zeros(self.block.channels, target.num_targets)
        found[chosen] = torch.stack(gains).mean(0)
        return found

    def _check_shortcut(self, image: Captured, reference: Captured, weights: Tensor) -> None:
        """Raises ImageError if the steps of all channels do not sum to the difference of the logits, which is known."""
        steps = (image.maps_khw.double() - reference.maps_khw.double()).mean((1, 2))
        found, wanted = weights @ steps, image.logits.double() - reference.logits.double()
        gap, size = (found - wanted).abs().max(), torch.maximum(image.logits.abs().max(), reference.logits.abs().max())
        if gap > MAX_GAP * size:  # not for NaN, whose map is refused elsewhere
            place = int((found - wanted).abs().argmax())
            raise ImageError(
                f"a-fmi took the head of {self.adapter.name} for pooling and one linear layer, and for this image its "
                f"channels sum to {float(found[place]):.5g} where the logit differs by {float(wanted[place]):.5g} from "
                "the reference's: take -p tail=passes"
            )

    def _chosen(self, image: Captured, reference: Captured) -> Tensor:
        """The channels whose importance is computed, ascending."""
        limit = self.parameters.channels
        if self.weights is not None or limit is None:
            return torch.arange(self.block.channels, device=image.maps_khw.device)
        sizes = (image.maps_khw.double() - reference.maps_khw.double()).abs().sum((1, 2))
        return sizes.argsort(descending=True, stable=True)[:limit].sort().values

    def _gains(self, base: Captured, others_khw: Tensor, chosen: Tensor, target: Target) -> Tensor:
        """The gain of the score [n, T] as each chosen map in turn is replaced by that of `others_khw`."""
        if self.weights is None:
            size = self.scorer.batch_size
            logits = logits_with_replaced(self.tail, base.image_chw, base.maps_khw, others_khw, chosen, size)
        else:
            steps = (others_khw[chosen].double() - base.maps_khw[chosen].double()).mean((1, 2))
            logits = base.logits.double() + functional.pad(steps[:, None] * self.weights.T[chosen], (0, 0, 1, 0))
        readout = target.raw if self.parameters.score == "logit" else target
        scores = readout.score(logits, torch.zeros(len(logits), dtype=torch.int64, device=logits.device))
        return scores[1:] - scores[:1]
