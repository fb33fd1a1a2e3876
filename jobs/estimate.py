"""A first estimate of forwards, time and bytes, before any model is loaded."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from engine.catalog import MODELS

BYTES_PER_MAP = 7_000
"""A 224 x 224 SISE map as 8-bit PNG with its row: 5.7 kB measured for the map (24 photographs), and the rest."""

UNKNOWN_FORWARDS = 1_000
"""Masked forwards of a record where nothing was measured for the model."""

ADA_MU = 0.28
"""The mu at which plain selection keeps as many maps of EfficientNet-Lite0 as Ada-SISE does (230)."""

CORE_FORWARDS_PER_SECOND = 35.0
"""EfficientNet-Lite0, float32, batch 8, one thread of a shared x86 core: the slow end of what was measured."""

GPU_FORWARDS_PER_SECOND = 2_000.0
"""A round guess for float32 without compilation; not measured."""


@dataclass(frozen=True)
class Estimate:
    """What a job will cost, roughly."""

    forwards_per_record: float
    is_measured: bool
    """The forwards were measured for this model; else they are a round guess."""
    bytes_per_record: int
    num_records: int

    forwards_per_second: float
    """Of one worker."""

    @property
    def seconds_per_record(self) -> float:
        """On one worker."""
        return self.forwards_per_record / self.forwards_per_second

    @property
    def num_forwards(self) -> int:
        return round(self.forwards_per_record * self.num_records)

    @property
    def num_bytes(self) -> int:
        return self.bytes_per_record * self.num_records

    def seconds(self, num_workers: int) -> float:
        """On so many workers."""
        return self.seconds_per_record * self.num_records / num_workers


def estimate(model: str, parameters: Any, num_records: int, num_targets: int, *, on_gpu: bool) -> Estimate:
    """Forwards from what was measured for the model at this mu; further targets double them at most.

    Constants alone, no measurement of this machine: the plan's units, and so the fragments, are the same
    wherever a job is planned for the same kind and number of workers.
    """
    entry = MODELS.get(model)
    measured = entry.forwards_by_mu if entry is not None else ()
    mus, counts = zip(*(measured or ((0.0, UNKNOWN_FORWARDS), (1.0, 0))), strict=True)
    one = float(np.interp(parameters.mu if parameters.selection == "mu" else ADA_MU, mus, counts))
    return Estimate(
        forwards_per_record=one * min(2, num_targets),
        is_measured=bool(measured),
        bytes_per_record=BYTES_PER_MAP * num_targets,
        num_records=num_records,
        forwards_per_second=GPU_FORWARDS_PER_SECOND if on_gpu else CORE_FORWARDS_PER_SECOND,
    )
