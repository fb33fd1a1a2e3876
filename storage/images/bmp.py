"""What a BMP file says about its pixels, and which of its kinds are read."""

import struct

from blocksight.storage.images.headers import Samples, refuse_large
from blocksight.storage.rejects import Reject, RejectCode

PLAIN, RLE8, RLE4, BITFIELDS = range(4)
END_OF_ROW, END_OF_PICTURE, MOVE = range(3)
"""What stands behind a zero in place of a run; greater numbers are pixels that are written out."""
HEADERS = (12, 40, 52, 56, 108, 124)
"""Sizes of the headers that are read: OS/2 1, and Windows 3 to 5."""

KINDS = {(1, PLAIN), (4, PLAIN), (8, PLAIN), (16, PLAIN), (24, PLAIN), (32, PLAIN), (8, RLE8), (4, RLE4)}
KINDS |= {(16, BITFIELDS), (24, BITFIELDS), (32, BITFIELDS)}
"""Bits per pixel and compression."""


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
"""Red, green, blue and alpha, which Pillow reads of 32 bits alone, by bits per pixel."""


class BmpError(ValueError):
    """The file breaks a rule of BMP."""


def described(data: bytes, most_pixels: int) -> Samples:
    """Size and palette by the file's header. Raises Reject, BmpError, and struct.error where it is cut."""
    start, size = struct.unpack_from("<II", data, 10)
    if size not in HEADERS:
        raise _refused(f"a header of {size} bytes", f"one of {HEADERS}")
    if size == 12:
        width, height, _, bits = struct.unpack_from("<HHHH", data, 18)
        compression, named = PLAIN, 0
    else:
        width, height, _, bits, compression = struct.unpack_from("<iiHHI", data, 18)
        (named,) = struct.unpack_from("<I", data, 46)
    refuse_large(width, abs(height), most_pixels)
    if (bits, compression) not in KINDS:
        raise _refused(
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
        raise _refused(f"{bits} bits with masks {named}", "those of whole bytes, 5 5 5 or 5 6 5")


def _check_palette(palette: bytes, num_colours: int, bits: int, entry_bytes: int) -> None:
    """Raises Reject for the palettes that Pillow takes for none, and so reads at a wrong depth; and BmpError."""
    if num_colours > 2**bits or len(palette) < num_colours * entry_bytes:
        raise BmpError(f"it names {num_colours} colours of {bits} bits, and has {len(palette)} bytes of them")
    greys = (0, 255) if num_colours == 2 else range(num_colours)
    is_ramp = all(
        palette[at * entry_bytes : at * entry_bytes + 3] == bytes([grey] * 3) for at, grey in enumerate(greys)
    )
    if is_ramp and bits != (1 if num_colours == 2 else 8):
        raise _refused(f"{bits} bits with a palette of the greys {tuple(greys)}", "another palette, or another depth")


def _check_runs(runs: memoryview, width: int, height: int, bits: int) -> None:
    """Raises BmpError where pixels lie beyond their row or the picture: Pillow would shift what follows them."""
    column = row = place = 0
    while place + 1 < len(runs):
        count, value = runs[place], runs[place + 1]
        place += 2
        if not count and value == END_OF_PICTURE:
            return
        if not count and value == END_OF_ROW:
            column, row = 0, row + 1
            continue
        if not count and value == MOVE:
            right, up = bytes(runs[place : place + 2]).ljust(2, b"\0")
            column, row, place = column + right, row + up, place + 2
            continue
        if not count:
            place += (value * bits + 15) // 16 * 2  # written out, in whole words
        column += count or value
        if column > width or row >= height:
            raise BmpError(f"its runs reach column {column} in row {row} of {width} x {height} pixels")


def _refused(what: str, wanted: str) -> Reject:
    return Reject(RejectCode.MODE_REFUSED, f"a BMP of {what} is not read; wanted {wanted}")
