"""Reads a BMP file's header, and rejects the kinds that Pillow would read wrongly."""

import struct

from blocksight.storage.images.headers import Samples, refuse_large
from blocksight.storage.rejects import Reject, RejectCode

UNCOMPRESSED, RLE8, RLE4, BITFIELDS = range(4)
END_OF_ROW, END_OF_BITMAP, DELTA = range(3)
"""Codes that follow a zero in place of a run; greater numbers are counts of literal pixels."""
HEADER_SIZES = (12, 40, 52, 56, 108, 124)
"""Sizes in bytes of the headers that are read: OS/2 1, and Windows 3 to 5."""

READ_KINDS = {
    *((bits, UNCOMPRESSED) for bits in (1, 4, 8, 16, 24, 32)),
    *((8, RLE8), (4, RLE4)),
    *((bits, BITFIELDS) for bits in (16, 24, 32)),
}
"""Pairs of bits per pixel and compression that are read."""

MASKS = {
    16: {(0xF800, 0x7E0, 0x1F, 0), (0x7C00, 0x3E0, 0x1F, 0)},
    24: {(0xFF0000, 0xFF00, 0xFF, 0)},
    32: {
        *((0xFF0000, 0xFF00, 0xFF, alpha) for alpha in (0, 0xFF000000)),
        *((0xFF000000, 0xFF0000, 0xFF00, alpha) for alpha in (0, 0xFF)),
        *((0xFF000000, 0xFF00, 0xFF, alpha) for alpha in (0, 0xFF0000)),
        (0xFF, 0xFF00, 0xFF0000, 0xFF000000),
    },
}
"""The masks that are read (red, green, blue, alpha), by bits per pixel. Pillow reads alpha at 32 bits alone."""


class BmpError(ValueError):
    """The file breaks a rule of BMP."""


def samples_of(data: bytes, max_pixels: int) -> Samples:
    """Size and palette from the file's header. Raises Reject, BmpError, and struct.error if the file is cut."""
    start, size = struct.unpack_from("<II", data, 10)
    if size not in HEADER_SIZES:
        raise _mode_reject(f"a header of {size} bytes", f"one of {HEADER_SIZES}")
    if size == 12:
        width, height, _, bits = struct.unpack_from("<HHHH", data, 18)
        compression, named = UNCOMPRESSED, 0
    else:
        width, height, _, bits, compression = struct.unpack_from("<iiHHI", data, 18)
        (named,) = struct.unpack_from("<I", data, 46)
    refuse_large(width, abs(height), max_pixels)
    if (bits, compression) not in READ_KINDS:
        raise _mode_reject(
            f"{bits} bits in compression {compression}", "1, 4, 8, 16, 24 or 32 bits, plain or packed in runs"
        )
    if compression == BITFIELDS:
        _check_masks(data, size, bits)
    if width <= 0 or height == 0 or (compression in (RLE8, RLE4) and height < 0):
        raise BmpError(f"it is {width} x {height} pixels")
    if bits > 8:
        return Samples("BMP", data, width, abs(height))
    num_colours = named or 2**bits
    palette = data[14 + size : start][: num_colours * (3 if size == 12 else 4)]
    _check_palette(palette, num_colours, bits, 3 if size == 12 else 4)
    if compression in (RLE8, RLE4):
        _check_runs(memoryview(data)[start:], width, height, bits)
    return Samples("BMP", data, width, abs(height), num_colours=num_colours)


def _check_masks(data: bytes, size: int, bits: int) -> None:
    red, green, blue = struct.unpack_from("<III", data, 54)
    (alpha,) = struct.unpack_from("<I", data, 66) if size >= 56 else (0,)
    found = (red, green, blue, alpha)
    if found not in MASKS[bits]:
        named = ", ".join(f"{mask:X}" for mask in found)
        raise _mode_reject(f"{bits} bits with masks {named}", "those of whole bytes, 5 5 5 or 5 6 5")


def _check_palette(palette: bytes, num_colours: int, bits: int, entry_bytes: int) -> None:
    """Raises BmpError, and Reject for a palette that Pillow ignores: it would read the pixels at a wrong depth."""
    if num_colours > 2**bits or len(palette) < num_colours * entry_bytes:
        raise BmpError(f"it names {num_colours} colours of {bits} bits, and has {len(palette)} bytes of them")
    greys = (0, 255) if num_colours == 2 else range(num_colours)
    is_ramp = all(
        palette[at * entry_bytes : at * entry_bytes + 3] == bytes([grey] * 3) for at, grey in enumerate(greys)
    )
    if is_ramp and bits != (1 if num_colours == 2 else 8):
        raise _mode_reject(
            f"{bits} bits with a palette of the greys {tuple(greys)}", "another palette, or another depth"
        )


def _check_runs(runs: memoryview, width: int, height: int, bits: int) -> None:
    """Raises BmpError if pixels lie beyond their row or the picture: Pillow would shift the pixels after them."""
    column = row = offset = 0
    while offset + 1 < len(runs):
        count, value = runs[offset], runs[offset + 1]
        offset += 2
        if not count and value == END_OF_BITMAP:
            return
        if not count and value == END_OF_ROW:
            column, row = 0, row + 1
            continue
        if not count and value == DELTA:
            right, up = bytes(runs[offset : offset + 2]).ljust(2, b"\0")
            column, row, offset = column + right, row + up, offset + 2
            continue
        if not count:
            offset += (value * bits + 15) // 16 * 2  # literal pixels, padded to 16 bits
        column += count or value
        if column > width or row >= height:
            raise BmpError(f"its runs reach column {column} in row {row} of {width} x {height} pixels")


def _mode_reject(what: str, wanted: str) -> Reject:
    return Reject(RejectCode.MODE_REFUSED, f"a BMP of {what} is not read; wanted {wanted}")
