"""A record as it lies in its shard: its key, its label, and its bytes or the reason why there are none."""

from dataclasses import dataclass

from blocksight.storage.limits import MAX_IMAGE_BYTES
from blocksight.storage.rejects import Reject, RejectCode


@dataclass(frozen=True)
class RawRecord:
    """One record, not decoded yet. It holds either `data` or `reject`."""

    key: str
    """Unique in the data set: the path of a loose image, else the shard's path and the name inside it."""
    shard: str
    """Key of the input object in its store."""
    index: int
    """Position in the shard, from 0; a loose image is its own shard."""
    label: str | int | None
    """As the data set writes it."""
    data: bytes | None = None
    reject: Reject | None = None


def too_many_bytes(size: int) -> Reject:
    """The reason for an image over the byte cap."""
    return Reject(RejectCode.TOO_MANY_BYTES, f"{size} bytes, at most {MAX_IMAGE_BYTES} are read")


def read_failed(error: Exception) -> Reject:
    """The reason for a record that its reader fails on."""
    return Reject(RejectCode.READ_FAILED, f"{type(error).__name__}: {error}")


def as_text(name: str) -> str:
    """A name as valid Unicode: bytes that are no UTF-8 become codes, for Parquet stores nothing else."""
    return name.encode("utf-8", "backslashreplace").decode()
