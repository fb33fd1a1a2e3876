"""Candidates for shortcuts: regions of the picture to which one class's maps point and other classes' do not."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import label as components

from blocksight.jobs.audit.clusters import ClassModel
from blocksight.jobs.audit.result import GRID

Floats = NDArray[np.float64]

MIN_MAPS = 10
"""Of a class or cluster, and of all other classes together."""
EVEN = 1.0
"""Density of an even map. A map looks at a region if it lies there more densely, and more than others' by `MORE`."""
CERTAIN = 5.0
"""Standard errors by which a class's mean map must exceed the others' where a candidate is."""
MORE = 1.5
"""At least so many times as densely as the other classes' maps: less is no place of the class's own."""
PARTS_OF_PEAK = (0.5, 0.65, 0.8, 0.9, 0.97)
"""A candidate is where the excess is at least this part of its peak: half, as a blurred spot is measured, or more where
that were too large, as it is of maps with few cells."""
MOST_AREA = 0.25
"""Of the picture: a larger region is no particular place."""
RIM = 2
"""Cells around a candidate that are no other one: maps are blurred."""
PER_SOURCE = 2
SAME = 0.5
"""Part of the smaller of two boxes of a class that the other holds: from there on they are one candidate."""
MOST_CANDIDATES = 40


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
    """Places in the class's sample of maps that look there, in its order, which is random."""
    share: float
    """Of the class's sampled maps."""
    density: float
    """Mean density in the box of the maps that the candidate came from, 1 for an even map."""
    elsewhere_density: float
    """Of other classes' maps."""

    @property
    def shares(self) -> tuple[float, float, float, float]:
        """The box as shares of the picture."""
        left, top, right, bottom = (edge / GRID for edge in self.box)
        return left, top, right, bottom


def densities(pooled_nhw: NDArray[np.uint8]) -> Floats:
    """Maps [n, 16, 16] over their own mean: 1 everywhere for an even map; zeros are taken as even."""
    maps = pooled_nhw.astype(np.float64)
    maps[~maps.any((1, 2))] = 1
    return maps / maps.mean((1, 2), keepdims=True)


def candidates(models: Sequence[ClassModel]) -> tuple[list[Candidate], int]:
    """The most certain candidates, and how many more there were. Two classes at least are needed."""
    moments = [_moments(densities(model.sample.pooled)) for model in models]
    found: list[Candidate] = []
    for place, model in enumerate(models):
        others = _joined([own for index, own in enumerate(moments) if index != place])
        if others is not None and others.count >= MIN_MAPS:
            found += _of_class(model, others)
    found.sort(key=lambda one: (-one.certainty, one.model.sample.target_index, one.box))
    return found[:MOST_CANDIDATES], max(0, len(found) - MOST_CANDIDATES)


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
    """The mean over classes, each of which counts alike."""
    if not parts:
        return None
    mean, error = (np.mean([getattr(part, name) for part in parts], axis=0) for name in ("mean", "error"))
    return _Moments(mean, error / len(parts), sum(part.count for part in parts))


def _of_class(model: ClassModel, others: _Moments) -> list[Candidate]:
    """Those of the class's mean map and of each cluster's; one place once.

    A cluster's counts where it lies there much more densely than the class as a whole: then only a part of the class
    looks there, and the cluster knows which.
    """
    every = np.arange(len(model.labels))
    kept = list(_from("class", model, every, others))
    for number in range(model.num_clusters):
        for one in _from(f"cluster {number}", model, np.flatnonzero(model.labels == number), others):
            same = [other for other in kept if _overlap(one.box, other.box) >= SAME]
            if all(other.source == "class" and one.density >= MORE * other.density for other in same):
                kept = [other for other in kept if other not in same] + [one]
    return kept


def _from(source: str, model: ClassModel, own: NDArray[np.intp], others: _Moments) -> Iterator[Candidate]:
    """The candidates of some maps of a class's sample."""
    if len(own) < MIN_MAPS:
        return
    maps = densities(model.sample.pooled)
    for box, certainty in _regions(_moments(maps[own]), others):
        density, elsewhere = _mean(maps, box), float(_mean(others.mean, box))
        members = own[density[own] >= max(EVEN, MORE * elsewhere)]
        if len(members) >= MIN_MAPS:
            share = len(members) / len(maps)
            yield Candidate(model, source, box, certainty, members, share, float(density[own].mean()), elsewhere)


def _mean(maps: Floats, box: Sequence[int]) -> Floats:
    """Of maps [..., 16, 16] over the box, [...]."""
    left, top, right, bottom = box
    return maps[..., top:bottom, left:right].mean((-2, -1))


def _regions(own: _Moments, others: _Moments) -> Iterator[tuple[tuple[int, int, int, int], float]]:
    """Boxes where the mean map certainly exceeds the others', and by how many standard errors at their peaks."""
    excess = own.mean - others.mean
    certainty = excess / np.sqrt(own.error + others.error + np.finfo(np.float64).eps)
    is_own = (certainty >= CERTAIN) & (own.mean >= np.maximum(EVEN, MORE * others.mean))
    left = np.where(is_own, excess, 0)
    for _ in range(PER_SOURCE):
        peak = divmod(int(left.argmax()), GRID)
        if left[peak] <= 0:
            return
        boxes = (_box_around(peak, left >= part * left[peak]) for part in PARTS_OF_PEAK)
        box = next((box for box in boxes if _area(box) <= MOST_AREA * GRID**2), None)
        if box is None:
            return  # as strong over a large part of the picture
        yield box, float(certainty[peak])
        left[max(0, box[1] - RIM) : box[3] + RIM, max(0, box[0] - RIM) : box[2] + RIM] = 0


def _box_around(peak: tuple[int, int], region: NDArray[np.bool_]) -> tuple[int, int, int, int]:
    """Of the cells of the region that hang together with the peak."""
    numbered = np.asarray(components(region)[0])  # pyright: ignore
    own = numbered == numbered[peak]
    rows, columns = np.flatnonzero(own.any(1)), np.flatnonzero(own.any(0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _overlap(one: Sequence[int], other: Sequence[int]) -> float:
    """The part of the smaller box that the other holds."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return max(0, width) * max(0, height) / min(_area(one), _area(other))


def _area(box: Sequence[int]) -> int:
    return (box[2] - box[0]) * (box[3] - box[1])
