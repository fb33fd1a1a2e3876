"""Ablation-CAM: the last block's feature maps, each weighted by what the logit loses without it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.explainers.cams import whole_block
from engine.explainers.explainer import Explainer, chunks, pad
from engine.explanation import Explanation, sound_explanation
from engine.resample import grid_of, upsampling
from engine.targets import Target


class AblationCam(Explainer):
    """`relu(sum_k w_k A_k)`, `w_k = z_c - z_c(A_k set to 0)` (Desai and Ramaswamy, WACV 2020, equation 4).

    The paper divides by z_c, one number per image and target, which would turn the map over where it is
    negative; it is left out. Only the network behind the block runs again.
    """

    def _prepare(self, blocks: Sequence[str]) -> None:
        (self.block,) = self.adapter.network.blocks(blocks)[-1:]
        self.taps = self.adapter.network.taps([self.block])
        self.tail = self.taps.tail()

    def _explain_pass(self, inputs_nchw: Tensor, target: Target, seeds: Sequence[int]) -> list[list[Explanation]]:
        logits, (maps,) = self.taps(pad(inputs_nchw, self.images_per_pass))
        images = torch.arange(len(inputs_nchw), device=logits.device)
        whole = target.raw.score(logits[: len(images)].detach(), images)
        upsample = upsampling(grid_of(maps), grid_of(inputs_nchw), maps.device)
        explanations = []
        for image, row in enumerate(self._scores(inputs_nchw, target)):
            own = maps[image].detach()
            losses = whole[image] - self._ablated(inputs_nchw[image], own, target.of(images[image : image + 1]))
            native = torch.einsum("kt,khw->thw", losses, own.double()).relu()
            explanations.append(
                [
                    sound_explanation(one, score, (whole_block(self.block),), num_forwards=self.block.channels)
                    for one, score in zip(upsample(native).cpu().numpy(), row, strict=True)
                ]
            )
        return explanations

    @torch.inference_mode()
    def _ablated(self, image_chw: Tensor, maps_chw: Tensor, target: Target) -> Tensor:
        """The raw scores [C, T] of one image with each channel set to 0 in turn, from batches of one shape."""
        size = self.scorer.batch_size
        first = torch.zeros(size, dtype=torch.int64, device=maps_chw.device)
        found = []
        for channels in chunks(range(len(maps_chw)), size):
            values = maps_chw.expand(size, *maps_chw.shape).clone()
            for slot, channel in enumerate(channels):
                values[slot, channel] = 0
            logits = self.tail(image_chw.expand(size, *image_chw.shape), values)
            found.append(target.raw.score(logits, first)[: len(channels)])
        return torch.cat(found)
