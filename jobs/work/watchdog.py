"""The watch over a process: one that shows no sign of life for ten minutes ends itself, and leaves a trace."""

import faulthandler
from collections.abc import Iterator
from contextlib import contextmanager

HANG_SECONDS = 600
"""Longer than a patient store call, a decoding or a forward pass can take."""

STANDARD_ERROR = 2

_is_watching = False


@contextmanager
def watchdog() -> Iterator[None]:
    """Ends the process where the body neither comes to its end nor calls `heartbeat` for so long.

    The watch is a thread below Python: it also ends a process that hangs inside a library.
    """
    global _is_watching
    _is_watching = True
    heartbeat()
    try:
        yield
    finally:
        _is_watching = False
        faulthandler.cancel_dump_traceback_later()


def heartbeat() -> None:
    """A sign of life: the watch begins anew."""
    if _is_watching:
        faulthandler.dump_traceback_later(HANG_SECONDS, exit=True, file=STANDARD_ERROR)
