"""Checks each page header of a Parquet file before Arrow reads it, so no page decompresses beyond its bound."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from blocksight.storage.limits import MAX_PAGES_BYTES
from blocksight.storage.parquet.delta_encoding import DELTAS, check_deltas, decompressed_page
from blocksight.storage.parquet.thrift import struct_at
from blocksight.storage.stores.seekable_file import SeekableFile

ReadAt = Callable[[int, int], bytes]
"""Reads (start, size): the bytes from a position; fewer at the end of the file."""

HEADER_BYTES = (1 << 12, 1 << 16, 1 << 20)
"""Bytes that are read for a header beyond the given data; the next size only if the last was too short."""
UNREPEATED = (0, 6)
"""Encodings that write each byte of a value: PLAIN and DELTA_LENGTH_BYTE_ARRAY."""
DATA, DICTIONARY, DATA_2 = 0, 2, 3
"""Kinds of pages. Their own headers are in fields 5, 7 and 8."""
SLACK_BYTES = 1 << 16
"""Compression may make a page longer by this and by an eighth."""
BYTES_PER_ENTRY = 16
"""Memory of Arrow for each entry of a dictionary, besides its bytes."""


@dataclass
class Chunk:
    """One column chunk: a column of one row group, and how many of its pages are checked."""

    where: str
    """The column, for messages."""
    start: int
    """Offset of its first page in the file."""
    num_bytes: int
    """Stored bytes of all its pages, with their headers."""
    uncompressed_bytes: int
    """Bytes of all its pages after decompression, from the footer; the pages may not exceed it."""
    num_values: int
    num_levels: int
    """Lists of levels before the values of a page: 0; 1 with nulls; 2 with nulls and lists."""
    compression: str
    """The footer's name of it."""
    is_unrepeated: bool
    """True if the footer names neither a dictionary nor another encoding that repeats bytes."""
    _next_page: int = field(init=False)
    _uncompressed: int = field(default=0, init=False)
    _num_values: int = field(default=0, init=False)
    dictionary_bytes: int = field(default=0, init=False)
    page_bytes: int = field(default=0, init=False)
    """Bytes of the largest page so far."""

    def __post_init__(self) -> None:
        self._next_page = self.start

    def check(self, start: int, data: memoryview, read_at: ReadAt) -> None:
        """Checks the headers that begin in `data`, which are the file's bytes from `start` on. Raises ValueError."""
        stop = min(start + len(data), self.start + self.num_bytes)
        while start <= self._next_page < stop and self._num_values < self.num_values:
            header, size = self._header(start, data, read_at)
            self._count_page(header)
            self._check_deltas(header, self._next_page + size, read_at)
            self._next_page += size + _field(header, 3)

    def _header(self, start: int, data: memoryview, read_at: ReadAt) -> tuple[dict[int, Any], int]:
        """The next header and its length."""
        offset = self._next_page - start
        for more in (0, *HEADER_BYTES):
            try:
                if more:
                    data, offset = memoryview(read_at(self._next_page, more)), 0
                header, stop = struct_at(data, offset)
            except IndexError:
                continue
            if stop <= len(data):
                return header, stop - offset
        raise ValueError(f"{self.where}: the page at byte {self._next_page} has no readable header")

    def _count_page(self, header: dict[int, Any]) -> None:
        uncompressed, stored = _field(header, 2), _field(header, 3)
        self._uncompressed += uncompressed
        if uncompressed > MAX_PAGES_BYTES:
            raise ValueError(
                f"{self.where}: a page decompresses to {uncompressed} bytes, at most {MAX_PAGES_BYTES} are read"
            )
        if stored > uncompressed + uncompressed // 8 + SLACK_BYTES:
            raise ValueError(f"{self.where}: a page of {uncompressed} bytes is stored in {stored}")
        if self._uncompressed > self.uncompressed_bytes:
            raise ValueError(
                f"{self.where}: its pages decompress to {self._uncompressed} bytes or more; the footer says "
                f"{self.uncompressed_bytes}"
            )
        if _field(header, 1) == DICTIONARY:
            self._count_dictionary(uncompressed, _field(header.get(7), 1))
        else:
            self._count_data_page(uncompressed, header)

    def _count_dictionary(self, uncompressed: int, num_entries: int) -> None:
        if self.is_unrepeated or num_entries > uncompressed:
            raise ValueError(f"{self.where}: a dictionary of {num_entries} entries in {uncompressed} bytes")
        self.dictionary_bytes += uncompressed + BYTES_PER_ENTRY * num_entries

    def _count_data_page(self, uncompressed: int, header: dict[int, Any]) -> None:
        self.page_bytes = max(self.page_bytes, uncompressed)
        values = _data_page_values(header)
        if values is None:
            return  # an index page, which Arrow skips
        num_values, encoding = values
        self._num_values += num_values
        if self._num_values > self.num_values or (self.is_unrepeated and encoding not in UNREPEATED):
            raise ValueError(
                f"{self.where}: its pages have {self._num_values} values in encoding {encoding}; the footer says "
                f"{self.num_values}{', each written out' if self.is_unrepeated else ''}"
            )

    def _check_deltas(self, header: dict[int, Any], start: int, read_at: ReadAt) -> None:
        """Checks a delta-encoded page, which states its number of values once more."""
        values = _data_page_values(header)
        if values is None or values[1] not in DELTAS:
            return
        uncompressed, second = _field(header, 2), header[8] if _field(header, 1) == DATA_2 else None
        body = read_at(start, _field(header, 3))
        if second is None:
            page, num_levels = decompressed_page(body, self.compression, uncompressed), self.num_levels
        else:  # levels are not compressed, and their lengths are in the header
            levels = _field(second, 5) + _field(second, 6)
            is_compressed = second.get(7, True)
            body, uncompressed = body[levels:], uncompressed - levels
            page = decompressed_page(body, self.compression, uncompressed) if is_compressed else body
            num_levels = 0
        check_deltas(page, values[1], num_levels, values[0])


