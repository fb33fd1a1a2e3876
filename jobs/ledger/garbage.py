"""Garbage collection: finds and removes what dead runs left behind."""

from collections.abc import Iterator
from contextlib import suppress

from blocksight.jobs.ledger import attempt_markers, dead_letters
from blocksight.jobs.ledger.reconcile import JobState, final_manifest
from blocksight.jobs.ledger.stop_request import RUNS_FOLDER, STOP_REQUEST_NAME
from blocksight.jobs.plan.plan import PLAN_FOLDER, UNIT_FOLDERS, plan_document
from blocksight.storage.stores.local import LocalStore
from blocksight.storage.stores.retrying import PatientStore, is_probe
from blocksight.storage.stores.store import ObjectStore, StoreError

PROBE_PREFIX = "_job/probe-"
"""Of the objects that test what the store can do."""

YOUNG_SECONDS = 3_600.0
"""A process may still be writing an unfinished file of the last hour."""


def collect_garbage(store: ObjectStore, job_state: JobState, *, dry_run: bool = False) -> list[str]:
    """Removes markers and letters of committed units, lost plans, unfinished files and, once the job is
    finished, probes and signs to stop; returns their names.

    Never removes a fragment, receipt, plan, manifest, or dead letter of a dead unit.
    """
    names = [*_markers_of_committed(store, job_state), *_lost_plans(store)]
    if final_manifest(store, job_state.plan) is not None:  # no run needs them any more
        names += [info.key for info in store.list(attempt_markers.FOLDER) if info.key not in set(names)]
        names += [info.key for info in store.list(PROBE_PREFIX)]
        names += [info.key for folder in UNIT_FOLDERS for info in store.list(folder) if is_probe(info.key)]
        names += [info.key for info in store.list(RUNS_FOLDER) if info.key.endswith(f"/{STOP_REQUEST_NAME}")]
    if not dry_run:
        store.delete_many(names)
    plain = store.store if isinstance(store, PatientStore) else store
    if isinstance(plain, LocalStore):  # a bucket has no unfinished objects
        names += plain.sweep(YOUNG_SECONDS, dry_run=dry_run)
    return names


def tidy_attempts(store: ObjectStore) -> None:
    """Removes all attempt markers, which a finished job does not need; leaves them if this role may not delete."""
    with suppress(StoreError):
        store.delete_many([info.key for info in store.list(attempt_markers.FOLDER)])


def _markers_of_committed(store: ObjectStore, job_state: JobState) -> Iterator[str]:
    """The keys of markers and dead letters of committed units."""
    keys = [info.key for info in store.list(attempt_markers.FOLDER)]
    yield from (key for key in keys if attempt_markers.unit_of(key) in job_state.receipts)
    letters = [info.key for info in store.list(dead_letters.FOLDER)]
    committed = {dead_letters.letter_key(unit_id) for unit_id in job_state.receipts}
    yield from (key for key in letters if key in committed)


def _lost_plans(store: ObjectStore) -> Iterator[str]:
    """The keys of unit lists that the plan does not name, of drivers that planned at the same time or died."""
    named = plan_document(store)
    for info in store.list(f"{PLAN_FOLDER}units-"):
        if named is not None and info.key != named["units"]:
            yield info.key
