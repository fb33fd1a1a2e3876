"""Writes Parquet files byte by byte, so that they can hold what no library writes."""

import struct
from collections.abc import Sequence
from dataclasses import dataclass

BYTE_ARRAY = 6
PLAIN, RLE_DICTIONARY, DELTA_LENGTHS, DELTA_PREFIXES = 0, 8, 6, 7
UNCOMPRESSED, ZSTD = 0, 6


def number(value: int) -> bytes:
    """A number as Thrift's varint: 7 bits in each byte, low bits first."""
    out = b""
    while value > 127:
        out += bytes([value & 127 | 128])
        value >>= 7
    return out + bytes([value])


def signed(value: int) -> bytes:
    return number(value << 1 if value >= 0 else (-value << 1) - 1)


class Struct:
    """A struct of Thrift's compact protocol, field by field."""

    def __init__(self) -> None:
        self.body, self.last = b"", 0

    def field(self, place: int, kind: int, value: bytes) -> "Struct":
        self.body += bytes([(place - self.last) << 4 | kind]) + value
        self.last = place
        return self

    def i32(self, place: int, value: int) -> "Struct":
        return self.field(place, 5, signed(value))

    def i64(self, place: int, value: int) -> "Struct":
        return self.field(place, 6, signed(value))

    def text(self, place: int, value: bytes) -> "Struct":
        return self.field(place, 8, number(len(value)) + value)

    def struct(self, place: int, value: "Struct") -> "Struct":
        return self.field(place, 12, value.done())

    def items(self, place: int, kind: int, values: Sequence[bytes]) -> "Struct":
        head = bytes([0xF0 | kind]) + number(len(values))
        return self.field(place, 9, head + b"".join(values))

    def done(self) -> bytes:
        return self.body + b"\0"


def cell(data: bytes) -> bytes:
    """A value in the encoding PLAIN."""
    return struct.pack("<I", len(data)) + data


def page(body: bytes, num_values: int, encoding: int = PLAIN, unfolded: int | None = None) -> bytes:
    """A data page of required values, without levels. `unfolded` is the length after decompression that it declares."""
    head = Struct().i32(1, 0).i32(2, len(body) if unfolded is None else unfolded).i32(3, len(body))
    return head.struct(5, Struct().i32(1, num_values).i32(2, encoding).i32(3, 3).i32(4, 3)).done() + body


def page_2(body: bytes, num_values: int, encoding: int, unfolded: int) -> bytes:
    """A data page of version 2."""
    values = Struct().i32(1, num_values).i32(2, 0).i32(3, num_values).i32(4, encoding).i32(5, 0).i32(6, 0)
    return Struct().i32(1, 3).i32(2, unfolded).i32(3, len(body)).struct(8, values).done() + body


def dictionary(body: bytes, num_entries: int, unfolded: int | None = None) -> bytes:
    """A dictionary page."""
    head = Struct().i32(1, 2).i32(2, len(body) if unfolded is None else unfolded).i32(3, len(body))
    return head.struct(7, Struct().i32(1, num_entries).i32(2, PLAIN)).done() + body


@dataclass
class Column:
    """A row group's only column, `image`, with the values that the footer declares."""

    pages: Sequence[bytes]
    num_rows: int
    encodings: Sequence[int] = (PLAIN,)
    codec: int = UNCOMPRESSED
    unfolded: int | None = None
    """None: the length of the pages."""
    dictionary_bytes: int = 0
    """Length of the first page if it is a dictionary."""
    num_values: int | None = None


def parquet(*groups: Column, num_rows: int | None = None) -> bytes:
    """The file's bytes; `num_rows` is the count that the footer declares."""
    body, chunks = b"PAR1", []
    for group in groups:
        start, stored = len(body), b"".join(group.pages)
        body += stored
        facts = Struct().i32(1, BYTE_ARRAY).items(2, 5, [signed(one) for one in group.encodings])
        facts.items(3, 8, [cell_name(b"image")]).i32(4, group.codec)
        facts.i64(5, group.num_rows if group.num_values is None else group.num_values)
        facts.i64(6, len(stored) if group.unfolded is None else group.unfolded).i64(7, len(stored))
        facts.i64(9, start + group.dictionary_bytes)
        if group.dictionary_bytes:
            facts.i64(11, start)
        chunk = Struct().i64(2, start).struct(3, facts)
        chunks.append(Struct().items(1, 12, [chunk.done()]).i64(2, len(stored)).i64(3, group.num_rows).done())
    root = Struct().text(4, b"root").i32(5, 1)
    leaf = Struct().i32(1, BYTE_ARRAY).i32(3, 0).text(4, b"image")
    total = sum(group.num_rows for group in groups) if num_rows is None else num_rows
    footer = Struct().i32(1, 1).items(2, 12, [root.done(), leaf.done()]).i64(3, total).items(4, 12, chunks).done()
    return body + footer + struct.pack("<I", len(footer)) + b"PAR1"


def cell_name(name: bytes) -> bytes:
    """A text as an element of a list."""
    return number(len(name)) + name


def delta_bomb(num_values: int) -> bytes:
    """The delta-encoded lengths of `num_values` empty texts: a whole block takes two bytes."""
    block = 1 << 27
    blocks = (signed(0) + b"\0") * (num_values // block + 1)
    return number(block) + number(1) + number(num_values) + signed(0) + blocks
