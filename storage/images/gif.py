"""Reads a GIF file's headers: position and colours of its first frame."""

import struct

from blocksight.storage.images.headers import Samples, refuse_large
from blocksight.storage.rejects import Reject, RejectCode

_SCREEN = struct.Struct("<6sHHBBB")
_FRAME = struct.Struct("<HHHHB")
EXTENSION, FRAME, GRAPHIC_CONTROL = 0x21, 0x2C, 0xF9


class GifError(ValueError):
    """The file breaks a rule of GIF."""


def samples_of(data: bytes, max_pixels: int) -> Samples:
    """Size and colours of the first frame. Raises Reject, GifError; struct.error or IndexError if the file is cut."""
    _, width, height, flags, _, _ = _SCREEN.unpack_from(data)
    global_bytes = _table_bytes(flags)
    offset, transparent = _first_frame(data, _SCREEN.size + global_bytes)
    left, top, frame_width, frame_height, frame_flags = _FRAME.unpack_from(data, offset)
    table_bytes = _table_bytes(frame_flags) or global_bytes
    if not table_bytes:
        raise GifError("its first frame has no colour table")
    if left + frame_width > width or top + frame_height > height:
        if left or top:
            raise GifError(f"its first frame ends at {left + frame_width} x {top + frame_height} of {width} x {height}")
        width, height = max(width, frame_width), max(height, frame_height)
    refuse_large(width, height, max_pixels)
    covered = (left, top, frame_width, frame_height) == (0, 0, width, height)
    if not covered and transparent is None:
        raise Reject(
            RejectCode.MODE_REFUSED,
            f"the first frame of a GIF covers {frame_width} x {frame_height} of {width} x {height} pixels and names no "
            "transparent colour: readers do not agree on the rest",
        )
    key = None if transparent is None else (transparent,)
    return Samples("GIF", data, width, height, num_colours=table_bytes // 3, transparent_index=transparent, key=key)


def _table_bytes(flags: int) -> int:
    return 3 << ((flags & 7) + 1) if flags & 0x80 else 0


def _first_frame(data: bytes, offset: int) -> tuple[int, int | None]:
    """Offset of the first frame's rectangle, and the transparent index from an extension before it, if any."""
    transparent = None
    while data[offset] != FRAME:
        if data[offset] == 0:  # some writers write two block terminators
            offset += 1
            continue
        if data[offset] != EXTENSION:
            raise GifError(f"a block begins with {data[offset]}; wanted an extension or a frame")
        if data[offset + 1] == GRAPHIC_CONTROL and data[offset + 3] & 1:
            transparent = data[offset + 6]
        offset += 2
        while data[offset]:
            offset += data[offset] + 1
        offset += 1
    return offset + 1, transparent
