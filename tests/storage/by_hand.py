"""Writes image files byte by byte, in kinds that no library writes: their pixels are known without a decoder."""

import struct
import zlib
from collections.abc import Mapping, Sequence

import numpy as np

ADAM7 = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))
"""First row, first column and their steps, for each pass of interlacing."""


def chunk(kind: bytes, body: bytes) -> bytes:
    """One chunk of a PNG."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_of(*chunks: bytes) -> bytes:
    """A PNG of these chunks and its end."""
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks) + chunk(b"IEND", b"")


def packed(values: np.ndarray, depth: int, order: str = ">") -> bytes:
    """Packs samples [H, W, C] of `depth` bits into rows of whole bytes."""
    rows = values.reshape(len(values), -1)
    if depth in (8, 16):
        return rows.astype(f"{order}u{depth // 8}").tobytes()
    bits = rows[..., None] >> np.arange(depth - 1, -1, -1) & 1
    return np.packbits(bits.reshape(len(rows), -1), axis=1).tobytes()


def png(values: np.ndarray, depth: int, colour: int, *before: bytes, interlaced: bool = False) -> bytes:
    """A PNG of samples [H, W, C], without filters; `before`: chunks in front of the pixels."""
    height, width = values.shape[:2]
    passes = ADAM7 if interlaced else ((0, 0, 1, 1),)
    parts = [values[row::down, column::right] for row, column, down, right in passes]
    lines = b"".join(b"\0" + packed(line[None], depth) for part in parts if part.size for line in part)
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, int(interlaced))
    return png_of(chunk(b"IHDR", header), *before, chunk(b"IDAT", zlib.compress(lines)))


def tiff(
    values: np.ndarray,
    depth: int,
    photometric: int,
    order: str = "<",
    tags: Mapping[int, Sequence[int]] = {},
    *,
    planar: bool = False,
) -> bytes:
    """An uncompressed TIFF of samples [H, W, C] in one strip, or one strip for each plane; `tags` adds or replaces."""
    height, width, num_samples = values.shape
    planes = [values[..., place : place + 1] for place in range(num_samples)] if planar else [values]
    strips = [packed(plane, depth, order) for plane in planes]
    offsets = [8 + sum(map(len, strips[:place])) for place in range(len(strips))]
    entries: dict[int, Sequence[int]] = {
        **{256: [width], 257: [height], 258: [depth] * num_samples, 259: [1], 262: [photometric]},
        **{273: offsets, 277: [num_samples], 278: [height], 279: [len(strip) for strip in strips]},
        **{284: [2 if planar else 1]},
        **tags,
    }
    body = b"".join(strips)
    body += bytes(len(body) % 2)
    rows, beyond = [], b""
    after = 8 + len(body) + 2 + 12 * len(entries) + 4
    for tag, numbers in sorted(entries.items()):
        kind, letter = (4, "I") if tag in (273, 279) else (3, "H")
        field = struct.pack(f"{order}{len(numbers)}{letter}", *numbers)
        if len(field) > 4:
            field, beyond = struct.pack(order + "I", after + len(beyond)), beyond + field + bytes(len(field) % 2)
        rows.append(struct.pack(order + "HHI", tag, kind, len(numbers)) + field.ljust(4, b"\0"))
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", 8 + len(body))
    return head + body + struct.pack(order + "H", len(rows)) + b"".join(rows) + bytes(4) + beyond


def bmp(
    rows: bytes,
    width: int,
    height: int,
    bits: int,
    *,
    compression: int = 0,
    palette: bytes = b"",
    masks: Sequence[int] = (),
) -> bytes:
    """A BMP with a header of Windows 3, or of Windows 5 if it has four masks."""
    named = len(palette) // 4 if bits <= 8 else 0
    size = 108 if len(masks) == 4 else 40
    header = struct.pack("<IiiHHIIiiII", size, width, height, 1, bits, compression, len(rows), 0, 0, named, 0)
    header += struct.pack(f"<{len(masks)}I", *masks)
    if size == 108:
        header = header.ljust(108, b"\0")
    start = 14 + len(header) + len(palette)
    return b"BM" + struct.pack("<IHHI", start + len(rows), 0, 0, start) + header + palette + rows
