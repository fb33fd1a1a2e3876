"""Attempt markers: numbered and created once each, so that the bucket alone says how often a unit killed its process.

`_job/attempts/<2 hex>/<unit>/<n>.json` is the n-th attempt at a unit, from 0. A step of it that another process works
on has markers of its own, `<n>-explain-<k>.json`. A marker that is not marked as ended is a process that died, or that
still works. A finished unit needs no mark: its fragment is there.
"""

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from itertools import count

from blocksight.jobs.plan.documents import read_document
from blocksight.jobs.plan.records import Unit, UnreconciledError
from blocksight.storage.limits import MAX_MARKER_BYTES
from blocksight.storage.stores.store import AlreadyExistsError, MissingError, ObjectStore, StoreError

FOLDER = "_job/attempts/"
READERS = 16
"""Markers read at the same time."""
MAX_ATTEMPTS = 10_000
"""Markers of one unit, most of them of attempts that ended alive, as while a store is away again and again."""
UNITS_AT_ONCE = 256
"""Units whose markers are looked for before it is asked whether any of them was begun."""


@dataclass(frozen=True)
class Marker:
    """The process that began an attempt or a step."""

    run_id: str
    worker: str
    started: float
    """Seconds since 1970."""
    token: str
    """Tells the markers of two processes apart, if a reply of the store is lost."""
    ended: bool = False
    """The attempt ended without a result, and its process lived: no record killed it."""


@dataclass(frozen=True)
class Attempt:
    """One try at a unit. It is passed on from step to step, also between processes."""

    markers: tuple[str, ...]
    """Keys of its markers: the unit's, and that of a step in a process of its own."""
    num_deaths: int
    """Attempts and steps before it that did not end."""


def prefix_of(unit_id: str) -> str:
    """The prefix of all markers of a unit; spread over 256 folders, because stores limit the requests to one."""
    return f"{FOLDER}{unit_id[:2]}/{unit_id}/"


def unit_of(key: str) -> str:
    """The id of the unit that a marker is of."""
    return key.removeprefix(FOLDER).partition("/")[2].partition("/")[0]


def begun(output: ObjectStore, unit_id: str, marker: Marker) -> Attempt:
    """Begins an attempt at a unit: one request, if there was none before. Raises StoreError."""
    return _taken(output, prefix_of(unit_id), marker)


def step_begun(output: ObjectStore, attempt: Attempt, stage: str, marker: Marker) -> Attempt:
    """Begins a step of the attempt in another process: one request, if it is the first time. Raises StoreError."""
    taken = _taken(output, f"{attempt.markers[0].removesuffix('.json')}-{stage}-", marker)
    return Attempt((*attempt.markers, *taken.markers), attempt.num_deaths + taken.num_deaths)


def job_step_begun(output: ObjectStore, step: str, marker: Marker) -> Attempt:
    """Begins a step that a job makes once, such as `first-pass/learn`. Raises StoreError."""
    return _taken(output, f"{FOLDER}{step}-", marker)


def _taken(output: ObjectStore, prefix: str, marker: Marker) -> Attempt:
    """Creates the first marker that does not exist, and counts the earlier ones that did not end."""
    num_deaths = 0
    for number in range(MAX_ATTEMPTS):
        key = f"{prefix}{number}.json"
        try:
            output.create(key, json.dumps(asdict(marker)).encode())
        except AlreadyExistsError:
            found = _read(output, key)
            if found is None or found.token != marker.token:  # else it is ours: the store's first reply was lost
                num_deaths += found is None or not found.ended
                continue
        return Attempt((key,), num_deaths)
    raise StoreError(f"{output.uri}/{prefix} holds {MAX_ATTEMPTS:,} attempts: remove them, and the unit begins anew")


def end(output: ObjectStore, attempt: Attempt, marker: Marker) -> None:
    """Marks the attempt as ended: it failed, was stopped or was given back, and its process lives."""
    for key in attempt.markers:
        with suppress(StoreError):  # a marker that remains makes the next attempt careful, no more
            _end(output, key, marker)


def withdraw(output: ObjectStore, attempt: Attempt, marker: Marker) -> None:
    """Removes the markers of a step that ended; marks them if this role may not delete."""
    try:
        output.delete_many(attempt.markers)
    except StoreError:
        end(output, attempt, marker)


def _end(output: ObjectStore, key: str, marker: Marker) -> None:
    output.put(key, json.dumps(asdict(replace(marker, ended=True))).encode())


def end_interrupted(output: ObjectStore, units: Sequence[Unit], run_id: str) -> None:
    """Marks what a run that was asked to stop had in hand as ended: no record killed these attempts.

    `units`: those that it did not finish, in the order in which they were handed out. Raises StoreError.
    """
    with ThreadPoolExecutor(READERS) as readers:
        for start in range(0, len(units), UNITS_AT_ONCE):
            some = units[start : start + UNITS_AT_ONCE]
            if not any(list(readers.map(lambda unit: _end_own(output, prefix_of(unit.unit_id), run_id), some))):
                return


def _end_own(output: ObjectStore, prefix: str, run_id: str) -> bool:
    """Ends the run's attempts at a unit; returns True if there is any."""
    own = [(key, marker) for key, marker in _markers(output, prefix) if marker is not None and marker.run_id == run_id]
    for key, marker in own:
        if not marker.ended:
            _end(output, key, marker)
    return bool(own)


def is_under_way(output: ObjectStore, step: str) -> bool:
    """True if a process is at a step that a job makes once, or died in it."""
    return any(marker is None or not marker.ended for _, marker in _markers(output, f"{FOLDER}{step}-"))


def _markers(output: ObjectStore, prefix: str) -> Iterator[tuple[str, Marker | None]]:
    """Key and marker of all attempts; None where it is damaged."""
    for number in count():
        key = f"{prefix}{number}.json"
        try:
            yield key, _read(output, key, missing_is_ended=False)
        except MissingError:
            return


def _read(output: ObjectStore, key: str, *, missing_is_ended: bool = True) -> Marker | None:
    """The marker; None if it is damaged, which counts as a death."""
    try:
        return read_document(output, key, Marker, MAX_MARKER_BYTES)
    except UnreconciledError:
        return None
    except MissingError:  # somebody removed it meanwhile, as `retry` does
        if not missing_is_ended:
            raise
        return Marker("", "", 0.0, "", ended=True)
