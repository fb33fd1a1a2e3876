"""A budget of masks: scores a well-spread part of each image's masks, and predicts the other scores."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from math import ceil
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from blocksight.engine.explainers.explanation import Quality
from blocksight.engine.model.resample import Grid, pooled
from blocksight.engine.model.transfers import to_device, to_host
from blocksight.engine.scoring.dropping import PatchMasks
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
"""A number of masks, a share of them between 0 and 1, or as many as `MAP_ERROR` needs."""

POINT_CELLS, ROUGH_CELLS, FINE = 14, 7, 4
"""The features of a mask: its means on 14 x 14 cells, and its deviations in the 4 x 4 parts of 7 x 7 cells."""
ROUGHNESS = 2.0
"""Weight of the deviations."""
MIN_WEIGHT, CAM_WEIGHT = 0.3, 1.4
"""Squared weight of a mean: where the class activation map is 0, and the addition at its maximum."""

AUTO_FIRST, AUTO_GROWTH = 0.03, 1.5
"""`auto`: the share of masks scored first, and the growth of a block's part while its map's error is too large."""
AUTO_MAX = 0.5
"""`auto`: the largest share of masks that it scores."""
MAP_ERROR = 0.25
"""`auto`: the predicted relative error of a block map that is small enough."""


@dataclass(frozen=True)
class Candidates:
    """The N masks of one image, block after block."""

    image: int
    """The number of the image among the inputs."""
    blocks: Sequence[Tensor]
    """Masks of each block at their native grid, float64 [K, h, w]."""
    masses: Sequence[Tensor]
    """Their sums over the full grid, [K]."""
    cam_hw: Tensor
    """The targets' class activation map at the last grid, at least 0. It weights differences of masks."""
    full: Grid
    head_scores: Tensor | None = None
    """The head's scores [N, T] under each mask, if there are any."""
    kind: type[MaskSet] | type[PatchMasks] = MaskSet
    """What they are scored as."""

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
        """The features of the masks, [N, D]: near masks have similar scores."""
        cam = pooled(self.cam_hw, self.full, (POINT_CELLS, POINT_CELLS)).flatten()
        weights = MIN_WEIGHT + CAM_WEIGHT * cam / cam.max().clamp(min=1e-300)
        rough = functional.avg_pool2d(self.fine[:, None], FINE)
        squares = functional.avg_pool2d(self.fine[:, None].square(), FINE)
        roughness = (squares - rough.square()).clamp(min=0).sqrt().flatten(1)
        (which,) = to_device([torch.repeat_interleave(torch.tensor(self.sizes))], rough.device)
        blocks = functional.one_hot(which, len(self.sizes)).to(rough.dtype)
        return torch.cat([self.means * weights.sqrt(), ROUGHNESS * roughness, blocks], 1)

    @cached_property
    def distances(self) -> list[Tensor]:
        """Between the features of each block's masks, [n, n]."""
        return [distances(self.rows[place], self.rows[place]) for place in self.places]

    def all_rows(self) -> list[Tensor]:
        """All row numbers of each block."""
        device = self.blocks[0].device
        return [torch.arange(place.start, place.stop, device=device) for place in self.places]

    def source(self, rows: Tensor | slice, block: int) -> MaskSet | PatchMasks:
        """Some of a block's masks, ready to be scored; a slice of rows is all of them."""
        masks = self.blocks[block]
        return self.kind(self.image, masks if isinstance(rows, slice) else masks[rows - self.places[block].start])


@dataclass(frozen=True)
class Sampled:
    """The scores of all masks of one image."""

    scores: Tensor
    """Measured or predicted, [N, T]."""
    qualities: tuple[Quality | None, ...]
    """Per target; None if no score was predicted from measured ones."""
    num_scored: int
    """Number of measured masks."""
    was_completed: bool = False
    """All masks were measured because the predicted error exceeded `complete_above`."""


