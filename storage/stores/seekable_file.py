"""Keeps the position of a readable file of known size; subclasses read the bytes."""

import io


class SeekableFile(io.RawIOBase):
    """A readable file of `size` bytes, at `position`. A subclass has `read`, which moves the position."""

    def __init__(self, size: int) -> None:
        self.size, self.position = size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.size}[whence]
        self.position = max(0, base + offset)
        return self.position

    def num_wanted(self, size: int | None) -> int:
        """Bytes that `read(size)` returns from the position on; None or a negative number means all."""
        left = max(0, self.size - self.position)
        return left if size is None or size < 0 else min(size, left)
