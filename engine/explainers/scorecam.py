"""Score-CAM: the last block's feature maps as masks, each weighted by the score of what it keeps."""

from collections.abc import Sequence

import torch
from torch import Tensor

from blocksight.engine.explainers.cams import whole_block
from blocksight.engine.explainers.explainer import Explainer, pad
from blocksight.engine.explainers.explanation import Explanation, checked_explanation
from blocksight.engine.model.resample import grid_of, upsampling
from blocksight.engine.model.targets import Target
from blocksight.engine.scoring.scorer import MaskSet


class ScoreCam(Explainer):
    """`relu(sum_k w_k A_k)`, w the softmax over maps of the logits under their masks (Wang et al., CVPRW 2020).

    Algorithm 1 of arXiv 1910.01279; the baseline's logit is not subtracted, for this changes no softmax. A
    constant map gives no mask. With signs the positive part of the covariance of masks and scores.
    """

    def _prepare(self, blocks: Sequence[str]) -> None:
        self.block, self.taps = self.adapter.network.last_block(blocks)

    def _explain_pass(self, inputs_nchw: Tensor, target: Target, seeds: Sequence[int]) -> list[list[Explanation]]:
        (maps,) = self.taps(pad(inputs_nchw, self.images_per_pass))[1]
        maps = maps[: len(inputs_nchw)].detach().double()
        upsample = upsampling(grid_of(maps), grid_of(inputs_nchw), maps.device)
        masks, varied = zip(*(upsample.normalise(own) for own in maps), strict=True)
        sources = [MaskSet(image, own[used]) for image, (own, used) in enumerate(zip(masks, varied, strict=True))]
        found = self.scorer.scores(inputs_nchw, target.raw if self.parameters.weights == "softmax" else target, sources)
        explanations = []
        for image, scores in enumerate(found):
            weights, summed = self._weights(scores), maps[image][varied[image]]
            if self.is_signed:
                weights, summed = (scores - scores.mean(0)) / len(scores), masks[image][varied[image]]
            if not maps[image].isfinite().all():  # a channel of NaN has no mask, so it is marked here
                weights = torch.full_like(weights, torch.nan)
            native = torch.einsum("kt,khw->thw", weights, summed)
            own = upsample(native).relu() if self.is_signed else upsample(native.relu())
            explanations.append(own.cpu().numpy())
        return [
            [
                checked_explanation(one, score, (whole_block(self.block),), num_forwards=len(source))
                for one, score in zip(own, row, strict=True)
            ]
            for own, row, source in zip(explanations, self._scores(inputs_nchw, target), sources, strict=True)
        ]

    def _weights(self, scores: Tensor) -> Tensor:
        """Of the maps [K, T], from the scores under their masks."""
        return scores.softmax(0) if self.parameters.weights == "softmax" else scores
