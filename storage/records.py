"""A record as it lies in its shard: its key, its label, and its bytes or the reason why there are none."""

import io
from dataclasses import dataclass

from storage.limits import MAX_IMAGE_BYTES
from storage.rejects import Reject, RejectCode
from storage.store import ObjectInfo, ObjectStore


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


class WindowedFile(io.RawIOBase):
    """A pinned object as a seekable file, read through one window of bounded size."""

    WINDOW = 8 << 20

    def __init__(self, store: ObjectStore, info: ObjectInfo, window_bytes: int = WINDOW) -> None:
        self.store, self.info, self.window_bytes = store, info, window_bytes
        self.position = 0
        self.window, self.window_start = b"", 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.info.size}[whence]
        self.position = max(0, base + offset)
        return self.position

    def read(self, size: int | None = -1) -> bytes:
        left = max(0, self.info.size - self.position)
        wanted = left if size is None or size < 0 else min(size, left)
        data = self.read_at(self.position, wanted)
        self.position += len(data)
        return data

    def readinto(self, buffer: bytearray) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def read_at(self, start: int, size: int) -> bytes:
        """Bytes from anywhere, without moving; fewer at the end. Raises MissingError and ChangedError."""
        size = min(size, self.info.size - start)
        if size <= 0:
            return b""
        if size > self.window_bytes:
            return self.store.read(self.info.key, etag=self.info.etag, start=start, length=size)
        inside = start - self.window_start
        if inside < 0 or inside + size > len(self.window):
            length = min(self.window_bytes, self.info.size - start)
            self.window = self.store.read(self.info.key, etag=self.info.etag, start=start, length=length)
            self.window_start, inside = start, 0
        return self.window[inside : inside + size]
