"""The Ray Data pipeline: the in-process runner's three steps on CPU tasks and GPU actors."""

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data
from ray.data import ActorPoolStrategy, DataContext, Dataset, TaskPoolStrategy
from ray.data.exceptions import ExecutionTimeoutError
from ray.exceptions import RayError

from cluster.errors import ClusterError
from cluster.sizing import Sizing
from jobs.context import JobContext
from jobs.explain import ExplainStep
from jobs.plan import open_output, open_source
from jobs.records import Receipt, RecordFacts, Unit, UnitFailure, UnitInput, UnitResult
from jobs.unit import commit_unit, failed, read_unit
from storage.store import ObjectInfo
from storage.survey import Layout

WAVE_UNITS = 2_000
"""Units that one Ray Data execution holds: the driver's memory does not grow with the data set."""

NO_PROGRESS_SECONDS = 1_800
"""Without any finished step for so long the run stops: a silent hang is worse."""

HEADER = pa.schema([("header", pa.string()), ("blob", pa.large_binary()), ("failure", pa.string())])
"""What passes between the steps: plain values as JSON, pixels or maps as raw bytes, or why it failed."""


def run_units(
    units: Sequence[Unit], context: JobContext, state: bytes | None, sizing: Sizing
) -> Iterator[Receipt | UnitFailure]:
    """Runs the units on the connected Ray session and yields what became of each, as they finish.

    Raises ClusterError where the job itself cannot go on (a model that does not load on the workers, no
    progress).
    """
    _settle_ray_data()
    weights = None if state is None else ray.put(state)
    for start in range(0, len(units), WAVE_UNITS):
        wave = _wave(units[start : start + WAVE_UNITS], context, weights, sizing)
        try:
            for row in wave.iter_rows():
                yield _outcome(row)
        except (RayError, ExecutionTimeoutError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
            raise ClusterError(f"Ray gave the job up: {reason}; what is committed stays, run it again") from error


def _settle_ray_data() -> None:
    """Settings that the job stands on; they count for data sets made afterwards."""
    settings = DataContext.get_current()
    settings.enable_progress_bars = False
    settings.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # the job shows its own progress
    settings.max_errored_blocks = 0
    settings.max_consecutive_actor_init_deaths = 3
    settings.execution_no_progress_timeout_s = NO_PROGRESS_SECONDS


def _wave(units: Sequence[Unit], context: JobContext, weights: Any, sizing: Sizing) -> Dataset:
    rows = [{"unit": _json(unit)} for unit in units]
    step: dict[str, Any] = {"batch_size": 1, "batch_format": "pyarrow"}
    tasks = {**step, "compute": TaskPoolStrategy(), "num_cpus": sizing.cpus_per_task}
    return (
        ray.data.from_items(rows, override_num_blocks=len(rows))
        .map_batches(partial(_read, context=context), **tasks)
        .map_batches(
            _Explain,
            fn_constructor_kwargs={"context": context, "weights": weights},
            compute=ActorPoolStrategy(size=sizing.num_actors, max_tasks_in_flight_per_actor=1),
            num_cpus=sizing.cpus_per_actor,
            num_gpus=sizing.gpus_per_actor,
            **step,
        )
        .map_batches(partial(_commit, context=context), **tasks)
    )


def _read(batch: pa.Table, context: JobContext) -> pa.Table:
    unit = _unit(json.loads(batch["unit"][0].as_py()))

    def read() -> pa.Table:
        source, _ = open_source(context.config.data, context.config.endpoint_url)
        unit_input = read_unit(unit, source, context.config, context.facts.input_size)
        return _table(_json({"unit": unit, "records": unit_input.records}), unit_input.pixels)

    return _guarded(unit, "read", read)


class _Explain:
    """The actor: holds one model."""

    def __init__(self, context: JobContext, weights: Any) -> None:
        self.input_size = context.facts.input_size
        self.step = ExplainStep(context, None if weights is None else ray.get(weights))

    def __call__(self, batch: pa.Table) -> pa.Table:
        if batch["failure"][0].is_valid:
            return batch
        header = json.loads(batch["header"][0].as_py())
        unit = _unit(header["unit"])

        def explain() -> pa.Table:
            pixels = np.frombuffer(batch["blob"][0].as_buffer(), np.uint8).reshape(-1, *self.input_size, 3)
            records = tuple(RecordFacts(**record) for record in header["records"])
            return _result_table(self.step(UnitInput(unit, records, pixels)))

        return _guarded(unit, "explain", explain)


def _commit(batch: pa.Table, context: JobContext) -> pa.Table:
    if batch["failure"][0].is_valid:
        return batch
    header = json.loads(batch["header"][0].as_py())
    unit = _unit(header.pop("unit"))

    def commit() -> pa.Table:
        maps = np.frombuffer(batch["blob"][0].as_buffer(), np.float32).reshape(-1, *context.facts.input_size)
        remaining = iter(maps)
        rows = tuple({**row, "map": next(remaining) if "map" in row else None} for row in header.pop("rows"))
        receipt = commit_unit(UnitResult(unit, rows, **header), open_output(context.config), context.fingerprint)
        return _table(_json(receipt), None)

    return _guarded(unit, "commit", commit)


def _result_table(result: UnitResult) -> pa.Table:
    maps = [row["map"] for row in result.rows if row.get("map") is not None]
    rows = [{**row, "map": True} if row.get("map") is not None else row for row in result.rows]
    header = {
        "unit": result.unit,
        "rows": rows,
        "num_records": result.num_records,
        "explain_seconds": result.explain_seconds,
    }
    return _table(_json(header), np.stack(maps) if maps else None)


def _guarded(unit: Unit, stage: str, work: Callable[[], pa.Table]) -> pa.Table:
    """What the step made, or the note that this unit failed: the others go on."""
    try:
        return work()
    except Exception as error:  # noqa: BLE001 - a unit's trouble is its own
        return _row("", b"", _json(failed(unit, stage, error)))


def _table(header: str, blob: np.ndarray | None) -> pa.Table:
    return _row(header, b"" if blob is None else np.ascontiguousarray(blob).tobytes(), None)


def _row(header: str, blob: bytes, failure: str | None) -> pa.Table:
    return pa.Table.from_pylist([{"header": header, "blob": blob, "failure": failure}], schema=HEADER)


def _outcome(row: Mapping[str, Any]) -> Receipt | UnitFailure:
    if row["failure"] is not None:
        return UnitFailure(**json.loads(row["failure"]))
    return Receipt(**json.loads(row["header"]))


def _json(value: Any) -> str:
    """JSON of plain values and of the job's own records."""
    return json.dumps(value, default=asdict)


def _unit(values: Mapping[str, Any]) -> Unit:
    objects = tuple(ObjectInfo(**item) for item in values["objects"])
    return Unit(**{**values, "layout": Layout(values["layout"]), "objects": objects})
