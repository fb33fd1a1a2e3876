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
from blocksight.engine.model.transfers import to_host


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
        found = []
        for image, own in enumerate(maps.detach()[: len(inputs_nchw)]):
            losses = self._losses(inputs_nchw[image], own, target.of(slice(image, image + 1)))
            found.append(upsample(torch.einsum("kt,khw->thw", losses, own.double()).relu()))
        rows = zip(to_host(found), self._scores(inputs_nchw, target), strict=True)
        return [
            [
                checked_explanation(one, score, (whole_block(self.block),), num_forwards=self.block.channels)
                for one, score in zip(saliency.numpy(), row, strict=True)
            ]
            for saliency, row in rows
        ]

    def _losses(self, image_chw: Tensor, maps_chw: Tensor, target: Target) -> Tensor:
        """The loss of one image's raw scores [C, T] with each channel set to 0 in turn."""
        channels = torch.arange(len(maps_chw), device=maps_chw.device)
        zeros = torch.zeros_like(maps_chw)
        logits = logits_with_replaced(self.tail, image_chw, maps_chw, zeros, channels, self.scorer.batch_size)
        scores = target.raw.score(logits, torch.zeros(len(logits), dtype=torch.int64, device=logits.device))
        return scores[:1] - scores[1:]
