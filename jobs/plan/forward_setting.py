"""The forward setting in a job's plan, read without importing torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field

from blocksight.engine.catalog.forward_setting import MAX_BATCH_SIZE, ForwardSetting
from blocksight.jobs.plan.documents import damaged, read_document
from blocksight.jobs.plan.plan import PLAN_FOLDER
from blocksight.storage.stores.store import MissingError, ObjectStore

FORWARD_KEY = f"{PLAN_FOLDER}forward.json"


@dataclass(frozen=True)
class PlannedForward:
    """The forward setting of all workers of a job; written once, before the first unit."""

    setting: ForwardSetting
    chosen: Literal["rule", "timing"] = "timing"
    """`timing`: another run of the same job may choose another setting. Always so before code version 4."""
    score_error: float | None = None
    """Median relative error of scores to eager float32, on drawn pictures; None: not finite, or not recorded."""
    bound: float | None = None
    """The largest error allowed."""
    probe: tuple[dict[str, Any], ...] = ()
    """The settings that were tried, the chosen one first; for people."""
    forwards_per_second: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Of the chosen setting where it was measured; None: not timed."""
    hardware: str | None = None
    """The GPU that it was chosen on; None: a CPU, or not recorded."""
    compute_capability: str | None = None
    """Of that GPU, such as `9.0`."""

    def __str__(self) -> str:
        error = "" if self.score_error is None else f", score error {self.score_error:.2g}"
        rate = f"; {self.rate_text}" if self.hardware is not None else ""
        return f"{self.setting} (chosen by {self.chosen}{error}{rate})"

    @property
    def rate_text(self) -> str:
        """The measured rate and the GPU, for people: `40,000 forwards/s on NVIDIA H200, compute capability 9.0`."""
        rate = "not timed" if self.forwards_per_second is None else f"{self.forwards_per_second:,.0f} forwards/s"
        return f"{rate} on {self.hardware}, compute capability {self.compute_capability}"


def planned_forward(output: ObjectStore) -> PlannedForward | None:
    """An output's forward setting; None if not chosen yet, or for a short job before code version 4 (eager float32).

    Raises StoreError, and UnreconciledError if it is damaged.
    """
    try:
        planned = read_document(output, FORWARD_KEY, PlannedForward)
    except MissingError:
        return None
    if not 1 <= planned.setting.batch_size <= MAX_BATCH_SIZE:  # memory grows with it
        raise damaged(output.uri, FORWARD_KEY, f"{planned.setting.batch_size} per pass is no batch size")
    return planned


def protocol_of(planned: PlannedForward | None) -> str:
    """Backend and precision, for people."""
    return "not recorded" if planned is None else planned.setting.protocol


def setting_difference(settings: Mapping[str, PlannedForward | None]) -> str | None:
    """A sentence if outputs, by name, have different backends or precisions; None if all are alike."""
    known = {name: protocol_of(one) for name, one in settings.items()}
    if len(set(known.values())) < 2:
        return None
    protocols = ", ".join(f"{name}: {how}" for name, how in known.items())
    return (
        f"forward passes were run differently ({protocols}): differences may come from that, and not from the methods"
    )
