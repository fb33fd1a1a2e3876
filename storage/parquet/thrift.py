"""Reads Thrift's compact protocol, as far as the headers of Parquet's pages need it."""

from typing import Any

Bytes = bytes | memoryview

MAX_DEPTH = 8
"""Nested structs of one header; the format has three levels."""

_BOOLS, _BYTE, _INTS, _DOUBLE, _BINARY, _LISTS, _MAP, _STRUCT = (1, 2), 3, (4, 5, 6), 7, 8, (9, 10), 11, 12
_INT32 = 5
"""Type numbers of Thrift's compact protocol."""


def struct_at(data: Bytes, at: int, depth: int = 0) -> tuple[dict[int, Any], int]:
    """A struct's 32-bit numbers, booleans and structs by field number, and the offset after it.

    Raises IndexError if the data ends too early, and ValueError for other types of fields.
    """
    fields: dict[int, Any] = {}
    number = 0
    while (first := data[at]) != 0:
        at += 1
        kind = first & 15
        if first >> 4:
            number += first >> 4
        else:
            number, at = _signed(data, at)
        if kind == _STRUCT and depth < MAX_DEPTH:
            fields[number], at = struct_at(data, at, depth + 1)
        elif kind in _BOOLS:
            fields[number] = kind == _BOOLS[0]
        elif kind == _INT32:
            fields[number], at = _signed(data, at)
        else:
            at = _end_of_value(data, at, kind, depth)
    return fields, at + 1


def _end_of_value(data: Bytes, at: int, kind: int, depth: int) -> int:
    """Offset after a field's value that is not used."""
    if kind == _BYTE:
        return at + 1
    if kind in _INTS:
        return number_at(data, at)[1]
    if kind == _DOUBLE:
        return at + 8
    if kind == _BINARY:
        length, at = number_at(data, at)
        return at + length
    raise ValueError(f"a page's header has a field of type {kind}, {depth} structs deep; the format has none there")


def _signed(data: Bytes, at: int) -> tuple[int, int]:
    value, at = number_at(data, at)
    return (value >> 1) ^ -(value & 1), at


def number_at(data: Bytes, at: int) -> tuple[int, int]:
    """A number with 7 bits per byte, low bits first, and the offset after it."""
    value = shift = 0
    while shift < 70:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7
    raise ValueError("a page's header has a number of more than ten bytes")
