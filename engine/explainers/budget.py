"""A budget of masks: scores some of each image's masks, spread well, and predicts the other scores."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from math import ceil
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from blocksight.engine.explainers.explanation import Quality
from blocksight.engine.model.resample import Grid, pooled
from blocksight.engine.scoring.scorer import MaskSet
from blocksight.engine.scoring.surrogate import (
    DESIGN_SCALE,
    LEAST_PER_BLOCK,
    Imputed,
    Known,
    design_order,
    distances,
    impute,
    median_distance,
    padded,
    shares_by_block,
)

Budget = int | float | Literal["auto"]
"""A number of masks, a share of them between 0 and 1, or as many as `MAP_ERROR` asks for."""

POINT_CELLS, ROUGH_CELLS, FINE = 14, 7, 4
"""A mask as a point: its means on 14 x 14 cells, and its deviations between the 4 x 4 parts of 7 x 7 cells."""
ROUGHNESS = 2.0
"""Weight of the deviations."""
LEAST_WEIGHT, CAM_WEIGHT = 0.3, 1.4
"""Squared weight of a mean: where the class activation map is 0, and what is added where it is at its top."""

AUTO_FIRST, AUTO_GROWTH = 0.03, 1.5
"""`auto`: the share of masks scored first, and the growth of a block's part while its map's error is too large."""
AUTO_MOST = 0.5
"""`auto` scores no larger share than this."""
MAP_ERROR = 0.25
"""`auto`: the predicted relative error of a block map that is good enough."""


@dataclass(frozen=True)
class Candidates:
    """The masks of one image, block after block: N in all."""

    image: int
    """Which of the inputs they are for."""
    blocks: Sequence[Tensor]
    """Masks of each block at their native grid, float64 [K, h, w]."""
    masses: Sequence[Tensor]
    """Their sums over the full grid, [K]."""
    cam_hw: Tensor
    """The targets' class activation map at the last grid, at least 0: where masks differ matters most there."""
    full: Grid
    guess: Tensor | None = None
    """The head's scores [N, T] under each mask, where it has any."""

    @cached_property
    def sizes(self) -> list[int]:
        """K of each block."""
        return [len(masks) for masks in self.blocks]

    @cached_property
    def places(self) -> list[slice]:
        """Each block's rows."""
        ends = torch.tensor([0, *self.sizes]).cumsum(0).tolist()
        return [slice(start, stop) for start, stop in pairwise(ends)]

    @cached_property
    def fine(self) -> Tensor:
        """The masks' means on a grid of 28 x 28 cells, [N, 28, 28]."""
        cells = (ROUGH_CELLS * FINE, ROUGH_CELLS * FINE)
        return torch.cat([pooled(masks, self.full, cells) for masks in self.blocks])

    @cached_property
    def means(self) -> Tensor:
        """Their means on the coarse grid, [N, cells]."""
        return functional.avg_pool2d(self.fine[:, None], ROUGH_CELLS * FINE // POINT_CELLS).flatten(1)

    @cached_property
    def maps(self) -> Tensor:
        """C_k, a mask over its mass, on the coarse grid, [N, cells]."""
        return self.means / torch.cat(list(self.masses))[:, None]

    @cached_property
    def rows(self) -> Tensor:
        """The masks as points of a space in which near masks score alike, [N, D]."""
        cam = pooled(self.cam_hw, self.full, (POINT_CELLS, POINT_CELLS)).flatten()
        weights = LEAST_WEIGHT + CAM_WEIGHT * cam / cam.max().clamp(min=1e-300)
        rough = functional.avg_pool2d(self.fine[:, None], FINE)
        squares = functional.avg_pool2d(self.fine[:, None].square(), FINE)
        roughness = (squares - rough.square()).clamp(min=0).sqrt().flatten(1)
        which = torch.repeat_interleave(torch.tensor(self.sizes)).to(rough.device)
        blocks = functional.one_hot(which, len(self.sizes)).to(rough.dtype)
        return torch.cat([self.means * weights.sqrt(), ROUGHNESS * roughness, blocks], 1)

    @cached_property
    def distances(self) -> list[Tensor]:
        """Of the points of each block, [n, n]."""
        return [distances(self.rows[place], self.rows[place]) for place in self.places]

    def every(self) -> list[Tensor]:
        """Per block all row numbers."""
        device = self.blocks[0].device
        return [torch.arange(place.start, place.stop, device=device) for place in self.places]

    def source(self, rows: Tensor, block: int) -> MaskSet:
        """Some of a block's masks, ready to be scored."""
        return MaskSet(self.image, self.blocks[block][rows - self.places[block].start])


@dataclass(frozen=True)
class Sampled:
    """The final scores of one image's masks."""

    scores: Tensor
    """Of every mask, run or predicted, [N, T]."""
    qualities: tuple[Quality | None, ...]
    """Per target; None if nothing was predicted from scores that were run."""
    num_scored: int
    """Masks that were run."""
    was_completed: bool = False
    """All masks were run because the budget's map was too poor."""


class _Sampling:
    """The sampling of one image: its scores so far, and the predictions of the others."""

    def __init__(
        self, candidates: Candidates, num_targets: int, budget: Budget | None, complete_above: float | None
    ) -> None:
        self.candidates, self.budget, self.complete_above = candidates, budget, complete_above
        num_masks = sum(candidates.sizes)
        self.most = shares_by_block(candidates.sizes, _most(budget, num_masks))
        least = LEAST_PER_BLOCK * len(candidates.sizes)
        first = max(least, ceil(AUTO_FIRST * num_masks)) if budget == "auto" else num_masks
        self.wanted = [min(own) for own in zip(self.most, shares_by_block(candidates.sizes, first), strict=True)]
        self.scored = [0] * len(self.most)
        self.order = candidates.every()
        empty = torch.full((num_masks, num_targets), torch.nan, dtype=torch.float64)
        self.scores = empty.to(candidates.blocks[0].device)
        self.imputed: list[Imputed] = []
        self.errors = self.scores.new_zeros(0)
        """Predicted relative errors of the block maps, [T, blocks]."""
        self.was_completed = False

    @property
    def is_partial(self) -> bool:
        """Some of its masks are to be scored, and not all."""
        return 0 < sum(self.wanted) < len(self.scores)

    def next_rows(self) -> list[tuple[int, Tensor]]:
        """The masks to score now, as block and row numbers."""
        spans = enumerate(zip(self.order, self.scored, self.wanted, strict=True))
        return [(block, order[done:wanted]) for block, (order, done, wanted) in spans if done < wanted]

    def known(self) -> list[Known]:
        """What has been scored, target by target."""
        anchors, guess = torch.cat(self._anchors()), self.candidates.guess
        return [
            Known(self.candidates.rows, anchors, scores, None if guess is None else guess[:, index])
            for index, scores in enumerate(self.scores[anchors].unbind(1))
        ]

    def _anchors(self) -> list[Tensor]:
        """Per block the masks that were run: row numbers."""
        return [order[:count] for order, count in zip(self.order, self.scored, strict=True)]

    def learn(self, imputed: list[Imputed]) -> None:
        """Stores the predictions, and raises the parts of blocks that need more scores."""
        self.imputed, self.errors = imputed, self._errors(imputed)
        errors = self.errors.amax(0).tolist()
        if self.budget == "auto":
            self._want_more(errors)
        if self.wanted == self.scored and self.complete_above is not None and max(errors) > self.complete_above:
            self._want_all()

    def _want_more(self, errors: Sequence[float]) -> None:
        """Raises the parts of blocks whose error is too large, within the budget."""
        for block, error in enumerate(errors):
            if error > MAP_ERROR:
                self.wanted[block] = min(self.most[block], ceil(AUTO_GROWTH * self.scored[block]))

    def _want_all(self) -> None:
        """Gives the budget up; the masks that were run stay first, so that none is run twice."""
        pairs = zip(self._anchors(), self.candidates.every(), strict=True)
        self.order = [torch.cat([done, every[~torch.isin(every, done)]]) for done, every in pairs]
        self.wanted = list(self.candidates.sizes)
        self.was_completed, self.imputed = True, []

    def _errors(self, imputed: Sequence[Imputed]) -> Tensor:
        """The predicted relative error of every block's map, [T, blocks]."""
        places, maps, apart = self.candidates.places, self.candidates.maps, self.candidates.distances
        parts = list(zip(places, apart, strict=True))
        return torch.stack(
            [torch.stack([one.map_error(place, maps[place], own) for place, own in parts]) for one in imputed]
        )

    def sampled(self) -> Sampled:
        """The final scores, with their quality."""
        scores, qualities = self.scores, (None,) * self.scores.shape[1]
        if self.imputed:
            scores = torch.stack([one.scores for one in self.imputed], 1)
            errors = self.errors.amax(1).tolist()
            qualities = tuple(Quality(one.r2, error) for one, error in zip(self.imputed, errors, strict=True))
        elif sum(self.scored) == 0 and self.candidates.guess is not None:
            scores = self.candidates.guess
        return Sampled(scores, qualities, sum(self.scored), self.was_completed)


def _design(images: Sequence[_Sampling]) -> None:
    """Sets the order in which each block's masks are scored: well-spread masks first."""
    scales = DESIGN_SCALE * torch.stack([median_distance(one.candidates.rows) for one in images])
    norms = [one.candidates.maps.norm(dim=1) for one in images]
    for block in range(len(images[0].most)):
        places = [one.candidates.places[block] for one in images]
        apart = [one.candidates.distances[block] for one in images]
        largest = max(len(own) for own in apart)
        square = torch.stack([functional.pad(own, (0, largest - len(own)) * 2) for own in apart])
        weights = padded([own[place] for own, place in zip(norms, places, strict=True)], value=-1)
        order = design_order(square, weights, max(one.most[block] for one in images), scales)
        for one, place, own in zip(images, places, order, strict=True):
            one.order[block] = place.start + own[: one.most[block]]


def _predict(images: Sequence[_Sampling]) -> None:
    """Predicts the scores that are missing."""
    known = [one.known() for one in images]
    imputed = iter(impute([target for own in known for target in own]))
    for one, own in zip(images, known, strict=True):
        one.learn([next(imputed) for _ in own])


Run = Callable[[Sequence[tuple[Candidates, int, Tensor]]], Sequence[Tensor]]
"""The scores [K, T] of some masks: of an image, of a block number, of row numbers [K]."""


def sample(
    run: Run,
    candidates: Sequence[Candidates],
    num_targets: int,
    budget: Budget | None,
    complete_above: float | None = None,
) -> list[Sampled]:
    """The scores of all masks of all images, of which as many are run as the budget says; None: all.

    With a budget of 0 the heads' scores are the result. An image with a block map whose predicted relative error
    exceeds `complete_above` when the budget is spent has its other masks run too.
    """
    every = [_Sampling(own, num_targets, budget, complete_above) for own in candidates]
    for some in _together([one for one in every if one.is_partial]):
        _design(some)
    while wanted := [(one, block, rows) for one in every for block, rows in one.next_rows()]:
        found = run([(one.candidates, block, rows) for one, block, rows in wanted])
        for (one, block, rows), scores in zip(wanted, found, strict=True):
            one.scores[rows] = scores
            one.scored[block] += len(rows)
        asked = {id(one) for one, _, _ in wanted}
        for some in _together([one for one in every if id(one) in asked and one.is_partial]):
            _predict(some)
    return [one.sampled() for one in every]


def _together(images: Sequence[_Sampling]) -> list[Sequence[_Sampling]]:
    """Images whose arithmetic is done at once: all on a GPU, where steps cost more than numbers.

    One by one on a CPU: padding would cost there, and move last bits with the company that an image is in.
    """
    on_gpu = any(one.scores.device.type == "cuda" for one in images)
    return [images] if on_gpu else [[one] for one in images]


def _most(budget: Budget | None, num_masks: int) -> int:
    """How many masks of an image may be scored."""
    if budget is None:
        return num_masks
    if budget == "auto":
        return ceil(AUTO_MOST * num_masks)
    return ceil(budget * num_masks) if isinstance(budget, float) else min(budget, num_masks)
