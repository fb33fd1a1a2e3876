"""Ablation-CAM: the last block's feature maps, each weighted by the loss of the logit without it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from blocksight.engine.explainers.cams import whole_block
from blocksight.engine.explainers.explainer import Explainer, pad
from blocksight.engine.explainers.explanation import Explanation, checked_explanation
from blocksight.engine.model.resample import grid_of, upsampling
from blocksight.engine.model.taps import logits_with_replaced
from blocksight.engine.model.targets import Target


class AblationCam(Explainer):
    """`relu(sum_k w_k A_k)`, `w_k = z_c - z_c(A_k set to 0)` (Desai and Ramaswamy, WACV 2020, equation 4).

    The paper's division by z_c is left out. It only scales the map, and would invert it where z_c is negative.
    Only the network behind the block runs again.
    """

    def _prepare(self, blocks: Sequence[str]) -> None:
        self.block, self.taps = self.adapter.network.last_block(blocks)
        self.tail = self.taps.tail()

    def _explain_pass(self, inputs_nchw: Tensor, target: Target, seeds: Sequence[int]) -> list[list[Explanation]]:
        _, (maps,) = self.taps(pad(inputs_nchw, self.images_per_pass))
        upsample = upsampling(grid_of(maps), grid_of(inputs_nchw), maps.device)
        explanations = []
        for image, row in enumerate(self._scores(inputs_nchw, target)):
            own = maps[image].detach()
            losses = self._losses(inputs_nchw[image], own, target.of(slice(image, image + 1)))
            native = torch.einsum("kt,khw->thw", losses, own.double()).relu()
            explanations.append(
                [
                    checked_explanation(one, score, (whole_block(self.block),), num_forwards=self.block.channels)
                    for one, score in zip(upsample(native).cpu().numpy(), row, strict=True)
                ]
            )
        return explanations

    def _losses(self, image_chw: Tensor, maps_chw: Tensor, target: Target) -> Tensor:
        """The loss of one image's raw scores [C, T] with each channel set to 0 in turn."""
        channels = range(len(maps_chw))
        zeros = torch.zeros_like(maps_chw)
        logits = logits_with_replaced(self.tail, image_chw, maps_chw, zeros, channels, self.scorer.batch_size)
        scores = target.raw.score(logits, torch.zeros(len(logits), dtype=torch.int64, device=logits.device))
        return scores[:1] - scores[1:]
