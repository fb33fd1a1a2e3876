"""A first estimate of forwards, time and bytes, before any model is loaded."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from engine.catalog import MODELS

BYTES_PER_MAP = 7_000
"""A 224 x 224 SISE map as 8-bit PNG with its row: 5.7 kB measured for the map (24 photographs), and the rest."""

UNKNOWN_FORWARDS = 1_000
"""Masked forwards of a record where nothing was measured for the model."""

ADA_MU = 0.3
"""The mu at which plain selection keeps about as many maps as Ada-SISE does."""

CORE_FORWARDS_PER_SECOND = 35.0
"""EfficientNet-Lite0, float32, batch 8, one thread of a shared x86 core: the slow end of what was measured."""


@dataclass(frozen=True)
class Estimate:
    """What a job will cost, roughly."""

    forwards_per_record: float
    is_measured: bool
    """The forwards were measured for this model; else they are a round guess."""
    bytes_per_record: int
    num_records: int

    @property
    def seconds_per_record(self) -> float:
        """On one CPU core."""
        return self.forwards_per_record / CORE_FORWARDS_PER_SECOND

    @property
    def num_forwards(self) -> int:
        return round(self.forwards_per_record * self.num_records)

    @property
    def num_bytes(self) -> int:
        return self.bytes_per_record * self.num_records

    def seconds(self, num_workers: int) -> float:
        """On so many CPU cores."""
        return self.seconds_per_record * self.num_records / num_workers


def estimate(model: str, parameters: Any, num_records: int, num_targets: int) -> Estimate:
    """Forwards from what was measured for the model at this mu; a second target doubles them at most."""
    entry = MODELS.get(model)
    measured = entry.forwards_by_mu if entry is not None else ()
    if not measured:
        return Estimate(UNKNOWN_FORWARDS * min(2, num_targets), False, BYTES_PER_MAP * num_targets, num_records)
    mus, counts = zip(*measured, strict=True)
    one = float(np.interp(parameters.mu if parameters.selection == "mu" else ADA_MU, mus, counts))
    return Estimate(one * min(2, num_targets), True, BYTES_PER_MAP * num_targets, num_records)
