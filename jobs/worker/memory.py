"""Tries work again with less at once while memory is short; keeps freed memory for the next record."""

import ctypes
from collections.abc import Callable
from functools import cache
from typing import TypeVar

from blocksight.engine.model.device_errors import is_short_of_memory

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""The names of glibc's options in `malloc.h`."""
LARGEST_KEPT_BYTES, MOST_KEPT_BYTES = 32 << 20, 128 << 20
"""Of one array, the most that glibc takes, and of all freed memory at the end of the heap."""

Result = TypeVar("Result")


@cache
def keep_freed_memory() -> None:
    """Lets this process reuse the memory of freed arrays, up to `MOST_KEPT_BYTES`.

    Without it glibc gives each large array back to the kernel, which then clears and maps the same pages again for the
    next record: about a sixth of the CPU time of a cheap method. Other C libraries have no such option.
    """
    options = getattr(ctypes.CDLL(None), "mallopt", None)
    if options is not None:
        options(M_MMAP_THRESHOLD, LARGEST_KEPT_BYTES)
        options(M_TRIM_THRESHOLD, MOST_KEPT_BYTES)


def with_less_at_once(work: Callable[[], Result], can_halve: Callable[[], bool], halve: Callable[[], None]) -> Result:
    """The result of `work`, called again after `halve()` while memory is short and something can be halved."""
    while True:
        try:
            return work()
        except Exception as error:
            if not is_short_of_memory(error) or not can_halve():
                raise
        halve()  # outside `except`: the exception holds the failed pass's tensors
