"""Which maps another image has as well: 16 bytes a map, whatever their order."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from blocksight.jobs.plan.bootstrap import byte_hashes

Words = NDArray[np.uint64]

NOTHING = 0
"""Stands for a flat map, which equals none."""


class EqualMaps:
    """64-bit hashes of all maps and of the images they are of, in fixed places.

    Two maps are taken as equal where their stored bytes have one hash: among a million different ones some two agree
    by chance with a probability of 3e-8.
    """

    def __init__(self, num_maps: int) -> None:
        self.maps = np.zeros(num_maps, np.uint64)
        self.images = np.zeros(num_maps, np.uint64)

    def put(self, start: int, maps: Words, images: Words) -> None:
        """Hashes of maps (`NOTHING`: flat) and of their images, from a place on."""
        self.maps[start : start + len(maps)] = maps
        self.images[start : start + len(images)] = images

    def shared(self) -> Words:
        """Sorted hashes of the maps that more than one image has. Takes up to another 16 bytes a map."""
        ordered = np.sort(self.maps)
        repeated = np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
        chosen = contains(repeated[repeated != NOTHING], self.maps)
        pairs = np.unique(np.stack([self.maps[chosen], self.images[chosen]], axis=1), axis=0)
        hashes, num_images = np.unique(pairs[:, 0], return_counts=True)
        return hashes[num_images > 1]


def contains(ordered: Words, hashes: Words) -> NDArray[np.bool_]:
    """Which hashes stand among sorted ones."""
    if not len(ordered):
        return np.zeros(len(hashes), np.bool_)
    places = np.minimum(np.searchsorted(ordered, hashes), len(ordered) - 1)
    return ordered[places] == hashes


def map_hashes(maps: Sequence[bytes], is_flat: NDArray[np.bool_]) -> Words:
    """[N] hashes of stored maps; `NOTHING` where flat."""
    return np.where(is_flat, np.uint64(NOTHING), byte_hashes(maps))
