"""Estimates a job's forwards, time and bytes before a model is loaded."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from pydantic import Field

from blocksight.engine.catalog.composition import num_forwards
from blocksight.engine.catalog.entries import MODELS
from blocksight.engine.catalog.parameters import SiseParameters
from blocksight.jobs.plan.config import JobConfig

ROW_BYTES = 1_300
"""Of a row without its map."""

BYTES_PER_MAP = 5_700 + ROW_BYTES
"""A 224 x 224 SISE map as 8-bit PNG, measured on 24 photographs, with its row."""

UNKNOWN_FORWARDS = 1_000
"""Masked forwards of a record, if nothing was measured for the model."""

ADA_MU = 0.28
"""The mu at which plain selection keeps as many maps of EfficientNet-Lite0 as Ada-SISE does (230)."""

AUTO_SHARE = 0.17
"""Fraction of EfficientNet-Lite0's masks that a budget of `auto` scored on average (12 photographs)."""

AUTO_FULL_SHARE = 0.55
"""Fraction of the records with all masks scored at a fidelity of `auto`: of 200 labelled photographs 43 % were wrong
or uncertain for EfficientNet-Lite0, and a fifth of 24 others had a poor map."""

CORE_FORWARDS_PER_SECOND = 35.0
"""EfficientNet-Lite0, float32, batch 8, one thread of a shared x86 core: the slow end of what was measured."""

GPU_FORWARDS_PER_SECOND = 2_000.0
"""A round guess for float32 without compilation; not measured."""

HOST_SECONDS = 0.004
"""CPU time of a record beside the model: decoding, selecting, coding the map. A fast GPU waits for it."""

SIDE = 224
"""Of a decoded image and its map, if the model's input size is not known before it is loaded."""


@dataclass(frozen=True)
class MeasuredRate:
    """What one worker was measured to do before a plan was cut; its units' sizes come from it."""

    seconds_per_record: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    source: str
    """How and where it was measured, for people."""

    def __str__(self) -> str:
        return f"{self.seconds_per_record:.3g} s a record ({self.source})"


@dataclass(frozen=True)
class Estimate:
    """The estimated cost of a job."""

    forwards_per_record: float
    is_measured: bool
    """The explainer's forwards are known, or were measured for this model; otherwise they are a guess."""
    basis: str
    """Where the forwards come from, for people."""
    bytes_per_record: int
    num_records: int

    forwards_per_second: float
    """Of one worker."""

    @property
    def seconds_per_record(self) -> float:
        """On one worker."""
        return self.forwards_per_record / self.forwards_per_second + HOST_SECONDS

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
    """Forwards from the explainer's known cost, or from measurements for the model; rates are constants."""
    num_targets = config.target_choice.most_targets * (2 if config.signed else 1)
    measured = MODELS[config.model].forwards_by_mu if config.model in MODELS else ()
    parameters = config.explainer_parameters()
    known = num_forwards(config.method, parameters, num_targets)
    if known is not None:
        forwards = known
    elif isinstance(parameters, SiseParameters):
        forwards = _completed(parameters, _sise_forwards(parameters, measured) * min(2, num_targets))
        measured = measured if parameters.complete_above is None else ()
    else:
        forwards, measured = float(UNKNOWN_FORWARDS), ()
    return Estimate(
        forwards_per_record=forwards,
        is_measured=known is not None or bool(measured),
        basis=_basis(is_known=known is not None, is_measured=bool(measured)),
        bytes_per_record=BYTES_PER_MAP * num_targets,
        num_records=num_records,
        forwards_per_second=GPU_FORWARDS_PER_SECOND if on_gpu else CORE_FORWARDS_PER_SECOND,
    )


def _basis(*, is_known: bool, is_measured: bool) -> str:
    if is_known:
        return "by its parameters, passes of a part of the network left out"
    return "measured on photographs" if is_measured else "a guess: not measured for this model"


def _sise_forwards(parameters: SiseParameters, measured: Sequence[tuple[float, int]]) -> float:
    """Masked forwards of a record at this mu, for one target."""
    mus, counts = zip(*(measured or ((0.0, UNKNOWN_FORWARDS), (1.0, 0))), strict=True)
    return float(np.interp(parameters.mu if parameters.selection == "mu" else ADA_MU, mus, counts))


def _completed(parameters: SiseParameters, forwards: float) -> float:
    """The average forwards, if some records get all of them."""
    budgeted = _budgeted(parameters, forwards)
    return budgeted if parameters.complete_above is None else budgeted + AUTO_FULL_SHARE * (forwards - budgeted)


def _budgeted(parameters: SiseParameters, forwards: float) -> float:
    """The forwards within the budget; at least 1, the gradient pass."""
    budget = parameters.budget
    if budget is None:
        return forwards
    if isinstance(budget, int):
        return max(1.0, min(float(budget), forwards))
    return forwards * (AUTO_SHARE if budget == "auto" else budget)
