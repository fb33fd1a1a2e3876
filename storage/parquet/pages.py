"""Page headers of a Parquet file: each is checked before Arrow sees it, so that no page unfolds beyond its bound."""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from blocksight.storage.limits import MAX_PAGES_BYTES
from blocksight.storage.parquet.delta_encoding import DELTAS, check_deltas, unfolded_page
from blocksight.storage.parquet.thrift import struct_at

ReadAt = Callable[[int, int], bytes]
"""Bytes from a position; fewer at the end of the file."""

HEADER_BYTES = (1 << 12, 1 << 16, 1 << 20)
"""How much is read of a header that reaches beyond the bytes at hand: each next step only if the last was too short."""
UNREPEATED = (0, 6)
"""Encodings in which each byte of a value is written where it belongs: PLAIN and DELTA_LENGTH_BYTE_ARRAY."""
DATA, DICTIONARY, DATA_2 = 0, 2, 3
"""Kinds of pages, and where their headers keep what follows: fields 5, 7 and 8."""
SLACK_BYTES = 1 << 16
"""By which, and by an eighth, compression may make a page longer."""
BYTES_PER_ENTRY = 16
"""What Arrow keeps of each entry of a dictionary, besides its bytes."""


@dataclass
class Chunk:
    """One column of one row group, and how far its pages are checked."""

    where: str
    """The column, for messages."""
    start: int
    """Offset of its first page in the file."""
    num_bytes: int
    """Of all its pages as they are stored, with their headers."""
    unfolded_bytes: int
    """Of all its pages after decompression, as the footer says; no page may go beyond it."""
    num_values: int
    num_levels: int
    """Lists of levels that precede the values of a page: none, of nulls, of nulls and of lists."""
    compression: str
    """As the footer names it."""
    is_unrepeated: bool
    """The footer says that there is neither a dictionary nor another encoding that repeats bytes."""
    _next: int = field(init=False)
    _unfolded: int = field(default=0, init=False)
    _values: int = field(default=0, init=False)
    dictionary_bytes: int = field(default=0, init=False)
    page_bytes: int = field(default=0, init=False)
    """Of the largest page so far."""

    def __post_init__(self) -> None:
        self._next = self.start

    def check(self, start: int, data: memoryview, read_at: ReadAt) -> None:
        """Checks the headers that begin in `data`, the file's bytes from `start` on. Raises ValueError."""
        stop = min(start + len(data), self.start + self.num_bytes)
        while start <= self._next < stop and self._values < self.num_values:
            header, size = self._header(start, data, read_at)
            self._take(header)
            self._check_deltas(header, self._next + size, read_at)
            self._next += size + _count(header, 3)

    def _header(self, start: int, data: memoryview, read_at: ReadAt) -> tuple[dict[int, Any], int]:
        """The next header and its length."""
        offset = self._next - start
        for more in (0, *HEADER_BYTES):
            try:
                if more:
                    data, offset = memoryview(read_at(self._next, more)), 0
                header, stop = struct_at(data, offset)
            except IndexError:
                continue
            if stop <= len(data):
                return header, stop - offset
        raise ValueError(f"{self.where}: the page at byte {self._next} has no readable header")

    def _take(self, header: dict[int, Any]) -> None:
        unfolded, stored = _count(header, 2), _count(header, 3)
        self._unfolded += unfolded
        if unfolded > MAX_PAGES_BYTES:
            raise ValueError(f"{self.where}: a page unfolds to {unfolded} bytes, at most {MAX_PAGES_BYTES} are read")
        if stored > unfolded + unfolded // 8 + SLACK_BYTES:
            raise ValueError(f"{self.where}: a page of {unfolded} bytes is stored in {stored}")
        if self._unfolded > self.unfolded_bytes:
            raise ValueError(
                f"{self.where}: its pages unfold to {self._unfolded} bytes or more; the footer says "
                f"{self.unfolded_bytes}"
            )
        if _count(header, 1) == DICTIONARY:
            self._take_dictionary(unfolded, _count(header.get(7), 1))
        else:
            self._take_page(unfolded, header)

    def _take_dictionary(self, unfolded: int, num_entries: int) -> None:
        if self.is_unrepeated or num_entries > unfolded:
            raise ValueError(f"{self.where}: a dictionary of {num_entries} entries in {unfolded} bytes")
        self.dictionary_bytes += unfolded + BYTES_PER_ENTRY * num_entries

    def _take_page(self, unfolded: int, header: dict[int, Any]) -> None:
        self.page_bytes = max(self.page_bytes, unfolded)
        values = _values_of(header)
        if values is None:
            return  # an index, which Arrow leaves out
        num_values, encoding = values
        self._values += num_values
        if self._values > self.num_values or (self.is_unrepeated and encoding not in UNREPEATED):
            raise ValueError(
                f"{self.where}: its pages have {self._values} values in encoding {encoding}; the footer says "
                f"{self.num_values}{', each written out' if self.is_unrepeated else ''}"
            )

    def _check_deltas(self, header: dict[int, Any], start: int, read_at: ReadAt) -> None:
        """Looks into a page that says once more how many values it has."""
        values = _values_of(header)
        if values is None or values[1] not in DELTAS:
            return
        unfolded, second = _count(header, 2), header[8] if _count(header, 1) == DATA_2 else None
        body = read_at(start, _count(header, 3))
        if second is None:
            page, num_levels = unfolded_page(body, self.compression, unfolded), self.num_levels
        else:  # levels are not compressed, and have no length of their own
            levels = _count(second, 5) + _count(second, 6)
            is_compressed = second.get(7, True)
            body, unfolded = body[levels:], unfolded - levels
            page = unfolded_page(body, self.compression, unfolded) if is_compressed else body
            num_levels = 0
        check_deltas(page, values[1], num_levels, values[0])