class _Sampling:
    """The sampling of one image: the measured scores, and predictions of the others."""

    def __init__(self, candidates: Candidates, num_targets: int, budget: Budget, complete_above: float | None) -> None:
        self.candidates, self.budget, self.complete_above = candidates, budget, complete_above
        num_masks = sum(candidates.sizes)
        self.limits = shares_by_block(candidates.sizes, _limit(budget, num_masks))
        least = LEAST_PER_BLOCK * len(candidates.sizes)
        first = max(least, ceil(AUTO_FIRST * num_masks)) if budget == "auto" else num_masks
        firsts = shares_by_block(candidates.sizes, first)
        self.num_wanted = [min(own) for own in zip(self.limits, firsts, strict=True)]
        self.num_scored = [0] * len(self.limits)
        """Counts per block, like `num_wanted` and `limits`."""
        self.order = candidates.all_rows()
        device = candidates.blocks[0].device
        self.scores = torch.full((num_masks, num_targets), torch.nan, dtype=torch.float64, device=device)
        self.imputed: list[Imputed] = []
        self.errors = torch.zeros(0, dtype=torch.float64)
        """Predicted relative errors of the block maps, [T, blocks], on the CPU."""
        self.r2: list[float] = []
        """Of the predictions of each target."""
        self.was_completed = False

    @property
    def is_partial(self) -> bool:
        """Some of its masks are to be scored, but not all."""
        return 0 < sum(self.num_wanted) < len(self.scores)

    def next_rows(self) -> list[tuple[int, Tensor]]:
        """The masks to score now, as block and row numbers."""
        spans = enumerate(zip(self.order, self.num_scored, self.num_wanted, strict=True))
        return [(block, order[done:wanted]) for block, (order, done, wanted) in spans if done < wanted]

    def known(self) -> list[Known]:
        """The measured scores of each target."""
        anchors, head_scores = torch.cat(self._anchors()), self.candidates.head_scores
        return [
            Known(self.candidates.rows, anchors, scores, None if head_scores is None else head_scores[:, index])
            for index, scores in enumerate(self.scores[anchors].unbind(1))
        ]

    def _anchors(self) -> list[Tensor]:
        """The row numbers of each block's measured masks."""
        return [order[:count] for order, count in zip(self.order, self.num_scored, strict=True)]

    def store_predictions(self, imputed: list[Imputed], errors_tb: Tensor, r2: list[float]) -> None:
        """Stores the predictions, and asks for more scores of blocks that need them."""
        self.imputed, self.errors, self.r2 = imputed, errors_tb, r2
        errors = errors_tb.amax(0).tolist()
        if self.budget == "auto":
            self._want_more(errors)
        if self.num_wanted == self.num_scored and self.complete_above is not None and max(errors) > self.complete_above:
            self._want_all()

    def _want_more(self, errors: Sequence[float]) -> None:
        """Asks for more scores of blocks whose error is too large, within the budget."""
        for block, error in enumerate(errors):
            if error > MAP_ERROR:
                self.num_wanted[block] = min(self.limits[block], ceil(AUTO_GROWTH * self.num_scored[block]))

    def _want_all(self) -> None:
        """Asks for all scores. Measured masks stay first, so that none is measured twice."""
        pairs = zip(self._anchors(), self.candidates.all_rows(), strict=True)
        self.order = [torch.cat([done, every[~torch.isin(every, done)]]) for done, every in pairs]
        self.num_wanted = list(self.candidates.sizes)
        self.was_completed, self.imputed = True, []

    def map_errors(self, imputed: Sequence[Imputed]) -> Tensor:
        """The predicted relative error of every block's map, [T, blocks]."""
        ends = [0, *accumulate(self.num_scored)]  # measured scores are ordered by block
        parts = list(zip(self.candidates.places, pairwise(ends), self.candidates.distances, strict=True))
        maps = self.candidates.maps
        errors = [
            one.map_error(place, slice(*measured), maps[place], apart)
            for one in imputed
            for place, measured, apart in parts
        ]
        return torch.stack(errors).view(len(imputed), len(parts))

    def sampled(self) -> Sampled:
        """All scores, with their quality."""
        scores, qualities = self.scores, (None,) * self.scores.shape[1]
        if self.imputed:
            scores = torch.stack([one.scores for one in self.imputed], 1)
            errors = self.errors.amax(1).tolist()
            qualities = tuple(Quality(r2, error) for r2, error in zip(self.r2, errors, strict=True))
        elif sum(self.num_scored) == 0 and self.candidates.head_scores is not None:
            scores = self.candidates.head_scores
        return Sampled(scores, qualities, sum(self.num_scored), self.was_completed)


