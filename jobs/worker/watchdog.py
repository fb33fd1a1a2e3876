"""A watchdog: ends the process after ten minutes without a heartbeat and prints its stack."""

import faulthandler
from collections.abc import Iterator
from contextlib import contextmanager

HANG_SECONDS = 600
"""Longer than any store call with its retries, decoding or forward pass."""

STANDARD_ERROR = 2

_is_armed = False


@contextmanager
def watchdog() -> Iterator[None]:
    """Ends the process if the body neither returns nor calls `heartbeat` for HANG_SECONDS.

    The watchdog is a thread below Python: it also ends a process that hangs inside a library.
    """
    global _is_armed
    _is_armed = True
    heartbeat()
    try:
        yield
    finally:
        _is_armed = False
        faulthandler.cancel_dump_traceback_later()


def heartbeat() -> None:
    """Resets the watchdog."""
    if _is_armed:
        faulthandler.dump_traceback_later(HANG_SECONDS, exit=True, file=STANDARD_ERROR)
