"""A pinned object as a seekable file, read through one window of bounded size."""

from blocksight.storage.stores.seekable_file import SeekableFile
from blocksight.storage.stores.store import ObjectInfo, ObjectStore


class WindowedFile(SeekableFile):
    """A pinned object as a seekable file, read through one window of bounded size."""

    WINDOW = 8 << 20

    def __init__(self, store: ObjectStore, info: ObjectInfo, window_bytes: int = WINDOW) -> None:
        super().__init__(info.size)
        self.store, self.info, self.window_bytes = store, info, window_bytes
        self.window, self.window_start = b"", 0

    def read(self, size: int | None = -1) -> bytes:
        data = self.read_at(self.position, self.num_wanted(size))
        self.position += len(data)
        return data

    def readinto(self, buffer: bytearray) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def read_at(self, start: int, size: int) -> bytes:
        """Bytes from `start`, without changing the position; fewer at the end. Raises MissingError and ChangedError."""
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
