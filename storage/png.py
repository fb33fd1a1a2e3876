"""The chunks of a PNG file: cut, ordered and summed as they should be, without unfolding any of them."""

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

SIGNATURE = b"\x89PNG\r\n\x1a\n"

_HEADER = struct.Struct(">IIBBBBB")
_START = struct.Struct(">I4s")
_SUM = struct.Struct(">I")
_MAX_LENGTH = 2**31 - 1


class PngError(ValueError):
    """The file breaks a rule of PNG."""


class CutPngError(PngError):
    """The file ends before its last chunk does."""


@dataclass(frozen=True)
class PngHeader:
    """The fields of IHDR."""

    width: int
    height: int
    depth: int
    """Bits per sample."""
    colour: int
    """0 grey, 2 RGB, 3 palette, 4 grey with alpha, 6 RGB with alpha."""
    compression: int
    filtering: int
    interlace: int


def header_of(body: memoryview | bytes) -> PngHeader:
    """The fields of an IHDR chunk. Raises PngError."""
    if len(body) != _HEADER.size:
        raise PngError(f"its IHDR chunk has {len(body)} bytes, not {_HEADER.size}")
    return PngHeader(*_HEADER.unpack(body))


def chunks(data: bytes) -> Iterator[tuple[bytes, memoryview]]:
    """Kind and body of each chunk up to IEND, with its checksum verified. Raises PngError and CutPngError.

    The first chunk is IHDR, and there is no second one.
    """
    if not data.startswith(SIGNATURE):
        raise PngError(f"it begins with {data[:8]!r}, not as a PNG")
    view, place, kind = memoryview(data), len(SIGNATURE), b""
    while kind != b"IEND":
        before, (kind, body) = kind, _chunk(view, place)
        if (before == b"") != (kind == b"IHDR"):
            raise PngError(f"chunk {kind!r} follows {before!r}; IHDR comes first and once")
        yield kind, body
        place += len(body) + _START.size + _SUM.size


def _chunk(view: memoryview, place: int) -> tuple[bytes, memoryview]:
    if len(view) < place + _START.size:
        raise CutPngError(f"the file is truncated: it ends after {len(view)} bytes without an IEND chunk")
    length, kind = _START.unpack_from(view, place)
    if not kind.isalpha() or length > _MAX_LENGTH:
        raise PngError(f"{kind!r} with {length} bytes is no chunk")
    start, stop = place + _START.size, place + _START.size + length
    if len(view) < stop + _SUM.size:
        raise CutPngError(
            f"the file is truncated: chunk {kind!r} needs {stop + _SUM.size} bytes, there are {len(view)}"
        )
    found = zlib.crc32(view[place + 4 : stop])
    (named,) = _SUM.unpack_from(view, stop)
    if found != named:
        raise PngError(f"chunk {kind!r} has checksum {found:08x}, and says {named:08x}")
    return kind, view[start:stop]
