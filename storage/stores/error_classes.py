"""Classifies an exception: caused by the record, or by the machine or the store."""

import errno

from blocksight.storage.stores.store import StoreError

MACHINE_ERRNOS = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.ENOMEM,
    errno.EMFILE,
    errno.ENFILE,
    errno.EAGAIN,
    errno.EIO,
    errno.ENOBUFS,
    errno.ECONNREFUSED,
    errno.ECONNRESET,
    errno.EPIPE,
    errno.ETIMEDOUT,
}
"""errno of an OSError that a record's bytes cannot cause: disk, memory, handles, network."""
MACHINE_TYPES = (StoreError, MemoryError, ImportError, ConnectionError, TimeoutError)
MACHINE_MESSAGES = ("can't allocate memory", "not enough memory", "out of memory", "can't start new thread")
"""Parts of a RuntimeError's message from allocators, and from starting threads."""


def is_of_record(error: Exception) -> bool:
    """True if the record caused the error: it would fail in the same way on any machine.

    An error that a record's bytes cannot cause belongs to the machine or the store, and rejects no record.
    """
    if isinstance(error, MACHINE_TYPES):
        return False
    if isinstance(error, OSError) and error.errno in MACHINE_ERRNOS:
        return False
    message = str(error).lower() if isinstance(error, RuntimeError) else ""  # other texts may come from a record
    return not any(part in message for part in MACHINE_MESSAGES)
