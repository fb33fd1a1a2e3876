"""Tells who is to blame for an exception in a step: the record or unit, or the job, the machine, the store."""

from collections.abc import Callable
from typing import Any

from blocksight.engine.errors import ModelError
from blocksight.jobs.plan.config import ConfigError
from blocksight.jobs.plan.records import UnreconciledError
from blocksight.jobs.worker.isolation import Isolated, ProcessStartError, free_bytes
from blocksight.storage.parquet.rows import UnknownColumnsError
from blocksight.storage.stores import error_classes

OF_THE_JOB = (ModelError, ConfigError, UnreconciledError, ProcessStartError, UnknownColumnsError)
"""Errors that every other unit would raise too."""

AMPLE_BYTES = 4 << 30
"""Free memory that is enough for any record within the limits."""


def is_of_unit(error: Exception) -> bool:
    """True if the step would fail at the same records again, on any machine."""
    return not isinstance(error, OF_THE_JOB) and error_classes.is_of_record(error)


def is_of_record(error: Exception, work: Callable[[Any], Any]) -> bool:
    """True if the one record given to `work` is to blame.

    MemoryError is the machine's, unless a child process raises it while enough memory is free.
    """
    if isinstance(error, MemoryError):
        return isinstance(work, Isolated) and free_bytes() >= AMPLE_BYTES
    return is_of_unit(error)
