"""Tells who is to blame for an exception in a step: the record or unit, or the job, the machine, the store."""

from collections.abc import Callable
from typing import Any

from blocksight.cluster.errors import ClusterError
from blocksight.engine.errors import ModelError
from blocksight.engine.model.device_errors import DeviceTrouble, device_trouble
from blocksight.jobs.plan.config import ConfigError
from blocksight.jobs.plan.records import UnreconciledError
from blocksight.jobs.worker.isolation import Isolated, ProcessStartError, free_bytes
from blocksight.storage.parquet.rows import UnknownColumnsError
from blocksight.storage.stores import error_classes


class UnfitWorkerError(ClusterError):
    """This worker cannot do what the job settled, and another one may. The message says why."""


OF_THE_JOB = (ModelError, ConfigError, UnreconciledError, ProcessStartError, UnknownColumnsError)
"""Errors that every other unit would raise too."""

AMPLE_BYTES = 4 << 30
"""Free memory that is enough for any record within the limits."""


def is_of_unit(error: Exception) -> bool:
    """True if the step would fail at the same records again, on any machine."""
    if isinstance(error, (UnfitWorkerError, *OF_THE_JOB)) or device_trouble(error) is not None:
        return False
    return error_classes.is_of_record(error)


def is_of_record(error: Exception, work: Callable[[Any], Any]) -> bool:
    """True if the one record given to `work` is to blame.

    A lack of memory is the machine's, unless a child process meets it while enough memory is free.
    """
    if device_trouble(error) is DeviceTrouble.HOST_MEMORY:
        return isinstance(work, Isolated) and free_bytes() >= AMPLE_BYTES
    return is_of_unit(error)
