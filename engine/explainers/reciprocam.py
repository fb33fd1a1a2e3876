"""Recipro-CAM: what the target is if one place of the last feature maps is kept and all others are zero."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from blocksight.engine.errors import ModelError
from blocksight.engine.explainers.cams import whole_block
from blocksight.engine.explainers.explainer import Attribution, SignedExplainer
from blocksight.engine.model.blocks import Place
from blocksight.engine.model.device_errors import device_trouble
from blocksight.engine.model.nearness import are_near
from blocksight.engine.model.resample import Grid
from blocksight.engine.model.targets import Target
from blocksight.engine.model.token_stream import example_pictures

BELL = (1 / 4, 1 / 2, 1 / 4)
"""Of `kernel=gauss`, along each axis."""


class ReciproCam(SignedExplainer):
    """`map_k = z_c(A m_k) - z_c(0)`, m_k a mask of place k; no gradient is taken.

    Byun and Lee, arXiv 2209.14074 (CNN) and 2310.02588 (tokens). Tokens before the patches stay; patches are zeroed,
    not dropped. The score of nothing is subtracted (an extension), so that a place may speak against the target.
    """

    def _prepare(self, blocks: Sequence[str]) -> None:
        named, _ = self.adapter.network.last_block(blocks)
        self.block = named if blocks else self._heard_block(named)
        self.taps = self.adapter.network.taps([self.block])
        self.tail = self.taps.tail()
        assert self.block.grid is not None
        self.masks = place_masks(self.block.grid, self.parameters.kernel).to(self.adapter.device)
        if not self._is_heard(self.block):
            raise ModelError(
                f"reciprocam: the logits of {self.adapter.name} do not depend on the feature maps of "
                f"{self.block.name}; name an earlier block with --blocks"
            )
        self.may_grow = self._may_grow()

    def _heard_block(self, last: Place) -> Place:
        """The last block, or the nearest place before it whose maps reach the logits.

        Without gradients a trace does not show that a class token alone is read at the end.
        """
        places = self.adapter.network.places
        before = [one for one in places[: places.index(last) + 1] if one.is_unavoidable and one.layout == last.layout]
        return next((one for one in reversed(before) if self._is_heard(one)), last)

    def _is_heard(self, place: Place) -> bool:
        tail, example = self.adapter.network.taps([place]).tail(), example_pictures(self.adapter, 1)
        assert place.grid is not None
        drawn = torch.randn(1, place.channels, *place.grid, generator=torch.Generator().manual_seed(0))
        maps = drawn.to(self.adapter.device)
        with self.adapter.borrowed(), torch.no_grad():
            return not torch.equal(tail(example, maps), tail(example, 0 * maps))

    def _may_grow(self) -> bool:
        """Whether the network gives the same logits if only its part behind the block runs on more rows."""
        kept, example = [], example_pictures(self.adapter, 1)

        def twice(maps: Tensor) -> Tensor:
            kept.append(torch.cat([maps, 0.5 * maps]))
            return kept[-1]

        with self.adapter.borrowed(), torch.no_grad():
            try:
                found = self.taps.grown(example, twice)
                wanted = self.tail(example.expand(2, -1, -1, -1), kept[-1])
            except RuntimeError as error:
                if device_trouble(error) is not None:
                    raise
                return False
        return are_near(found, wanted)

    def _attribute_pass(self, inputs_nchw: Tensor, target: Target, seeds: Sequence[int]) -> list[list[Attribution]]:
        found = []
        for image, row in enumerate(self._scores(inputs_nchw, target)):
            own = self._maps(inputs_nchw[image : image + 1], target.of(slice(image, image + 1)))
            count, blocks = len(self.masks) + 1, (whole_block(self.block),)
            found.append([Attribution(one, score, count, blocks) for one, score in zip(own, row, strict=True)])
        return found

    @torch.no_grad()
    def _maps(self, input_nchw: Tensor, target: Target) -> Tensor:
        """The signed maps [T, h, w] of one image, float64."""
        assert self.block.grid is not None
        masks = torch.cat([torch.zeros_like(self.masks[:1]), self.masks])
        size = self.scorer.batch_size
        parts = [self._logits(input_nchw, _filled(part, size))[: len(part)] for part in masks.split(size)]
        logits = torch.cat(parts)
        images = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
        scores = target.raw.score(logits, images)
        return (scores[1:] - scores[:1]).T.unflatten(1, self.block.grid)

    def _logits(self, input_nchw: Tensor, masks_khw: Tensor) -> Tensor:
        """Logits [K, classes] of an image's last maps under masks at their grid."""
        masks = masks_khw[:, None]
        if self.may_grow:
            return self.taps.grown(input_nchw, lambda maps: maps * masks.to(maps.dtype))
        _, (maps,) = self.taps(input_nchw)
        return self.tail(input_nchw.expand(len(masks), -1, -1, -1), maps.detach() * masks.to(maps.dtype))


def _filled(masks_khw: Tensor, size: int) -> Tensor:
    """As many masks as a batch holds, for rounding depends on its size."""
    return torch.cat([masks_khw, masks_khw[-1:].expand(size - len(masks_khw), -1, -1)])


def place_masks(grid: Grid, kernel: str) -> Tensor:
    """One mask per place [h w, h, w], row by row: 1 there, or a bell over its neighbours that is cut at the rim."""
    places = torch.eye(grid[0] * grid[1]).unflatten(1, grid)
    if kernel == "single":
        return places
    bell = torch.tensor(BELL)
    return functional.conv2d(places[:, None], torch.outer(bell, bell)[None, None], padding=1)[:, 0]
