"""Tells whose trouble an exception is in a step: the record's or unit's, or the job's, the machine's, the store's."""

from collections.abc import Callable
from typing import Any

from blocksight.engine.errors import ModelError
from blocksight.jobs.plan.config import ConfigError
from blocksight.jobs.plan.records import UnreconciledError
from blocksight.jobs.work.isolation import Isolated, ProcessStartError, free_bytes
from blocksight.storage.stores import error_classes

OF_THE_JOB = (ModelError, ConfigError, UnreconciledError, ProcessStartError)
"""Any other unit would meet them as well."""

AMPLE_BYTES = 4 << 30
"""Of free memory: more than any record within the limits takes."""


def is_of_unit(error: Exception) -> bool:
    """True if a step that raised this would fail over the same records again, on any machine."""
    return not isinstance(error, OF_THE_JOB) and error_classes.is_of_record(error)


def is_of_record(error: Exception, work: Callable[[Any], Any]) -> bool:
    """True if the record that `work` was handed alone is to blame.

    Lack of memory is the machine's, unless it is raised in a process apart while there is plenty.
    """
    if isinstance(error, MemoryError):
        return isinstance(work, Isolated) and free_bytes() >= AMPLE_BYTES
    return is_of_unit(error)