def _design(images: Sequence[_Sampling]) -> None:
    """Orders each block's masks for scoring: well-spread masks first."""
    scales = DESIGN_SCALE * torch.stack([median_distance(one.candidates.rows) for one in images])
    norms = [one.candidates.maps.norm(dim=1) for one in images]
    for block in range(len(images[0].limits)):
        places = [one.candidates.places[block] for one in images]
        apart = [one.candidates.distances[block] for one in images]
        largest = max(len(own) for own in apart)
        square = torch.stack([functional.pad(own, (0, largest - len(own)) * 2) for own in apart])
        weights = padded([own[place] for own, place in zip(norms, places, strict=True)], value=-1)
        order = design_order(square, weights, max(one.limits[block] for one in images), scales)
        for one, place, own in zip(images, places, order, strict=True):
            one.order[block] = place.start + own[: one.limits[block]]


def _predict(images: Sequence[_Sampling]) -> None:
    """Predicts the missing scores. What decides the next ones comes to the host in one copy."""
    known = [one.known() for one in images]
    imputed = iter(impute([target for own in known for target in own]))
    made = [[next(imputed) for _ in own] for own in known]
    errors = [one.map_errors(own) for one, own in zip(images, made, strict=True)]
    moved = to_host([*errors, *(torch.stack([target.r2 for target in own]) for own in made)])
    for one, own, own_errors, r2 in zip(images, made, moved[: len(images)], moved[len(images) :], strict=True):
        one.store_predictions(own, own_errors, r2.tolist())


Run = Callable[[Sequence[tuple[Candidates, int, Tensor | slice]]], Sequence[Tensor]]
"""Measures masks: each entry is an image's candidates, a block number and row numbers [K], or the slice of all the
block's rows. Returns scores [K, T]."""


def sample(
    run: Run,
    candidates: Sequence[Candidates],
    num_targets: int,
    budget: Budget | None,
    complete_above: float | None = None,
) -> list[Sampled]:
    """The scores of all masks of all images: the budget's number is measured, the rest predicted; None: all measured.

    With a budget of 0 the head's scores are the result. Once the budget is spent, all masks of an image are measured
    if the predicted relative error of one of its block maps exceeds `complete_above`.
    """
    if budget is None:
        return _all_measured(run, candidates, num_targets)
    images = [_Sampling(own, num_targets, budget, complete_above) for own in candidates]
    for some in _groups([one for one in images if one.is_partial]):
        _design(some)
    while wanted := [(one, block, rows) for one in images for block, rows in one.next_rows()]:
        found = run([(one.candidates, block, rows) for one, block, rows in wanted])
        for (one, block, rows), scores in zip(wanted, found, strict=True):
            one.scores[rows] = scores
            one.num_scored[block] += len(rows)
        asked = {id(one) for one, _, _ in wanted}
        for some in _groups([one for one in images if id(one) in asked and one.is_partial]):
            _predict(some)
    return [one.sampled() for one in images]


def _all_measured(run: Run, candidates: Sequence[Candidates], num_targets: int) -> list[Sampled]:
    """Every mask's own score."""
    found = iter(run([(own, block, place) for own in candidates for block, place in enumerate(own.places)]))
    scores = [torch.cat([next(found) for _ in own.places]) for own in candidates]
    return [Sampled(own, (None,) * num_targets, len(own)) for own in scores]


def _groups(images: Sequence[_Sampling]) -> list[Sequence[_Sampling]]:
    """The images in groups that are computed at once: all together on a GPU, where steps cost more than numbers.

    One by one on a CPU: there padding costs time, and last bits would depend on the other images.
    """
    on_gpu = any(one.scores.device.type == "cuda" for one in images)
    return [images] if on_gpu else [[one] for one in images]


def _limit(budget: Budget, num_masks: int) -> int:
    """The largest number of masks of an image to score."""
    if budget == "auto":
        return ceil(AUTO_MAX * num_masks)
    return ceil(budget * num_masks) if isinstance(budget, float) else min(budget, num_masks)
