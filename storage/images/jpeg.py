"""Reads a JPEG file's segments, and rejects the kinds that Pillow would read wrongly."""

import struct
from collections.abc import Iterator

from blocksight.storage.images.headers import Samples, refuse_large
from blocksight.storage.limits import MAX_JPEG_SEGMENTS
from blocksight.storage.rejects import Reject, RejectCode

START_OF_SCAN, APP14 = 0xDA, 0xEE
FRAMES = {
    **{0xC0 + kind: "" for kind in (0, 1, 2)},
    0xC3: "lossless",
    **{0xC0 + kind: "hierarchical" for kind in (5, 6, 7)},
    **{0xC0 + kind: "arithmetic coding" for kind in (9, 10, 11, 13, 14, 15)},
}
"""Frame markers, and why a kind is not read; empty: it is read (baseline, extended, progressive)."""

WITHOUT_LENGTH = {0x01, *range(0xD0, 0xD9)}


class JpegError(ValueError):
    """The file breaks a rule of JPEG."""


def samples_of(data: bytes, max_pixels: int) -> Samples:
    """Size from the file's segments. Raises Reject, JpegError; struct.error or IndexError if the file is cut."""
    has_adobe, frame = False, None
    for number, (marker, body) in enumerate(_segments(data)):
        if number == MAX_JPEG_SEGMENTS:
            raise JpegError(f"it has more than {MAX_JPEG_SEGMENTS} segments before its pixels")
        has_adobe |= marker == APP14 and bytes(body[:5]) == b"Adobe"
        if marker in FRAMES and frame is None:
            frame = marker, *struct.unpack_from(">BHHB", body)
    if frame is None:
        raise JpegError("it has no frame")
    marker, depth, height, width, layers = frame
    refuse_large(width, height, max_pixels)
    if FRAMES[marker]:
        raise _mode_reject(f"{FRAMES[marker]} (frame {marker:02X})", "baseline, extended or progressive")
    if depth != 8 or layers not in (1, 3, 4):
        raise _mode_reject(f"{layers} layers of {depth} bits", "1, 3 or 4 layers of 8 bits")
    if layers == 4 and not has_adobe:
        raise _mode_reject("CMYK without Adobe's marker, which says that ink is inverted", "CMYK with it")
    return Samples("JPEG", data, width, height)


def _segments(data: bytes) -> Iterator[tuple[int, memoryview]]:
    """Marker and body of each segment before the first scan."""
    view, offset = memoryview(data), 2
    while True:
        offset = data.find(b"\xff", offset)
        if offset < 0:
            raise JpegError("the file is truncated: it ends before its pixels begin")
        marker = data[offset + 1]
        if marker in (0x00, 0xFF):
            offset += 1
        elif marker in WITHOUT_LENGTH:
            offset += 2
        elif marker in (START_OF_SCAN, 0xD9):
            return
        else:
            (length,) = struct.unpack_from(">H", data, offset + 2)
            yield marker, view[offset + 4 : offset + 2 + length]
            offset += 2 + max(2, length)


def _mode_reject(what: str, wanted: str) -> Reject:
    return Reject(RejectCode.MODE_REFUSED, f"a JPEG of {what} is not read; wanted {wanted}")