def _data_page_values(header: dict[int, Any]) -> tuple[int, int] | None:
    """Number and encoding of a data page's values; None for another kind of page."""
    kind = _field(header, 1)
    if kind == DATA:
        return _field(header.get(5), 1), _field(header.get(5), 2)
    return (_field(header.get(8), 1), _field(header.get(8), 4)) if kind == DATA_2 else None


class ClosedPagesError(ValueError):
    """Raised if Arrow reads pages before `expect` allows it."""


class GuardedFile(SeekableFile):
    """A Parquet file for Arrow, with a given tail in place of its own; checks page headers before Arrow reads them.

    `read` raises ValueError if the pages of the expected chunks would take more than `MAX_PAGES_BYTES` together,
    and ClosedPagesError if no chunks are expected.
    """

    def __init__(self, size: int, read_at: ReadAt, tail: bytes) -> None:
        super().__init__(size)
        self.tail = tail
        self._read_at = read_at
        self._chunks: Sequence[Chunk] | None = ()

    def expect(self, chunks: Sequence[Chunk] | None) -> None:
        """Sets the chunks that Arrow may read from now on; None: none."""
        self._chunks = chunks

    def read(self, size: int | None = -1) -> bytes:
        if self._chunks is None:
            raise ClosedPagesError
        start = self.position
        data = self._bytes(start, self.num_wanted(size))
        for chunk in self._chunks:
            chunk.check(start, memoryview(data), self._read_at)
        held = sum(chunk.dictionary_bytes + chunk.page_bytes for chunk in self._chunks)
        if held > MAX_PAGES_BYTES:
            names = ", ".join(chunk.where for chunk in self._chunks)
            raise ValueError(
                f"{names}: pages of {held} bytes must be in memory at once, at most {MAX_PAGES_BYTES} may; write it "
                f"with fewer rows per row group"
            )
        self.position += len(data)
        return data

    def _bytes(self, start: int, size: int) -> bytes:
        """Bytes from the file, or from the given tail."""
        border = self.size - len(self.tail)
        if start >= border:
            return self.tail[start - border : start - border + size]
        head = self._read_at(start, min(size, border - start))
        return head if start + size <= border else head + self.tail[: start + size - border]


def _field(header: Any, number: int) -> int:
    """A field's value. Raises ValueError if it is not a number from 0 on."""
    value = header.get(number) if isinstance(header, dict) else None
    if not isinstance(value, int) or value < 0:
        raise ValueError(f"a page's header has {value} for field {number}; wanted a number from 0")
    return value
