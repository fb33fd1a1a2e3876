"""ROAD: removed pixels are imputed from their neighbours, so that the mask's shape gives no information."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from blocksight.engine.metrics.faithfulness import Agreement, Place, RankedMasks
from blocksight.engine.metrics.metric import Maps
from blocksight.engine.model.transfers import sent
from blocksight.engine.scoring.perturb import Perturbation
from blocksight.engine.scoring.scorer import MaskSource

SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 0.9)
NOISE = 0.01
"""Deviation of the noise on imputed pixels, in model-input space."""
NEIGHBOURS = ((1 / 12, 1 / 6, 1 / 12), (1 / 6, 0.0, 1 / 6), (1 / 12, 1 / 6, 1 / 12))
TOLERANCE = 1e-4
"""Of the imputation's residual, relative: far below the noise."""
MAX_ITERATIONS = 2_000
ITERATIONS_PER_TEST = 16
"""Between two tests for convergence on a GPU, each of which the host waits for."""
SYSTEMS_AT_ONCE = 64
"""Pictures that a GPU imputes together."""


def imputed(image_chw: Tensor, kept_hw: Tensor) -> Tensor:
    """The image [C, H, W]; each pixel that is not kept (bool [H, W]) is the weighted mean of its eight neighbours.

    Direct neighbours inside the image have weight 1/6 and diagonal ones 1/12 (Rong et al., ICML 2022, section 4.3):
    a sparse linear system, solved by conjugate gradients. Zeros if no pixel is kept.
    """
    return all_imputed(image_chw[None], kept_hw[None])[0]


def all_imputed(images_nchw: Tensor, kept_nhw: Tensor) -> Tensor:
    """`imputed` of each image, [N, C, H, W]; the results do not depend on which are solved together.

    A GPU solves all at once. A CPU solves one after another, because the planes of one fit its caches, and tests
    every iteration, because nothing waits.
    """
    if images_nchw.device.type == "cpu":
        return torch.cat(
            [solved_together(images_nchw[i : i + 1], kept_nhw[i : i + 1], 1) for i in range(len(images_nchw))]
        )
    return solved_together(images_nchw, kept_nhw, ITERATIONS_PER_TEST)


def solved_together(images_nchw: Tensor, kept_nhw: Tensor, iterations_per_test: int) -> Tensor:
    """`imputed` of each image; one that has converged is left as it is between two tests."""
    kept = kept_nhw[:, None]
    kernel = sent(torch.tensor(NEIGHBOURS, dtype=images_nchw.dtype), images_nchw.device)[None, None]
    missing = (~kept).to(images_nchw)

    def around(values: Tensor) -> Tensor:
        return functional.conv2d(values.flatten(0, 1)[:, None], kernel, padding=1).view(values.shape)

    weight = around(torch.ones_like(images_nchw[:1, :1]))

    def apply(values: Tensor, missing: Tensor) -> Tensor:
        return missing * (weight * values - around(values))

    known = images_nchw * (1 - missing)
    start = missing * (known.sum((2, 3), keepdim=True) / kept.sum((2, 3), keepdim=True).clamp(min=1))
    system = _System(apply, missing, missing * around(known), start)
    return known + system.solution(iterations_per_test)


class _System:
    """Linear systems `apply(x, missing) = wanted`, solved by conjugate gradients per channel, [N, C, H, W].

    An image's channels end together. Its solution is the one at its end, however long the others take.
    """

    def __init__(
        self, apply: Callable[[Tensor, Tensor], Tensor], missing: Tensor, wanted: Tensor, start: Tensor
    ) -> None:
        self.apply, self.missing, self.found = apply, missing, start
        self.least = torch.finfo(wanted.dtype).tiny
        self.residual = wanted - apply(start, missing)
        self.step, self.size = self.residual, _dot(self.residual, self.residual)
        self.enough = TOLERANCE**2 * _dot(wanted, wanted).clamp(min=self.least)

    def solution(self, iterations_per_test: int) -> Tensor:
        """A test costs a wait, and takes the images that have converged out of the next iterations."""
        solutions, places = torch.empty_like(self.found), torch.arange(len(self.found), device=self.found.device)
        for _ in range(0, MAX_ITERATIONS, iterations_per_test):
            is_open = self._is_open().flatten().tolist()
            if not all(is_open):
                solutions[places] = self.found
                if not any(is_open):
                    return solutions
                places = self._keep(places, is_open)
            self._iterate()
            for _ in range(iterations_per_test - 1):
                self._iterate(self._is_open())
        solutions[places] = self.found
        return solutions

    def _keep(self, places: Tensor, is_open: list[bool]) -> Tensor:
        """Goes on with the open images alone, and returns their places."""
        rows = sent(torch.tensor([row for row, own in enumerate(is_open) if own]), self.found.device)
        for name in ("missing", "found", "residual", "step", "size", "enough"):
            setattr(self, name, getattr(self, name)[rows])
        return places[rows]

    def _is_open(self) -> Tensor:
        """Which images have not converged, [N, 1, 1, 1]."""
        return ~(self.size <= self.enough).all(1, keepdim=True)

    def _iterate(self, is_open: Tensor | None = None) -> None:
        """One iteration; the solutions that are not open stay. None: all are open."""
        image = self.apply(self.step, self.missing)
        length = self.size / _dot(self.step, image).clamp(min=self.least)
        if is_open is not None:
            length = length * is_open
        self.found = self.found + length * self.step
        self.residual = self.residual - length * image
        before, self.size = self.size, _dot(self.residual, self.residual)
        self.step = self.residual + self.size / before.clamp(min=self.least) * self.step


