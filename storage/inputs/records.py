"""A record as read from its shard: key, label, and either the image's bytes or the reject."""

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
    """The reject for an image over the byte limit."""
    return Reject(RejectCode.TOO_MANY_BYTES, f"{size} bytes, at most {MAX_IMAGE_BYTES} are read")


def read_failed(error: Exception) -> Reject:
    """The reject for a record whose reader failed."""
    return Reject(RejectCode.READ_FAILED, f"{type(error).__name__}: {error}")


def as_text(name: str) -> str:
    """A name as valid Unicode, as Parquet needs it; bytes that are not UTF-8 become escape codes."""
    return name.encode("utf-8", "backslashreplace").decode()
