"""Stop requests: a run that is asked to stop takes no further unit and finishes its current ones."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from blocksight.cluster.errors import ClusterError
from blocksight.jobs.plan.records import UnfinishedError
from blocksight.storage.stores.store import ObjectStore, StoreError

GRACE_SECONDS = 20.0
"""Between the request and the end; a preempted machine gives 30 seconds."""

FINISHING = "finishing what is under way; press again to stop now"
"""Printed at the first signal."""
STANDARD_ERROR = 2

GO_ON = "what is committed stays, and the same command goes on from there"

RUNS_FOLDER = "_job/runs/"
STOP_REQUEST_NAME = "stop"


def stop_request_key(run_id: str) -> str:
    """The key of a run's stop request, which all its workers look for."""
    return f"{RUNS_FOLDER}{run_id}/{STOP_REQUEST_NAME}"


def is_stopped(output: ObjectStore, run_id: str) -> bool:
    """True if the run's stop request exists; for workers."""
    return output.head(stop_request_key(run_id)) is not None


class Stop:
    """The driver's stop request: made once, by a signal or because of the units' outcomes."""

    def __init__(self, output: ObjectStore, run_id: str) -> None:
        self.output, self.run_id = output, run_id
        self.reason: str | None = None
        """Why; None if no stop was requested."""
        self.deadline = float("inf")
        """When waiting for units under way ends, on the monotonic clock."""
        self._writer: threading.Thread | None = None

    def request(self, reason: str) -> None:
        """Asks the workers to stop; the first reason counts. Does not wait for the store."""
        if self.reason is not None:
            return
        self.reason = reason
        self.deadline = time.monotonic() + GRACE_SECONDS
        writer = threading.Thread(target=self._write_request, args=(reason,), daemon=True)
        writer.start()
        self._writer = writer  # after the start: a second signal may interrupt, and only a started thread can be joined

    def clear(self) -> None:
        """Removes the stop request, if there is one and this role may; called when no worker of the run is left."""
        if self._writer is None:
            return
        self._writer.join(GRACE_SECONDS)
        with suppress(StoreError):  # no other run looks for it
            self.output.delete(stop_request_key(self.run_id))

    def _write_request(self, reason: str) -> None:
        with suppress(StoreError):  # a store that does not answer stops the run too
            self.output.put(stop_request_key(self.run_id), reason.encode())


@contextmanager
def unfinished_from(begun: Callable[[], object], stop: Stop) -> Iterator[None]:
    """Turns errors of the body into UnfinishedError once the work has `begun`; a second signal just ends the body.

    Before the first unit an error is the request's, and is raised unchanged.
    """
    try:
        yield
    except (ClusterError, StoreError) as error:
        if not begun():
            raise
        raise UnfinishedError(f"{error}; {GO_ON}") from error
    except KeyboardInterrupt:  # a second signal, or the end of the grace period
        if stop.reason is None:
            raise


@contextmanager
def stopped_by_signals(stop: Stop, *, cuts_off: bool) -> Iterator[None]:
    """Turns the first SIGTERM or SIGINT of the body into a stop request; the second raises KeyboardInterrupt.

    `cuts_off`: the body does the work itself and cannot check the time, so a second signal ends the grace period.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    end_of_grace = threading.Timer(GRACE_SECONDS, signal.pthread_kill, (threading.get_ident(), signal.SIGINT))
    end_of_grace.daemon = True

    def handle(number: int, _frame: FrameType | None) -> None:
        if stop.reason is not None:
            raise KeyboardInterrupt
        os.write(STANDARD_ERROR, f"\n{FINISHING}\n".encode())  # unbuffered: a signal may interrupt another write
        stop.request(signal.Signals(number).name)
        if cuts_off:
            end_of_grace.start()

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        end_of_grace.cancel()
        for number, handler in before.items():
            signal.signal(number, handler)
