"""A first estimate of forwards, time and bytes, before any model is loaded."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from engine.catalog import EXPLAINERS, MODELS, SiseParameters
from jobs.config import JobConfig

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
    """The forwards are known of the explainer, or were measured for this model; else they are a round guess."""
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


def estimate(config: JobConfig, num_records: int, *, on_gpu: bool) -> Estimate:
    """Forwards from what the explainer is known to cost, or was measured to for the model.

    Constants alone, no measurement of this machine: the plan's units, and so the fragments, are the same
    wherever a job is planned for the same kind and number of workers.
    """
    num_targets = config.target_choice.count
    known = EXPLAINERS[config.explainer].num_forwards
    measured = MODELS[config.model].forwards_by_mu if config.model in MODELS else ()
    parameters = config.explainer_parameters()
    if known is not None:
        forwards = float(known(parameters, num_targets))
    elif isinstance(parameters, SiseParameters):
        forwards = _sise_forwards(parameters, measured) * min(2, num_targets)
    else:
        forwards, measured = float(UNKNOWN_FORWARDS), ()
    return Estimate(
        forwards_per_record=forwards,
        is_measured=known is not None or bool(measured),
        bytes_per_record=BYTES_PER_MAP * num_targets,
        num_records=num_records,
        forwards_per_second=GPU_FORWARDS_PER_SECOND if on_gpu else CORE_FORWARDS_PER_SECOND,
    )


def _sise_forwards(parameters: SiseParameters, measured: Sequence[tuple[float, int]]) -> float:
    """Masked forwards of a record at this mu; further targets double them at most."""
    mus, counts = zip(*(measured or ((0.0, UNKNOWN_FORWARDS), (1.0, 0))), strict=True)
    return float(np.interp(parameters.mu if parameters.selection == "mu" else ADA_MU, mus, counts))
