"""An attempt: one try at a unit, whose steps are tried again if they fail. Its marker tells if the process dies."""

import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TypeVar

from blocksight.engine.model.device_errors import DeviceTrouble, device_trouble, told_by_device
from blocksight.jobs.ledger.attempt_markers import Attempt, Marker, begun, end, job_step_begun, step_begun, withdraw
from blocksight.jobs.ledger.dead_letters import give_up
from blocksight.jobs.ledger.stop_request import is_stopped
from blocksight.jobs.observe.counted_store import CountedStore
from blocksight.jobs.observe.stages import timed
from blocksight.jobs.plan.context import JobContext, worker_name
from blocksight.jobs.plan.plan import UNIT_FOLDERS, open_output
from blocksight.jobs.plan.records import Cause, DeadLetter, Outcome, Unit, UnitFailure, UnitReturned, UnitSkipped
from blocksight.jobs.worker.error_classes import OF_THE_JOB, UnfitWorkerError, is_of_unit
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
"""After so many deaths a unit's records are worked on one by one, in a child process."""
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
    clock: Callable[[], float] = time.time
    """Seconds since 1970, for the markers."""

    def marker(self) -> Marker:
        """A new marker of this process."""
        return Marker(self.run_id, worker_name(), self.clock(), uuid.uuid4().hex)


def open_worker_stores(context: JobContext) -> WorkerStores:
    """Input and output, which retry while a store does not answer."""
    source, _ = open_named(context.config.data, context.config.endpoint_url, wait_seconds=PATIENCE_SECONDS)
    output = open_output(context.config)
    patient = PatientStore(CountedStore(_plain(source)), waiting=heartbeat, witnesses=context.witnesses)
    written = PatientStore(CountedStore(_plain(output)), waiting=heartbeat, unit_folders=UNIT_FOLDERS)
    return WorkerStores(patient, written, context.run_id)


def _plain(store: ObjectStore) -> ObjectStore:
    """The store without what repeats its calls."""
    return store.store if isinstance(store, PatientStore) else store


def begin(unit: Unit, stores: WorkerStores) -> Attempt | Outcome:
    """A new attempt at the unit, or its outcome if none may begin. Never raises an Exception."""
    return _begun(unit, "read", stores, lambda: _taken_unit(unit, stores))


def go_on(unit: Unit, stage: str, stores: WorkerStores, attempt: Attempt) -> Attempt | Outcome:
    """The attempt, with a marker of a step in this process, or the unit's outcome. Never raises an Exception."""
    return _begun(unit, stage, stores, lambda: step_begun(stores.output, attempt, stage, stores.marker()))


def _taken_unit(unit: Unit, stores: WorkerStores) -> Attempt | UnitSkipped:
    if is_stopped(stores.output, stores.run_id):
        return UnitSkipped(unit.unit_id)
    return begun(stores.output, unit.unit_id, stores.marker())


def _begun(
    unit: Unit, stage: str, stores: WorkerStores, take: Callable[[], Attempt | UnitSkipped]
) -> Attempt | Outcome:
    """The attempt; the unit is given up if it has killed too many processes."""
    try:
        attempt = take()
        if isinstance(attempt, Attempt) and attempt.num_deaths >= MAX_DEATHS:
            died = f"{attempt.num_deaths} processes died in it"
            return give_up(stores.output, unit, stage, Cause.POISON, died)
    except Exception as error:  # noqa: BLE001 - a unit's trouble is its own: the others go on
        return _outcome_of_error(unit, stage, stores, error)
    return attempt


def attempted(
    unit: Unit, stage: str, stores: WorkerStores, attempt: Attempt | Outcome, work: Callable[[bool], Result]
) -> Result | Outcome:
    """The step's result, or the unit's outcome if there is none; never raises an Exception.

    `attempt` is of `begin` or `go_on`; an outcome is passed on. `work` receives `careful`: if True, one record must not
    fail the whole unit. A step that fails is tried again at once, carefully. If it fails each time the unit is given
    up, or stays open if the machine or the store is to blame. A unit is returned at once if this worker can do no
    unit, or none any more. Without a result the attempt is marked as ended, unless the device was lost: a record may
    be the cause.
    """
    if not isinstance(attempt, Attempt):
        return attempt
    try:
        made = _tried(unit, stage, stores, attempt, work)
    except BaseException:  # a second signal
        end(stores.output, attempt, stores.marker())
        raise
    if isinstance(made, DeadLetter | UnitFailure | UnitSkipped) or (isinstance(made, UnitReturned) and made.is_unfit):
        end(stores.output, attempt, stores.marker())
    return made


