"""Shows that work without forward passes goes on: a compiler's may take minutes, and nothing of it calls a model."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Event, Thread

BEAT_SECONDS = 1.0
MAX_BUSY_SECONDS = 1_800.0
"""No compiler takes longer; after it the work counts as hanging."""

LISTENERS: list[Callable[[], object]] = []
"""Called while the work goes on; the watchdog of jobs adds its heartbeat."""


@contextmanager
def busy() -> Iterator[None]:
    """While the body runs, calls the listeners from another thread, for `MAX_BUSY_SECONDS` at most."""
    is_over = Event()

    def beat() -> None:
        deadline = time.monotonic() + MAX_BUSY_SECONDS
        while time.monotonic() < deadline and not is_over.wait(BEAT_SECONDS):
            for listener in LISTENERS:
                listener()

    beating = Thread(target=beat, name="busy", daemon=True)
    beating.start()
    try:
        yield
    finally:
        is_over.set()
        beating.join()
