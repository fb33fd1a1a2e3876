"""Reads a WebP file's size: Pillow allocates the canvas before it reports the size."""

import struct

from blocksight.storage.images.headers import Samples, refuse_large


class WebpError(ValueError):
    """The file breaks a rule of WebP."""


def samples_of(data: bytes, max_pixels: int) -> Samples:
    """Size from the first chunk. Raises Reject, WebpError, and struct.error if the file is cut."""
    kind = data[12:16]
    if kind == b"VP8X":
        wide, high = (int.from_bytes(data[at : at + 3], "little") + 1 for at in (24, 27))
    elif kind == b"VP8L" and data[20:21] == b"\x2f":
        (sizes,) = struct.unpack_from("<I", data, 21)
        wide, high = (sizes & 0x3FFF) + 1, (sizes >> 14 & 0x3FFF) + 1
    elif kind == b"VP8 " and data[23:26] == b"\x9d\x01\x2a":
        wide, high = (size & 0x3FFF for size in struct.unpack_from("<HH", data, 26))
    else:
        raise WebpError(f"its first chunk is {kind!r}; wanted `VP8 `, `VP8L` or `VP8X`")
    refuse_large(wide, high, max_pixels)
    return Samples("WEBP", data, wide, high)
