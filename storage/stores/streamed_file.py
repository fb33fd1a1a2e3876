"""A pinned object that is read from its beginning to its end, with small steps back: each byte is fetched once."""

from blocksight.storage.stores.windowed_file import WindowedFile


class StreamedFile(WindowedFile):
    """Windows follow each other without a gap or an overlap, and the last two are kept.

    A step back within the last window fetches nothing. A gap of more than a window is passed over.
    """

    before = b""
    """The bytes before the window, which end where it begins."""

    def read_at(self, start: int, size: int) -> bytes:
        size = min(size, self.info.size - start)
        end = self.window_start + len(self.window)
        if size <= 0 or self.window_start - len(self.before) <= start <= start + size <= end:
            return self._kept(start, size)
        if self.window_start <= start and start + size <= end + self.window_bytes:
            self.before, self.window, self.window_start = self.window, self._fetched(end), end
            return self._kept(start, size)
        self.before = b""
        return super().read_at(start, size)

    def _fetched(self, start: int) -> bytes:
        length = min(self.window_bytes, self.info.size - start)
        return self.store.read(self.info.key, etag=self.info.etag, start=start, length=length)

    def _kept(self, start: int, size: int) -> bytes:
        """Bytes of the two windows."""
        inside = start - self.window_start
        if size <= 0:
            return b""
        if inside >= 0:
            return self.window[inside : inside + size]
        first = self.before[inside : min(0, inside + size) or None]
        return first + self.window[: max(0, inside + size)]
