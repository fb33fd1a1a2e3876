"""Tells whose trouble an exception is: the record's that was worked on, or the machine's or the store's."""

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
"""Of an OSError that a record's bytes cannot cause: disk, memory, handles, network."""
MACHINE_TYPES = (StoreError, MemoryError, ImportError, ConnectionError, TimeoutError)
MACHINE_SENTENCES = (
    *("can't allocate memory", "not enough memory", "out of memory", "can't start new thread"),
    *("cuda error", "cublas", "cudnn"),
)
"""In a RuntimeError: of torch's allocators and devices, and of the interpreter's threads."""


def is_of_record(error: Exception) -> bool:
    """True if working on the same record again, on any machine, would fail in the same way.

    What a record's bytes cannot cause is the machine's or the store's: no sound record is rejected for it.
    """
    if isinstance(error, MACHINE_TYPES):
        return False
    if isinstance(error, OSError) and error.errno in MACHINE_ERRNOS:
        return False
    said = str(error).lower() if isinstance(error, RuntimeError) else ""  # other texts may come from a record
    return not any(sentence in said for sentence in MACHINE_SENTENCES)
