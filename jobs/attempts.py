"""An attempt: one try of a step at a unit, with a marker that outlives a process that dies in it."""

import json
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TypeVar

from jobs.context import JobContext, worker_name
from jobs.dead import bury
from jobs.isolation import ProcessDiedError
from jobs.plan import open_output, open_source
from jobs.records import Cause, Outcome, Unit, UnitFailure, UnitSkipped
from jobs.stopping import is_stopped
from jobs.watch import alive, watched
from storage.patient import PatientStore
from storage.schema import MAX_ERROR_LENGTH
from storage.store import ChangedError, DamagedError, MissingError, ObjectStore, StoreError, UnavailableError

FOLDER = "_job/attempts/"

CAREFUL_DEATHS = 2
"""After so many deaths in a step its records are worked on one at a time, in a process apart."""
MOST_DEATHS = 12
"""After so many the unit is given up. Far above what a poisonous record needs (two deaths, and two of the
process apart), for machines die of other things too."""

CAUSES = {MissingError: Cause.INPUT_MISSING, ChangedError: Cause.INPUT_CHANGED, DamagedError: Cause.CONTAINER_CORRUPT}

Result = TypeVar("Result")


@dataclass(frozen=True)
class Desk:
    """What the steps of one job reach from a worker."""

    source: ObjectStore
    output: ObjectStore
    run_id: str


def open_desk(context: JobContext) -> Desk:
    """Input and output, with patience for a store that is away."""
    source, _ = open_source(context.config.data, context.config.endpoint_url)
    output = open_output(context.config)
    return Desk(PatientStore(source, waiting=alive), PatientStore(output, waiting=alive), context.run_id)


def attempted(unit: Unit, stage: str, desk: Desk, work: Callable[[bool], Result]) -> Result | Outcome:
    """What the step makes of the unit, or what became of the unit instead; never raises an Exception.

    `work` is told whether to be careful: to let no record take the whole unit down with it.
    """
    try:
        if stage != "commit" and is_stopped(desk.output, desk.run_id):  # what is explained is not thrown away
            return UnitSkipped(unit.unit_id)
        with marked(desk, f"{unit.unit_id}/{stage}") as num_deaths, watched():
            if num_deaths >= MOST_DEATHS:
                return bury(desk.output, unit, stage, Cause.POISON, f"{num_deaths} processes died in it")
            return work(num_deaths >= CAREFUL_DEATHS)
    except Exception as error:  # noqa: BLE001 - a unit's trouble is its own: the others go on
        return _judged(unit, stage, desk, error)


@contextmanager
def marked(desk: Desk, step: str) -> Iterator[int]:
    """The number of attempts at a step that left their marker; one of our own stands while the body runs."""
    prefix = f"{FOLDER}{step}-"
    num_deaths = sum(1 for _ in desk.output.list(prefix))
    marker = f"{prefix}{desk.run_id}-{uuid.uuid4().hex}.json"
    desk.output.put(marker, json.dumps({"worker": worker_name()}).encode())
    try:
        yield num_deaths
    finally:
        with suppress(StoreError):  # one marker too many makes the next attempt careful at most
            desk.output.delete(marker)


def forget_interrupted(output: ObjectStore, run_id: str) -> None:
    """Removes the markers of a run that was asked to stop: its attempts were broken off, and died of no record."""
    for info in output.list(FOLDER):
        if f"-{run_id}-" in info.key:
            output.delete(info.key)


def _judged(unit: Unit, stage: str, desk: Desk, error: Exception) -> Outcome:
    """The unit is dead where its input is to blame, and stays open otherwise."""
    cause = CAUSES.get(type(error)) if stage == "read" else None
    if isinstance(error, ProcessDiedError):
        cause = Cause.POISON
    if cause is not None:
        try:
            return bury(desk.output, unit, stage, cause, str(error))
        except StoreError as trouble:
            error = trouble
    text = str(error) if isinstance(error, StoreError) else f"{type(error).__name__}: {error}"
    away = isinstance(error, UnavailableError)
    return UnitFailure(unit.unit_id, unit.ordinal, unit.objects[0].key, stage, text[:MAX_ERROR_LENGTH], away)
