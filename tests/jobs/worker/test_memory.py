"""Freed memory: a worker reuses it, and does not fetch the same pages from the kernel for each record."""

import resource

import numpy as np

from blocksight.jobs.worker.memory import keep_freed_memory

ARRAYS, ARRAY_BYTES = 3, 20 << 20


def test_a_worker_reuses_the_memory_of_freed_arrays():
    keep_freed_memory()
    _allocate()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        _allocate()
    found = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    assert found < 4 * ARRAYS * 5  # a page has 2 MiB at most


def _allocate() -> None:
    """Makes arrays that glibc would give back to the kernel when they are freed."""
    arrays = [np.ones(ARRAY_BYTES, np.uint8) for _ in range(ARRAYS)]
    assert sum(int(one[-1]) for one in arrays) == ARRAYS
