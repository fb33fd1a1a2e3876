"""An attempt: one try of a step at a unit. Its marker remains if the process dies."""

import json
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TypeVar

from blocksight.jobs.ledger.attempt_markers import FOLDER
from blocksight.jobs.ledger.dead_letters import give_up
from blocksight.jobs.ledger.stop_request import is_stopped
from blocksight.jobs.plan.context import JobContext, worker_name
from blocksight.jobs.plan.plan import UNIT_FOLDERS, open_output
from blocksight.jobs.plan.records import Cause, Outcome, Unit, UnitFailure, UnitSkipped
from blocksight.jobs.worker.error_classes import OF_THE_JOB, is_of_unit
from blocksight.jobs.worker.isolation import ProcessDiedError
from blocksight.jobs.worker.watchdog import heartbeat, watchdog
from blocksight.storage.outputs.schema import MAX_ERROR_LENGTH
from blocksight.storage.stores.opening import open_named
from blocksight.storage.stores.retrying import PATIENCE_SECONDS, PatientStore
from blocksight.storage.stores.store import (
    ChangedError,
    DamagedError,
    MissingError,
    ObjectError,
    ObjectStore,
    OutputError,
    StoreError,
    UnavailableError,
)

CAREFUL_DEATHS = 2
"""After so many deaths in a step it works on its records one by one, in a child process."""
MAX_DEATHS = 12
"""After so many the unit is given up. A record that kills its process needs four at most (two here, two in the child
process), but processes die of other causes too."""

MAX_FAILURES = 3
"""Tries of a step that fails: a normal one and two careful ones."""

CAUSES = {
    MissingError: Cause.INPUT_MISSING,
    ChangedError: Cause.INPUT_CHANGED,
    ObjectError: Cause.INPUT_UNREADABLE,
    DamagedError: Cause.CONTAINER_CORRUPT,
}

Result = TypeVar("Result")


@dataclass(frozen=True)
class WorkerStores:
    """The stores that a worker's steps use, and the run."""

    source: ObjectStore
    output: ObjectStore
    run_id: str


def open_worker_stores(context: JobContext) -> WorkerStores:
    """Input and output, which retry while a store does not answer."""
    source, _ = open_named(context.config.data, context.config.endpoint_url, wait_seconds=PATIENCE_SECONDS)
    output = open_output(context.config)
    patient = PatientStore(source, waiting=heartbeat, witnesses=context.witnesses)
    return WorkerStores(patient, PatientStore(output, waiting=heartbeat, unit_folders=UNIT_FOLDERS), context.run_id)


def attempted(unit: Unit, stage: str, stores: WorkerStores, work: Callable[[bool], Result]) -> Result | Outcome:
    """The step's result, or the unit's outcome if there is none; never raises an Exception.

    `work` receives `careful`: if True, one record must not fail the whole unit. A step that fails is tried again at
    once, carefully. If it fails each time the unit is given up, or stays open if the machine or the store is to
    blame.
    """
    failures = 0
    while True:
        try:
            return _once(unit, stage, stores, work, failures)
        except Exception as error:  # noqa: BLE001 - a unit's trouble is its own: the others go on
            failures += 1
            if failures == MAX_FAILURES or not _is_worth_a_careful_try(error):
                return _outcome_of_error(unit, stage, stores, error)


def _once(
    unit: Unit, stage: str, stores: WorkerStores, work: Callable[[bool], Result], failures: int
) -> Result | Outcome:
    """One attempt at the step. Raises as `work`."""
    if stage != "commit" and is_stopped(stores.output, stores.run_id):  # an explained unit is still committed
        return UnitSkipped(unit.unit_id)
    with attempt_marker(stores, f"{unit.unit_id}/{stage}") as num_deaths, watchdog():
        if num_deaths >= MAX_DEATHS:
            return give_up(stores.output, unit, stage, Cause.POISON, f"{num_deaths} processes died in it")
        return work(num_deaths >= CAREFUL_DEATHS or failures > 0)


def _is_worth_a_careful_try(error: Exception) -> bool:
    """True if a careful try may help; stores have retried already, and the job's errors repeat."""
    return not isinstance(error, (StoreError, ProcessDiedError, *OF_THE_JOB))


@contextmanager
def attempt_marker(stores: WorkerStores, step: str) -> Iterator[int]:
    """Yields the number of attempts at a step that left a marker; writes its own marker while the body runs."""
    prefix = f"{FOLDER}{step}-"
    num_deaths = sum(1 for _ in stores.output.list(prefix))
    marker = f"{prefix}{stores.run_id}-{uuid.uuid4().hex}.json"
    stores.output.put(marker, json.dumps({"worker": worker_name()}).encode())
    try:
        yield num_deaths
    finally:
        with suppress(StoreError):  # a marker that remains makes the next attempt careful, no more
            stores.output.delete(marker)


def _outcome_of_error(unit: Unit, stage: str, stores: WorkerStores, error: Exception) -> Outcome:
    """Gives the unit up if it is to blame; otherwise it stays open."""
    cause = _cause(stage, error)
    text = str(error) if isinstance(error, StoreError | ProcessDiedError) else f"{type(error).__name__}: {error}"
    if cause is not None:
        try:
            return give_up(stores.output, unit, stage, cause, text)
        except Exception as trouble:  # noqa: BLE001 - as above
            error, text = trouble, str(trouble)
    away = isinstance(error, UnavailableError)
    return UnitFailure(unit.unit_id, unit.ordinal, unit.objects[0].key, stage, text[:MAX_ERROR_LENGTH], away)


def _cause(stage: str, error: Exception) -> Cause | None:
    """Why the unit is given up; None: the store, the machine or the model is to blame."""
    if isinstance(error, ProcessDiedError):
        return Cause.POISON
    if isinstance(error, OutputError):
        return Cause.OUTPUT_UNWRITABLE
    if isinstance(error, StoreError):
        return CAUSES.get(type(error)) if stage == "read" else None
    return Cause.FAILED if is_of_unit(error) else None
