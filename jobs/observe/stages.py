"""Times the stages of a unit."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from blocksight.jobs.observe.registry import OF_PROCESS


@contextmanager
def timed(stage: str) -> Iterator[None]:
    """Adds the seconds of the body to the stage's, also if it fails."""
    start = time.perf_counter()
    try:
        yield
    finally:
        OF_PROCESS.add("blocksight_stage_seconds_total", stage, value=time.perf_counter() - start)


@contextmanager
def timed_reading() -> Iterator["DecodeTime"]:
    """Adds the seconds of the body to `read`, less those of decoding, which are added to `decode`."""
    start, decoding = time.perf_counter(), DecodeTime()
    try:
        yield decoding
    finally:
        OF_PROCESS.add("blocksight_stage_seconds_total", "decode", value=decoding.seconds)
        OF_PROCESS.add("blocksight_stage_seconds_total", "read", value=time.perf_counter() - start - decoding.seconds)


class DecodeTime:
    """The seconds spent within it, over all records of a unit."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._start = 0.0

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self._start
