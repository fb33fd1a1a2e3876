"""A pinned object as a seekable file, read through one window of bounded size."""

import io

from blocksight.storage.stores.store import ObjectInfo, ObjectStore


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
