"""Gradient-weighted attention rollout: what each patch passed on through all attentions, weighted by the target."""

from collections.abc import Sequence

import torch
from torch import Tensor

from blocksight.engine.explainers.points import ImageExplainer
from blocksight.engine.model.attention import Attention, explicit_attention
from blocksight.engine.model.taps import gradients
from blocksight.engine.model.targets import Target
from blocksight.engine.model.token_stream import token_stream


class Chefer(ImageExplainer):
    """`R_0 = I`, `R_l = R_(l-1) + B_l R_(l-1)` with `B_l = mean_heads relu(A_l * d s / d A_l)`; the target's row of R.

    Chefer et al., ICCV 2021 (arXiv 2103.15679), equations 5 and 6. The target's row is the class token's. If the target
    reads several tokens before the patches, it is the mean of their rows; if it reads patches, the mean of their rows,
    less what each patch is from the start, is added (extensions). If an attention pools the tokens, the row is the
    sum of its queries' `B R_L`, without an identity, for nothing bypasses it.
    """

    def _prepare(self, blocks: Sequence[str]) -> None:
        self.stream = token_stream(self.adapter, "chefer")

    def attributions(self, inputs_nchw: Tensor, target: Target) -> tuple[Tensor, list[Tensor]]:
        """The logits, and the maps at the patches' grid, [N, h, w]."""
        found: list[Attention] = []
        with torch.enable_grad(), explicit_attention(self.adapter.module, found.append):
            logits = self.adapter.logits(inputs_nchw.detach().requires_grad_(True))
        own = [one for one in found if one.kind == "self"]
        places = [*(one.weights for one in found), own[-1].output]
        maps = []
        for index in range(target.num_targets):
            *slopes, last = gradients(logits, target.raw.direction(logits.detach(), index), places)
            maps.append(self.stream.maps(self._row(found, slopes, last)))
        return logits.detach(), maps

    def _row(self, found: Sequence[Attention], slopes: Sequence[Tensor], last: Tensor) -> Tensor:
        """The target's row of R, less the identity, [N, T] in float64; `last` is the gradient by the last output."""
        pairs = list(zip(found, slopes, strict=True))
        if self.stream.has_pooler:
            (start,) = (_relevance(one, slope).sum(1) for one, slope in pairs if one.kind == "pool")
            before = torch.zeros_like(start)
        else:
            start = before = self._heard(last)
        row = start
        for one, slope in reversed(pairs):
            if one.kind == "self":
                row = row + (row[:, None] @ _relevance(one, slope))[:, 0]
        return row - before

    def _heard(self, slope: Tensor) -> Tensor:
        """Weights [N, T] of the tokens whose last output the target reads, by the gradient [N, heads, T, d]."""
        is_heard = (slope != 0).flatten(3).any(3).any(1)
        prefix = self.stream.layout.prefix
        parts = [is_heard[:, :prefix].double(), is_heard[:, prefix:].double()]
        return torch.cat([part / part.sum(1, keepdim=True).clamp(min=1) for part in parts], 1)


def _relevance(one: Attention, slope: Tensor) -> Tensor:
    """B [N, Q, T] in float64."""
    return (one.weights.detach().double() * slope.double()).relu().mean(1)