def _tried(
    unit: Unit, stage: str, stores: WorkerStores, attempt: Attempt, work: Callable[[bool], Result]
) -> Result | Outcome:
    failures = 0
    while True:
        try:
            if stage == "explain" and is_stopped(stores.output, stores.run_id):  # what is explained is still committed
                return UnitSkipped(unit.unit_id)
            with watchdog(), timed("explain") if stage == "explain" else nullcontext():  # the others time their parts
                return work(attempt.num_deaths >= CAREFUL_DEATHS or failures > 0)
        except Exception as error:  # noqa: BLE001 - as above
            if is_of_worker(error):
                return returned(unit, error)
            failures += 1
            if failures == MAX_FAILURES or not _is_worth_a_careful_try(error):
                return _outcome_of_error(unit, stage, stores, error)


def _is_worth_a_careful_try(error: Exception) -> bool:
    """True if a careful try may help.

    Stores have retried already, the job's errors repeat, and a child process needs even more of the device's memory.
    """
    if isinstance(error, (StoreError, ProcessDiedError, *OF_THE_JOB)):
        return False
    return device_trouble(error) is not DeviceTrouble.MEMORY


def is_of_worker(error: Exception) -> bool:
    """True if this worker can do no unit, or none any more."""
    return isinstance(error, UnfitWorkerError) or device_trouble(error) in (DeviceTrouble.UNFIT, DeviceTrouble.LOST)


def returned(unit: Unit, error: Exception) -> UnitReturned:
    """The outcome of a unit that this worker gives back; for an error of the worker."""
    reason = str(error) if isinstance(error, UnfitWorkerError) else told_by_device(error)
    return UnitReturned(unit.unit_id, worker_name(), reason[:MAX_ERROR_LENGTH], is_unfit=not _is_lost(error))


def done_here(outcome: Result | UnitReturned) -> Result:
    """The outcome of a unit in this process, which is the only worker: raises UnfitWorkerError if it is returned."""
    if isinstance(outcome, UnitReturned):
        raise UnfitWorkerError(f"{outcome.worker} can do no unit: {outcome.reason}")
    return outcome


def _is_lost(error: BaseException) -> bool:
    """True if this process cannot use its device any more."""
    return not isinstance(error, UnfitWorkerError) and device_trouble(error) is DeviceTrouble.LOST


@contextmanager
def job_step(stores: WorkerStores, step: str) -> Iterator[int]:
    """Yields the number of processes that died in a step that a job makes once; a marker tells if this one dies too.

    The marker also remains if the process loses its device.
    """
    attempt = job_step_begun(stores.output, step, stores.marker())
    try:
        yield attempt.num_deaths
    except BaseException as error:
        if not _is_lost(error):
            withdraw(stores.output, attempt, stores.marker())
        raise
    withdraw(stores.output, attempt, stores.marker())


def _outcome_of_error(unit: Unit, stage: str, stores: WorkerStores, error: Exception) -> Outcome:
    """Gives the unit up if it is to blame; otherwise it stays open."""
    cause = _cause(stage, error)
    text = told_error(error)
    if cause is not None:
        try:
            return give_up(stores.output, unit, stage, cause, text)
        except Exception as trouble:  # noqa: BLE001 - as above
            error, text = trouble, str(trouble)
    away = isinstance(error, UnavailableError)
    return UnitFailure(unit.unit_id, unit.ordinal, unit.objects[0].key, stage, text[:MAX_ERROR_LENGTH], away)


def told_error(error: Exception) -> str:
    """The error, for people."""
    if isinstance(error, StoreError | ProcessDiedError):
        return str(error)
    if device_trouble(error) is not None:
        return told_by_device(error)
    return f"{type(error).__name__}: {error}"


def _cause(stage: str, error: Exception) -> Cause | None:
    """Why the unit is given up; None: the store, the machine or the model is to blame."""
    if isinstance(error, ProcessDiedError):
        return Cause.POISON
    if isinstance(error, OutputError):
        return Cause.OUTPUT_UNWRITABLE
    if isinstance(error, StoreError):
        return CAUSES.get(type(error)) if stage == "read" else None
    return Cause.FAILED if is_of_unit(error) else None
