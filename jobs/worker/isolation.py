"""Isolation: runs a step's function in a child process, to find the record that kills its process."""

import ctypes
import os
import pickle
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from blocksight.cluster.switches import refuse_unsafe_switches
from blocksight.engine.model.device_errors import DeviceTrouble, device_trouble, told_by_device
from blocksight.jobs.worker.watchdog import heartbeat, watchdog

DEATHS = 2
"""After so many deaths of the child the item is blamed; one death may have another cause."""

POLL_SECONDS = 1.0
PR_SET_PDEATHSIG = 1
NVIDIA_DRIVER = Path("/proc/driver/nvidia")
MEMORY_SHARE = 0.8
"""The child's limit, as a share of the memory free at its start: it fails before the kernel kills a process."""

Work = Callable[[Any], Any]


class ProcessDiedError(Exception):
    """The child died at this item each time; the message says how."""


class ProcessStartError(Exception):
    """The child cannot make its function; no item is to blame."""


class Isolated:
    """Calls `make()` in a child process, and then its result with each item.

    Exceptions of that function are raised here. `make` and the items must be picklable.
    """

    def __init__(self, make: Callable[[], Work]) -> None:
        self._make = make
        self._child: tuple[subprocess.Popen[bytes], Connection] | None = None

    def __enter__(self) -> "Isolated":
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def __call__(self, item: Any) -> Any:
        """The function's result. Raises what the function raises, ProcessDiedError and ProcessStartError.

        A child that lost its device is of no more use: it ends too, and its error is raised if it comes again.
        """
        how, lost = "", None
        for _ in range(DEATHS):
            connection = self._connection()
            try:
                is_result, value = _asked(connection, item)
            except (EOFError, ConnectionError):
                how = self._end()
                continue
            if is_result:
                return value
            if device_trouble(value) is not DeviceTrouble.LOST:
                raise value
            lost = value
            self._end()
        if lost is not None:
            raise lost
        raise ProcessDiedError(f"{DEATHS} processes that worked on it died: {how}")

    def _connection(self) -> Connection:
        """The connection to the child, which is started if there is none."""
        if self._child is None:
            self._child = _start()
            try:
                is_made, trouble = _asked(self._child[1], self._make)
            except (EOFError, ConnectionError):
                raise ProcessStartError(f"a child process died before it had its function: {self._end()}") from None
            if not is_made:
                self._end()
                raise ProcessStartError(f"a child process cannot make its function: {trouble}") from trouble
        return self._child[1]

    def _end(self) -> str:
        """Ends the child, if there is one, and says how it ended."""
        if self._child is None:
            return ""
        process, connection = self._child
        self._child = None
        connection.close()
        with suppress(subprocess.TimeoutExpired):
            process.wait(5)
        process.kill()
        code = process.wait()
        return signal.strsignal(-code) or f"signal {-code}" if code < 0 else f"exit code {code}"


def _asked(connection: Connection, item: Any) -> tuple[bool, Any]:
    """(True, result) or (False, exception) of the child. Raises EOFError or ConnectionError if it died."""
    connection.send_bytes(pickle.dumps(item))
    while not connection.poll(POLL_SECONDS):
        heartbeat()  # the child has its own watchdog
    return connection.recv()


@contextmanager
def isolated_if(function: Work, careful: bool) -> Iterator[Work]:
    """The function itself or, if `careful`, the function in a child process."""
    if not careful:
        yield function
        return
    with Isolated(partial(_returned, function)) as isolated:
        yield isolated


def _returned(function: Work) -> Work:
    return function


def _start() -> tuple[subprocess.Popen[bytes], Connection]:
    refuse_unsafe_switches()  # the child inherits them and cannot report them
    ours, theirs = Pipe()
    process = subprocess.Popen(
        [sys.executable, "-m", "blocksight.jobs.worker.isolation", str(theirs.fileno()), str(os.getpid())],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        pass_fds=(theirs.fileno(),),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    theirs.close()
    return process, ours


def _serve(connection: Connection) -> None:
    """In the child: makes the function, then calls it with each item until the parent ends."""
    refuse_unsafe_switches()
    work: Work | None = None
    with suppress(EOFError):
        while True:
            sent = connection.recv_bytes()
            try:
                with watchdog():
                    item = pickle.loads(sent)
                    result = item() if work is None else work(item)
                answer = pickle.dumps((True, None if work is None else result))
            except Exception as error:  # noqa: BLE001 - the parent decides
                answer = pickle.dumps((False, _portable(error)))
            else:
                work = work or result
            connection.send_bytes(answer)


def _portable(error: Exception) -> Exception:
    """The exception, or a RuntimeError with its text if it cannot be pickled, or hides what the device said."""
    with suppress(Exception):
        alone = pickle.loads(pickle.dumps(error))  # without the errors behind it
        if device_trouble(alone) is not device_trouble(error):
            return RuntimeError(told_by_device(error))
        if type(alone) is type(error):
            return error
    return RuntimeError(f"{type(error).__name__}: {error}")


def _bind_to_parent(parent: int) -> None:
    """In the child: ends with its parent, and is killed first if memory runs out."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit(1)
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
    if not NVIDIA_DRIVER.exists():  # CUDA reserves far more memory than it uses
        most = int(MEMORY_SHARE * free_bytes())
        resource.setrlimit(resource.RLIMIT_DATA, (most, most))


def free_bytes() -> int:
    """Bytes of memory available without swapping, by the kernel's estimate."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))


if __name__ == "__main__":
    _bind_to_parent(int(sys.argv[2]))
    _serve(Connection(int(sys.argv[1])))
