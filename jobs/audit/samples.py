"""Draws a random sample of each explained class's maps, which does not depend on the order of the maps."""

import hashlib
from bisect import insort
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from blocksight.jobs.audit.result import GRID
from blocksight.jobs.evaluate.bootstrap import key_hashes

MAX_OF_CLASS = 256
MAX_OF_ALL = 100_000
"""Most maps in memory, of one class and of all; with more classes than `MAX_OF_ALL`, none has a sample."""


def target_number(target_index: int | None, target: str) -> int:
    """The class, or a number below 0 for a target that is no class: of its text alone."""
    if target_index is not None:
        return target_index
    return -1 - int.from_bytes(hashlib.sha256(target.encode()).digest()[:4], "big")


@dataclass(frozen=True, eq=False)
class Sample:
    """N maps of one explained class, or of one other target, in the order of their hashes, without flat ones."""

    target_index: int
    """The class, or `target_number` of another target."""
    target_name: str
    """Of another target its text."""
    keys: tuple[str, ...]
    pooled: NDArray[np.uint8]
    """[N, GRID, GRID]."""
    scores: NDArray[np.float64]
    """[N] scores of the target."""
    labels: tuple[str | None, ...]
    """Label names as the data set writes them."""
    is_right: NDArray[np.bool_]
    """[N]: the target is the prediction and the label; false if no label is known."""

    @property
    def is_of_class(self) -> bool:
        """True for the maps of a class."""
        return self.target_index >= 0


@dataclass(frozen=True, order=True)
class Candidate:
    """A map that may be part of its class's sample, ordered by hash."""

    hashed: int
    key: str
    score: float = field(compare=False)
    label: str | None = field(compare=False)
    is_right: bool = field(compare=False)
    pooled: bytes = field(compare=False)
    """GRID * GRID bytes."""


class Sampler:
    """Samples the maps with the smallest hashes of seed, key and class, in any order and any parts."""

    def __init__(self, seed: int, num_classes: int) -> None:
        self.seed = seed
        self.size = min(MAX_OF_CLASS, MAX_OF_ALL // max(1, num_classes))
        self._names: dict[int, str] = {}
        self._held: dict[int, list[Candidate]] = {}

    def hashes(self, keys: Sequence[str], targets: Sequence[int]) -> list[int]:
        """The hashes of maps, given the keys of their records and their classes."""
        named = [f"{self.seed}/{target}/{key}" for key, target in zip(keys, targets, strict=True)]
        return key_hashes(named).tolist()

    def wants(self, target_index: int, hashed: int) -> bool:
        """Whether a map with this hash may still be part of the sample."""
        held = self._held.get(target_index, [])
        return len(held) < self.size or (self.size > 0 and hashed <= held[-1].hashed)

    def add(self, target_index: int, target_name: str, candidate: Candidate) -> None:
        """Adds a map, and drops the one with the largest hash if its class has too many."""
        self._names[target_index] = target_name
        held = self._held.setdefault(target_index, [])
        insort(held, candidate)
        del held[self.size :]

    def samples(self) -> Mapping[int, Sample]:
        """The samples by class, in order, then those of other targets."""
        return {
            target: _sample(target, self._names[target], held)
            for target, held in sorted(self._held.items(), key=lambda item: (item[0] < 0, item[0]))
        }


def _sample(target_index: int, target_name: str, held: Sequence[Candidate]) -> Sample:
    return Sample(
        target_index,
        target_name,
        keys=tuple(one.key for one in held),
        pooled=np.frombuffer(b"".join(one.pooled for one in held), np.uint8).reshape(-1, GRID, GRID),
        scores=np.array([one.score for one in held], np.float64),
        labels=tuple(one.label for one in held),
        is_right=np.array([one.is_right for one in held], np.bool_),
    )
