"""A watchdog: ends the process after ten minutes without a heartbeat and prints its stack."""

import faulthandler
import time
from collections.abc import Iterator
from contextlib import contextmanager

from blocksight.engine.model.liveness import LISTENERS

HANG_SECONDS = 600
"""Longer than any store call with its retries, decoding or forward pass."""

STANDARD_ERROR = 2

HEARTBEAT_SECONDS = 0.5
"""Between two heartbeats that count: one costs 33 us, and there is one per forward pass."""

_is_armed = False
_last_heartbeat = 0.0
"""On the monotonic clock."""


@contextmanager
def watchdog() -> Iterator[None]:
    """Ends the process if the body neither returns nor calls `heartbeat` for HANG_SECONDS.

    The watchdog is a thread below Python: it also ends a process that hangs inside a library.
    """
    global _is_armed, _last_heartbeat
    _is_armed, _last_heartbeat = True, float("-inf")
    heartbeat()
    try:
        yield
    finally:
        _is_armed = False
        faulthandler.cancel_dump_traceback_later()


def heartbeat() -> None:
    """Resets the watchdog, at most some times a second."""
    global _last_heartbeat
    if _is_armed and (now := time.monotonic()) - _last_heartbeat >= HEARTBEAT_SECONDS:
        _last_heartbeat = now
        faulthandler.dump_traceback_later(HANG_SECONDS, exit=True, file=STANDARD_ERROR)


LISTENERS.append(heartbeat)