def _dot(one: Tensor, other: Tensor) -> Tensor:
    return (one * other).sum((2, 3), keepdim=True)


class Imputer:
    """Imputes the pictures of many maps, in the order in which they are asked for.

    A GPU imputes those of several maps together; they are held until the next ones are asked for.
    """

    def __init__(self, pictures: Sequence[Tensor], ranked: Sequence[RankedMasks], seeds: Sequence[int]) -> None:
        """Per map the picture [C, H, W], the masks, and the seed of the noise.

        The last bits of sums depend on the layout of a picture's memory.
        """
        self.pictures, self.ranked, self.seeds = pictures, ranked, seeds
        self.ready: dict[int, Tensor] = {}

    def imputed(self, number: int) -> Tensor:
        """The pictures of one map [K, C, H, W]; their removed pixels are imputed, with a little noise."""
        if number not in self.ready:
            self.ready = {}  # before more memory is taken
            self.ready = self._made(range(number, min(len(self.ranked), number + self._at_once(number))))
        return self.ready[number]

    def _at_once(self, number: int) -> int:
        """How many maps are imputed together."""
        is_on_cpu = self.pictures[number].device.type == "cpu"
        return 1 if is_on_cpu else max(1, SYSTEMS_AT_ONCE // len(self.ranked[number]))

    def _made(self, numbers: range) -> dict[int, Tensor]:
        masks = [self.ranked[one].masks(0, len(self.ranked[one]), self.pictures[one]) for one in numbers]
        sizes = [len(own) for own in masks]
        pictures = [self.pictures[one].expand(size, -1, -1, -1) for one, size in zip(numbers, sizes, strict=True)]
        kept, images = torch.cat(masks) > 0, torch.cat(pictures) if len(pictures) > 1 else pictures[0]
        noises = [self._noise(one).expand(size, -1, -1, -1) for one, size in zip(numbers, sizes, strict=True)]
        filled = torch.where(kept[:, None], images, all_imputed(images, kept) + NOISE * torch.cat(noises))
        return dict(zip(numbers, filled.split(sizes), strict=True))

    def _noise(self, number: int) -> Tensor:
        picture = self.pictures[number]
        noise = torch.randn(picture.shape, generator=torch.Generator().manual_seed(self.seeds[number]))
        return sent(noise, picture.device).to(picture)


@dataclass(frozen=True)
class Imputed(MaskSource):
    """Masked inputs of one map, whose removed pixels are imputed."""

    image: int
    imputer: Imputer
    number: int
    """The map's, in the imputer."""

    def __len__(self) -> int:
        return len(self.imputer.ranked[self.number])

    def masks(self, start: int, stop: int, image_chw: Tensor) -> Tensor:
        return self.imputer.ranked[self.number].masks(start, stop, image_chw)

    def write(self, out_nchw: Tensor, image_chw: Tensor, start: int, perturbation: Perturbation) -> None:
        out_nchw.copy_(self.imputer.imputed(self.number)[start : start + len(out_nchw)])


class Road(Agreement):
    """The area under the share of unchanged predictions, from (0, 1) to (1, 0)."""

    shares = SHARES
    is_painted = True

    def details(self) -> Mapping[str, Any]:
        return {**super().details(), "baseline": "noisy linear imputation", "noise": NOISE, "seed": "of the record"}

    def sources(self, maps: Maps, places: Sequence[Place]) -> list[MaskSource]:
        images = [image for image, _ in places]
        pictures, seeds = [maps.inputs_nchw[image] for image in images], [maps.seeds[image] for image in images]
        imputer = Imputer(pictures, self.ranked(maps, places), seeds)
        return [Imputed(image, imputer, number) for number, image in enumerate(images)]

    def area(self, masked: Sequence[float]) -> float:
        """In percent, by the trapezoid rule over uneven shares."""
        places, heights = (0.0, *self.shares, 1.0), (1.0, *masked, 0.0)
        return 100 * sum(
            (places[i + 1] - places[i]) * (heights[i] + heights[i + 1]) / 2 for i in range(len(places) - 1)
        )


class MostRelevantFirst(Road):
    """ROAD-MoRF: the most salient pixels are removed first (lower is better)."""

    names = ("road_morf",)


class LeastRelevantFirst(Road):
    """ROAD-LeRF: the least salient pixels are removed first (higher is better)."""

    names = ("road_lerf",)
    removed = "bottom"
