"""The metrics of a run: their names, kinds and labels, and the values that a label may have.

A label never holds a key, a file's name or a class: each of its values costs memory wherever metrics are collected.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from blocksight.storage.outputs.schema import OK, REJECTED
from blocksight.storage.rejects import RejectCode

COUNTER, GAUGE, HISTOGRAM = "counter", "gauge", "histogram"

STAGES = ("read", "decode", "explain", "encode", "commit")
VERBS = ("read", "head", "list", "create", "put", "delete")
OUTCOMES = ("ok", "exists", "missing", "changed", "unavailable", "refused", "interrupted")
"""Of a request to a store; `unavailable` is an answer such as 503 or 429, or none at all; `interrupted`
a call that a signal ended before its answer."""
OTHER = "other"
"""A reject code that this version does not know: a fragment of another one was found and adopted."""
STATES = ("open", "committed", "failed", "dead")
SECONDS = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1_800.0, 3_600.0)
"""Bounds of a histogram's buckets: a unit is cut to take some minutes."""


@dataclass(frozen=True)
class Metric:
    """One metric."""

    kind: Literal["counter", "gauge", "histogram"]
    about: str
    labels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """The values that each label may have."""


METRICS = {
    "blocksight_records_total": Metric(COUNTER, "records that were committed", {"status": (OK, REJECTED)}),
    "blocksight_forwards_total": Metric(COUNTER, "masked forward passes of committed units"),
    "blocksight_rejects_total": Metric(COUNTER, "records without a map, by reason", {"code": (*RejectCode, OTHER)}),
    "blocksight_unit_seconds": Metric(HISTOGRAM, "seconds of work in a committed unit, all stages together"),
    "blocksight_stage_seconds_total": Metric(
        COUNTER, "seconds of work in each stage, over all workers", {"stage": STAGES}
    ),
    "blocksight_store_requests_total": Metric(
        COUNTER, "calls to the stores since units are worked on", {"verb": VERBS, "outcome": OUTCOMES}
    ),
    "blocksight_units": Metric(GAUGE, "units of this run, by state", {"state": STATES}),
    "blocksight_gpu_busy_ratio": Metric(
        GAUGE,
        "share of the workers' time spent in the explain stage, 0 to 1, which is not a GPU's own load; "
        "a worker has a GPU, or a CPU core",
    ),
}
"""By name."""