def _values_of(header: dict[int, Any]) -> tuple[int, int] | None:
    """Number and encoding of a data page's values; None: it is of another kind."""
    kind = _count(header, 1)
    if kind == DATA:
        return _count(header.get(5), 1), _count(header.get(5), 2)
    return (_count(header.get(8), 1), _count(header.get(8), 4)) if kind == DATA_2 else None


class ClosedPagesError(ValueError):
    """Pages are asked for before they are expected."""


class GuardedFile(io.RawIOBase):
    """A Parquet file for Arrow to read: whole, but for its end, which is given; headers of pages are checked first.

    `read` raises ValueError where the pages of the expected chunks would take more than `MAX_PAGES_BYTES` together,
    and ClosedPagesError while nothing is expected.
    """

    def __init__(self, size: int, read_at: ReadAt, tail: bytes) -> None:
        self.size, self.tail = size, tail
        self._read_at = read_at
        self._position = 0
        self._chunks: Sequence[Chunk] | None = ()

    def expect(self, chunks: Sequence[Chunk] | None) -> None:
        """From here on these are read; None: nothing is."""
        self._chunks = chunks

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def read(self, size: int | None = -1) -> bytes:
        if self._chunks is None:
            raise ClosedPagesError
        start, left = self._position, max(0, self.size - self._position)
        data = self._bytes(start, left if size is None or size < 0 else min(size, left))
        for chunk in self._chunks:
            chunk.check(start, memoryview(data), self._read_at)
        held = sum(chunk.dictionary_bytes + chunk.page_bytes for chunk in self._chunks)
        if held > MAX_PAGES_BYTES:
            names = ", ".join(chunk.where for chunk in self._chunks)
            raise ValueError(
                f"{names}: pages of {held} bytes must be in memory at once, at most {MAX_PAGES_BYTES} may; write it "
                f"with fewer rows per row group"
            )
        self._position += len(data)
        return data

    def _bytes(self, start: int, size: int) -> bytes:
        """From the end that was given, or from the file."""
        border = self.size - len(self.tail)
        if start >= border:
            return self.tail[start - border : start - border + size]
        head = self._read_at(start, min(size, border - start))
        return head if start + size <= border else head + self.tail[: start + size - border]


def _count(header: Any, number: int) -> int:
    """A field that counts something. Raises ValueError where it is none."""
    value = header.get(number) if isinstance(header, dict) else None
    if not isinstance(value, int) or value < 0:
        raise ValueError(f"a page's header has {value} for field {number}; wanted a number from 0")
    return value
