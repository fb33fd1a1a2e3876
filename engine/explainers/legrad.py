"""LeGrad: how strongly each block's attention raises the target, read from that block's tokens alone."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from blocksight.engine.explainers.points import ImageExplainer
from blocksight.engine.model.attention import Attention, explicit_attention
from blocksight.engine.model.device_errors import device_trouble
from blocksight.engine.model.nearness import are_near
from blocksight.engine.model.taps import gradients
from blocksight.engine.model.targets import Target
from blocksight.engine.model.token_stream import replacing_tokens, token_blocks, token_stream


@dataclass(frozen=True)
class _Pass:
    """One forward pass; its end reads the tokens of all L blocks, and the network's own."""

    logits: Tensor
    """[(L + 1) N, K]: what the tokens of each block would say; the last N are the network's."""
    attentions: tuple[Attention, ...]
    """Those that the map is made of: one per block, or the pooler's over all (L + 1) N."""


class LeGrad(ImageExplainer):
    """`mean_l mean_{heads, queries} relu(d s_l / d A_l)`, s_l the target read from block l's mean token.

    Bousselham et al., ICCV 2025 (arXiv 2404.03214), equations 5 to 9. The network's own end reads the tokens of each
    block. `pool=mean`: every token is their mean before. `pool=model`: the tokens as they are. If an attention pools
    the tokens, A_l is the pooler's over the tokens of block l, and its queries' parts are added.
    """

    def _prepare(self, blocks: Sequence[str]) -> None:
        self.stream = token_stream(self.adapter, "legrad")
        self.paths = token_blocks(self.adapter, "legrad", self.stream)
        self.is_tied = not self._may_grow()

    def _may_grow(self) -> bool:
        """Whether the end of the network gives the same logits if only its own batch holds more rows."""
        self.is_tied = False
        example = self.adapter.normalise(torch.zeros(2, 3, *self.adapter.input_size, dtype=torch.uint8))
        example[1] += 0.5
        with self.adapter.borrowed():
            with torch.no_grad():
                wanted = self.adapter.logits(example)
            try:
                found = self._run(example).logits[-2:]
            except RuntimeError as error:
                if device_trouble(error) is not None:
                    raise
                return False
        return are_near(found, wanted)

    def _run(self, inputs_nchw: Tensor) -> _Pass:
        """The pass of some images. A tied end needs a second pass of as many images as it reads rows."""
        found: list[Attention] = []
        seen: list[Tensor] = []
        num_blocks = len(self.paths)

        def replace(_: int, tokens: Tensor) -> Tensor:
            seen.append(tokens)
            if len(seen) < num_blocks:
                return tokens.detach().requires_grad_(True)
            return tokens if self.is_tied else self._read(seen)

        module = self.adapter.module
        with torch.enable_grad(), explicit_attention(module, found.append):
            with replacing_tokens(module, self.paths, replace):
                logits = self.adapter.logits(inputs_nchw.detach().requires_grad_(True))
            if self.is_tied:
                with replacing_tokens(module, self.paths[-1:], lambda *_: self._read(seen)):
                    logits = self.adapter.logits(inputs_nchw.repeat(num_blocks + 1, 1, 1, 1))
        own = [one for one in found if one.kind == "self"][:num_blocks]
        return _Pass(logits, tuple(found[-1:] if self.stream.has_pooler else own))

    def _read(self, seen: Sequence[Tensor]) -> Tensor:
        """What the network's end reads, [(L + 1) N, T, D]."""
        return torch.cat([*map(self._lens, seen), seen[-1]])

    def _lens(self, tokens: Tensor) -> Tensor:
        if self.stream.has_pooler or self.parameters.pool == "model":
            return tokens
        return tokens.mean(1, keepdim=True).expand_as(tokens)

    def attributions(self, inputs_nchw: Tensor, target: Target) -> tuple[Tensor, list[Tensor]]:
        """The logits, and the maps at the patches' grid, [N, h, w]."""
        count, made = len(inputs_nchw), self._run(inputs_nchw)
        logits = made.logits.detach()
        read = logits[:-count]
        rows = target.of(torch.arange(count, device=logits.device).repeat(len(self.paths)))
        found = []
        for index in range(target.num_targets):
            wanted = torch.cat([rows.raw.direction(read, index), torch.zeros_like(logits[-count:])])
            slopes = gradients(made.logits, wanted, [one.weights for one in made.attentions])
            found.append(self.stream.maps(self._mean_over_blocks(slopes, count)))
        return logits[-count:], found

    def _mean_over_blocks(self, slopes: Sequence[Tensor], count: int) -> Tensor:
        """The map of every token [N, T], float64, of the gradients by the attentions."""
        if self.stream.has_pooler:
            own = slopes[0][:-count].double().relu().mean(1).sum(1)
            return own.unflatten(0, (len(self.paths), count)).mean(0)
        return torch.stack([slope.double().relu().mean((1, 2)) for slope in slopes]).mean(0)
