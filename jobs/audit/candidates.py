"""Finds candidates for shortcuts: regions that one class's maps point at and other classes' maps do not."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import label as components

from blocksight.jobs.audit.clusters import ClassModel
from blocksight.jobs.audit.result import GRID

Floats = NDArray[np.float64]

MIN_MAPS = 10
"""Fewest maps of a class or cluster, and of all other classes together."""
EVEN = 1.0
"""Density of an even map. A map points at a region if its density there exceeds this, and the others' by `MORE`."""
CERTAIN = 5.0
"""Standard errors by which a class's mean map must exceed the other classes' in a candidate."""
MORE = 1.5
"""The class's density is at least this many times the other classes'; else the region is not its own."""
PARTS_OF_PEAK = (0.5, 0.65, 0.8, 0.9, 0.97)
"""A candidate is where the excess is at least this part of its peak: half, as for the width of a blurred spot, or more
if the region were too large, as happens with maps of few cells."""
MAX_AREA = 0.25
"""Largest share of the picture that a candidate may cover."""
RIM = 2
"""Cells around a candidate in which no other one is searched, because maps are blurred."""
PER_SOURCE = 2
"""Candidates at most from one mean map."""
SAME = 0.5
"""Two boxes of a class are one candidate if they share this part of the smaller box."""
MAX_CANDIDATES = 40


@dataclass(frozen=True, eq=False)
class Candidate:
    """A region that the maps of a class, or of one of its clusters, have in common."""

    model: ClassModel
    source: str
    """`class`, or `cluster N`."""
    box: tuple[int, int, int, int]
    """Left, top, right, bottom in cells of the 16 x 16 grid."""
    certainty: float
    """Standard errors between the class's and the others' mean map at the peak."""
    members: NDArray[np.intp]
    """Indices of the sampled maps that point there, in the sample's order, which is random."""
    share: float
    """Share of the class's sampled maps that are members."""
    density: float
    """Mean density in the box of the maps that the candidate came from, 1 for an even map."""
    elsewhere_density: float
    """Mean density in the box of other classes' maps."""

    @property
    def shares(self) -> tuple[float, float, float, float]:
        """The box as shares of the picture."""
        left, top, right, bottom = (edge / GRID for edge in self.box)
        return left, top, right, bottom


def densities(pooled_nhw: NDArray[np.uint8]) -> Floats:
    """Maps [n, 16, 16] divided by their own mean: 1 everywhere for an even map. A map of zeros counts as even."""
    maps = pooled_nhw.astype(np.float64)
    maps[~maps.any((1, 2))] = 1
    return maps / maps.mean((1, 2), keepdims=True)


def candidates(models: Sequence[ClassModel]) -> tuple[list[Candidate], int]:
    """The most certain candidates, at most `MAX_CANDIDATES`, and how many were left out. Needs two classes or more."""
    moments = [_moments(densities(model.sample.pooled)) for model in models]
    found: list[Candidate] = []
    for index, model in enumerate(models):
        others = _joined([own for other, own in enumerate(moments) if other != index])
        if others is not None and others.count >= MIN_MAPS:
            found += _class_candidates(model, others)
    found.sort(key=lambda one: (-one.certainty, one.model.sample.target_index, one.box))
    return found[:MAX_CANDIDATES], max(0, len(found) - MAX_CANDIDATES)


@dataclass(frozen=True, eq=False)
class _Moments:
    mean: Floats
    """[16, 16]"""
    error: Floats
    """[16, 16] squared standard error of the mean."""
    count: int


def _moments(maps: Floats) -> _Moments:
    return _Moments(maps.mean(0), maps.var(0) / max(1, len(maps) - 1), len(maps))


def _joined(parts: Sequence[_Moments]) -> _Moments | None:
    """The mean over classes, each with the same weight."""
    if not parts:
        return None
    mean, error = (np.mean([getattr(part, name) for part in parts], axis=0) for name in ("mean", "error"))
    return _Moments(mean, error / len(parts), sum(part.count for part in parts))


def _class_candidates(model: ClassModel, others: _Moments) -> list[Candidate]:
    """The candidates of the class's mean map and of each cluster's, each place once.

    A cluster's candidate replaces the class's if its density is `MORE` times as high: then only that part of the class
    points there.
    """
    every = np.arange(len(model.labels))
    kept = list(_from_maps("class", model, every, others))
    for number in range(model.num_clusters):
        for one in _from_maps(f"cluster {number}", model, np.flatnonzero(model.labels == number), others):
            same = [other for other in kept if _overlap(one.box, other.box) >= SAME]
            if all(other.source == "class" and one.density >= MORE * other.density for other in same):
                kept = [other for other in kept if other not in same] + [one]
    return kept


def _from_maps(source: str, model: ClassModel, own: NDArray[np.intp], others: _Moments) -> Iterator[Candidate]:
    """The candidates of these maps (indices `own`) of a class's sample."""
    if len(own) < MIN_MAPS:
        return
    maps = densities(model.sample.pooled)
    for box, certainty in _regions(_moments(maps[own]), others):
        density, elsewhere = _box_mean(maps, box), float(_box_mean(others.mean, box))
        members = own[density[own] >= max(EVEN, MORE * elsewhere)]
        if len(members) >= MIN_MAPS:
            share = len(members) / len(maps)
            yield Candidate(model, source, box, certainty, members, share, float(density[own].mean()), elsewhere)


def _box_mean(maps: Floats, box: Sequence[int]) -> Floats:
    """The mean of maps [..., 16, 16] over the box, [...]."""
    left, top, right, bottom = box
    return maps[..., top:bottom, left:right].mean((-2, -1))


def _regions(own: _Moments, others: _Moments) -> Iterator[tuple[tuple[int, int, int, int], float]]:
    """Yields boxes where the mean map exceeds the others' with certainty, and the standard errors at their peaks."""
    excess = own.mean - others.mean
    certainty = excess / np.sqrt(own.error + others.error + np.finfo(np.float64).eps)
    is_own = (certainty >= CERTAIN) & (own.mean >= np.maximum(EVEN, MORE * others.mean))
    remaining = np.where(is_own, excess, 0)
    for _ in range(PER_SOURCE):
        peak = divmod(int(remaining.argmax()), GRID)
        if remaining[peak] <= 0:
            return
        boxes = (_box_around(peak, remaining >= part * remaining[peak]) for part in PARTS_OF_PEAK)
        box = next((box for box in boxes if _area(box) <= MAX_AREA * GRID**2), None)
        if box is None:
            return  # the excess is about as strong over a large part of the picture
        yield box, float(certainty[peak])
        remaining[max(0, box[1] - RIM) : box[3] + RIM, max(0, box[0] - RIM) : box[2] + RIM] = 0


def _box_around(peak: tuple[int, int], region: NDArray[np.bool_]) -> tuple[int, int, int, int]:
    """The bounding box of the region's cells that are connected with the peak."""
    numbered = np.asarray(components(region)[0])  # pyright: ignore
    own = numbered == numbered[peak]
    rows, columns = np.flatnonzero(own.any(1)), np.flatnonzero(own.any(0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _overlap(one: Sequence[int], other: Sequence[int]) -> float:
    """The intersection of two boxes as a part of the smaller one, 0 to 1."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return max(0, width) * max(0, height) / min(_area(one), _area(other))


def _area(box: Sequence[int]) -> int:
    return (box[2] - box[0]) * (box[3] - box[1])
