"""Finds maps that several images share, in 16 bytes of memory per map."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from blocksight.jobs.evaluate.bootstrap import byte_hashes

Words = NDArray[np.uint64]

NOTHING = 0
"""The hash of a flat map, which is equal to no other."""


class EqualMaps:
    """64-bit hashes of all maps and of their images, each at a fixed index.

    Two maps count as equal if their stored bytes have the same hash. Among a million different maps the probability
    of an equal pair by chance is 3e-8.
    """

    def __init__(self, num_maps: int) -> None:
        self.maps = np.zeros(num_maps, np.uint64)
        self.images = np.zeros(num_maps, np.uint64)

    def put(self, start: int, maps: Words, images: Words) -> None:
        """Stores hashes of maps (`NOTHING`: flat) and of their images from index `start` on."""
        self.maps[start : start + len(maps)] = maps
        self.images[start : start + len(images)] = images

    def shared(self) -> Words:
        """Sorted hashes of the maps that several images share. Needs up to 16 more bytes per map."""
        ordered = np.sort(self.maps)
        repeated = np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
        chosen = contains(repeated[repeated != NOTHING], self.maps)
        pairs = np.unique(np.stack([self.maps[chosen], self.images[chosen]], axis=1), axis=0)
        hashes, num_images = np.unique(pairs[:, 0], return_counts=True)
        return hashes[num_images > 1]


def contains(ordered: Words, hashes: Words) -> NDArray[np.bool_]:
    """[N] whether each of `hashes` is in `ordered`, which is sorted."""
    if not len(ordered):
        return np.zeros(len(hashes), np.bool_)
    indices = np.minimum(np.searchsorted(ordered, hashes), len(ordered) - 1)
    return ordered[indices] == hashes


def map_hashes(maps: Sequence[bytes], is_flat: NDArray[np.bool_]) -> Words:
    """[N] hashes of stored maps; `NOTHING` for flat ones."""
    return np.where(is_flat, np.uint64(NOTHING), byte_hashes(maps))
