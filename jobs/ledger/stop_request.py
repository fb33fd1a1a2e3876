"""Stopping: a run that is asked to end takes no further unit, and finishes what is under way."""

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
"""Between the request and the end: a machine that is taken back gives 30 seconds."""

GO_ON = "what is committed stays, and the same command goes on from there"

RUNS_FOLDER = "_job/runs/"
STOP_REQUEST_NAME = "stop"


def stop_request_key(run_id: str) -> str:
    """The object that tells all workers of a run to take no further unit."""
    return f"{RUNS_FOLDER}{run_id}/{STOP_REQUEST_NAME}"


def is_stopped(output: ObjectStore, run_id: str) -> bool:
    """Whether the run was asked to stop, as a worker sees it."""
    return output.head(stop_request_key(run_id)) is not None


class Stop:
    """The driver's wish to end a run: set once, by a signal or by what the units said."""

    def __init__(self, output: ObjectStore, run_id: str) -> None:
        self.output, self.run_id = output, run_id
        self.reason: str | None = None
        """Why; None: nobody asked."""
        self.deadline = float("inf")
        """When waiting for units under way ends, on the monotonic clock."""
        self._sign: threading.Thread | None = None

    def request(self, reason: str) -> None:
        """Asks the workers to stop; the first reason counts. Does not wait for the store."""
        if self.reason is not None:
            return
        self.reason = reason
        self.deadline = time.monotonic() + GRACE_SECONDS
        sign = threading.Thread(target=self._put_sign, args=(reason,), daemon=True)
        sign.start()
        self._sign = sign  # once it runs: a second signal may end this line, and nobody joins what was not started

    def clear(self) -> None:
        """Takes the sign away, once no worker of the run is left."""
        if self._sign is not None:
            self._sign.join(GRACE_SECONDS)
        self.output.delete(stop_request_key(self.run_id))

    def _put_sign(self, reason: str) -> None:
        with suppress(StoreError):  # a store that is away stops the run as well
            self.output.put(stop_request_key(self.run_id), reason.encode())


@contextmanager
def unfinished_from(begun: Callable[[], object], stop: Stop) -> Iterator[None]:
    """What breaks the body off becomes UnfinishedError once the work has `begun`; the second signal just ends it.

    Before the first unit nothing is lost, and whatever is wrong is the request's.
    """
    try:
        yield
    except (ClusterError, StoreError) as error:
        if not begun():
            raise
        raise UnfinishedError(f"{error}; {GO_ON}") from error
    except KeyboardInterrupt:  # a second signal, or the end of the grace
        if stop.reason is None:
            raise


@contextmanager
def stopped_by_signals(stop: Stop, *, cuts_off: bool) -> Iterator[None]:
    """Turns the first SIGTERM or SIGINT of the body into a request to stop; the second raises KeyboardInterrupt.

    `cuts_off`: the body does the work itself and cannot look at the clock, so the end of the grace is a
    second signal.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    end_of_grace = threading.Timer(GRACE_SECONDS, signal.pthread_kill, (threading.get_ident(), signal.SIGINT))
    end_of_grace.daemon = True

    def handle(number: int, _frame: FrameType | None) -> None:
        if stop.reason is not None:
            raise KeyboardInterrupt
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
