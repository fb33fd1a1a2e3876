"""Reads a PNG file's chunks and collects the facts about its pixels; writes grey PNG files."""

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

from blocksight.storage.images.headers import Samples, refuse_large
from blocksight.storage.images.tiff import orientation_of

SIGNATURE = b"\x89PNG\r\n\x1a\n"

DEPTHS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}
"""Bits per sample, by colour type."""
NUM_KEYS = {0: 1, 2: 3}
"""Samples of the transparent colour in tRNS, by colour type."""

RAW_PROFILE = b"Raw profile type exif"
"""The keyword of ImageMagick's EXIF, which is hexadecimal text."""
MAX_RAW_PROFILE_BYTES = 1 << 20

PASSES = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
"""First column, first row and their steps for each pass of an interlaced picture (Adam7)."""
NUM_SAMPLES = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
"""Samples per pixel, by colour type."""

_PIECE_BYTES = 1 << 16
_HEADER = struct.Struct(">IIBBBBB")
_START = struct.Struct(">I4s")
_SUM = struct.Struct(">I")
_MAX_LENGTH = 2**31 - 1


class PngError(ValueError):
    """The file breaks a rule of PNG."""


class CutPngError(PngError):
    """The file ends before its last chunk ends."""


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


def num_pixel_bytes(header: PngHeader) -> int:
    """Bytes of the decompressed pixels, with one filter byte per row."""
    bits, total = header.depth * NUM_SAMPLES[header.colour], 0
    for column, row, right, down in PASSES if header.interlace else ((0, 0, 1, 1),):
        wide, high = max(0, -(-(header.width - column) // right)), max(0, -(-(header.height - row) // down))
        total += high * (1 + (wide * bits + 7) // 8) if wide else 0
    return total


def chunks(data: bytes) -> Iterator[tuple[bytes, memoryview]]:
    """Kind and body of each chunk up to IEND. Verifies checksums. Raises PngError and CutPngError.

    The first chunk must be IHDR, and the only one.
    """
    if not data.startswith(SIGNATURE):
        raise PngError(f"it begins with {data[:8]!r}, not as a PNG")
    view, offset, kind = memoryview(data), len(SIGNATURE), b""
    while kind != b"IEND":
        before, (kind, body) = kind, _chunk(view, offset)
        if (before == b"") != (kind == b"IHDR"):
            raise PngError(f"chunk {kind!r} follows {before!r}; IHDR comes first and once")
        yield kind, body
        offset += len(body) + _START.size + _SUM.size


def _chunk(view: memoryview, offset: int) -> tuple[bytes, memoryview]:
    if len(view) < offset + _START.size:
        raise CutPngError(f"the file is truncated: it ends after {len(view)} bytes without an IEND chunk")
    length, kind = _START.unpack_from(view, offset)
    if not kind.isalpha() or length > _MAX_LENGTH:
        raise PngError(f"{kind!r} with {length} bytes is no chunk")
    start, stop = offset + _START.size, offset + _START.size + length
    if len(view) < stop + _SUM.size:
        raise CutPngError(
            f"the file is truncated: chunk {kind!r} needs {stop + _SUM.size} bytes, there are {len(view)}"
        )
    found = zlib.crc32(view[offset + 4 : stop])
    (stated,) = _SUM.unpack_from(view, stop)
    if found != stated:
        raise PngError(f"chunk {kind!r} has checksum {found:08x}, and says {stated:08x}")
    return kind, view[start:stop]


def grey_png(height: int, width: int, stream: bytes) -> bytes:
    """An 8-bit grey PNG, from its filtered rows as a zlib stream."""
    header = _HEADER.pack(width, height, 8, 0, 0, 0, 0)
    return SIGNATURE + b"".join(_packed(*one) for one in ((b"IHDR", header), (b"IDAT", stream), (b"IEND", b"")))


def _packed(kind: bytes, body: bytes) -> bytes:
    return _START.pack(len(body), kind) + body + _SUM.pack(zlib.crc32(kind + body))


def samples_of(data: bytes, max_pixels: int) -> Samples:
    """The facts about a PNG's samples, and the file without text, profiles and further frames.

    Verifies every checksum. Of tRNS only a palette's reaches Pillow, which would compare a colour with scaled pixels.
    Raises Reject, PngError and CutPngError.
    """
    found = _ChunkReader(data, max_pixels)
    for kind, body in chunks(data):
        found.add(kind, body)
    return found.samples()


class _ChunkReader:
    """Collects the facts from the chunks of one file."""

    def __init__(self, data: bytes, max_pixels: int) -> None:
        self.max_pixels = max_pixels
        self.view = memoryview(data)
        self.offset = len(SIGNATURE)
        self.kept_spans = [(0, self.offset)]
        """(start, stop) of the chunks that Pillow needs; adjacent ones are joined."""
        self.decompressor = zlib.decompressobj()
        self.num_decompressed = self.num_expected = 0
        """Bytes of the pixels with their filter bytes."""
        self.kinds: list[bytes] = []
        """Kinds of the chunks so far, each once, the latest last."""
        self.header = PngHeader(0, 0, 0, 0, 0, 0, 0)
        self.num_colours: int | None = None
        self.key: tuple[int, ...] | None = None
        self.orientation = 1

    def add(self, kind: bytes, body: memoryview) -> None:
        start, self.offset = self.offset, self.offset + len(body) + _START.size + _SUM.size
        if kind == b"IDAT" and b"IDAT" in self.kinds and self.kinds[-1] != b"IDAT":
            raise PngError("another chunk lies between its IDAT chunks")
        if self._read(kind, body):
            self._keep(start, self.offset)
        if self.kinds[-1:] != [kind]:
            self.kinds = [*(known for known in self.kinds if known != kind), kind]

    def _keep(self, start: int, stop: int) -> None:
        if self.kept_spans[-1][1] == start:
            start = self.kept_spans.pop()[0]
        self.kept_spans.append((start, stop))

    def _read(self, kind: bytes, body: memoryview) -> bool:
        """Reads the chunk. Returns True if Pillow needs it."""
        if kind == b"IHDR":
            self._read_header(body)
        elif kind == b"PLTE":
            self._read_palette(body)
        elif kind == b"tRNS":
            self._read_transparency(body)
        elif kind == b"eXIf":
            self.orientation = orientation_of(bytes(body[:MAX_RAW_PROFILE_BYTES]))
        elif kind in (b"tEXt", b"zTXt") and bytes(body[: len(RAW_PROFILE)]) == RAW_PROFILE:
            self._read_raw_profile(kind, body)
        elif kind == b"IDAT":
            self._count_pixels(body)
        elif kind != b"IEND" and kind[:1].isupper():
            raise PngError(f"its critical chunk {kind!r} is unknown")
        return kind in (b"IHDR", b"IDAT", b"IEND") or (kind in (b"PLTE", b"tRNS") and self.header.colour == 3)

    def _read_header(self, body: memoryview) -> None:
        self.header = header = header_of(body)
        if header.depth not in DEPTHS.get(header.colour, ()) or not header.width or not header.height:
            raise PngError(f"its header has values that PNG does not allow: {header}")
        if (header.compression, header.filtering) != (0, 0) or header.interlace > 1:
            raise PngError(f"its header names an unknown method: {header}")
        refuse_large(header.width, header.height, self.max_pixels)
        self.num_expected = num_pixel_bytes(header)

    def _read_palette(self, body: memoryview) -> None:
        if self.num_colours is not None or b"IDAT" in self.kinds or len(body) % 3 or not 0 < len(body) <= 768:
            raise PngError(f"its palette has {len(body)} bytes, comes twice or after the pixels")
        self.num_colours = len(body) // 3

    def _read_transparency(self, body: memoryview) -> None:
        colour, wanted = self.header.colour, NUM_KEYS.get(self.header.colour, 0)
        if b"tRNS" in self.kinds or b"IDAT" in self.kinds:
            raise PngError("its transparency comes twice or after the pixels")
        if colour == 3 and len(body) > (self.num_colours or 0):
            raise PngError(f"its transparency has {len(body)} entries, its palette {self.num_colours or 0}")
        if wanted and len(body) != 2 * wanted:
            raise PngError(f"its transparent colour has {len(body)} bytes; wanted {2 * wanted}")
        if wanted:
            values = struct.unpack(f">{wanted}H", body)
            self.key = tuple(value & (1 << self.header.depth) - 1 for value in values)

    def _count_pixels(self, body: memoryview) -> None:
        """Decompresses the pixels in pieces and counts their bytes: Pillow accepts a stream that ends too early."""
        for offset in range(0, len(body), _PIECE_BYTES):
            piece: bytes | memoryview = body[offset : offset + _PIECE_BYTES]
            while len(piece) and not self.decompressor.eof and self.num_decompressed < self.num_expected:
                self.num_decompressed += len(self.decompressor.decompress(piece, _PIECE_BYTES))
                piece = self.decompressor.unconsumed_tail

    def _read_raw_profile(self, kind: bytes, body: memoryview) -> None:
        if b"eXIf" in self.kinds or len(body) > MAX_RAW_PROFILE_BYTES:
            return
        text = bytes(body).partition(b"\0")[2]
        try:
            if kind == b"zTXt":
                text = zlib.decompressobj().decompress(text[1:], MAX_RAW_PROFILE_BYTES)
            self.orientation = orientation_of(bytes.fromhex("".join(text.decode("latin-1").split("\n")[3:])))
        except (zlib.error, ValueError):
            return

    def samples(self) -> Samples:
        header = self.header
        if b"IDAT" not in self.kinds:
            raise PngError("it has no pixels")
        if header.colour == 3 and self.num_colours is None:
            raise PngError("it has no palette")
        self.num_decompressed += len(self.decompressor.flush()) if self.num_decompressed < self.num_expected else 0
        if self.num_decompressed < self.num_expected:
            decompressed = f"{self.num_decompressed} of {self.num_expected} bytes"
            raise CutPngError(f"its pixels are truncated: they decompress to {decompressed}")
        return Samples(
            format="PNG",
            data=b"".join(self.view[start:stop] for start, stop in self.kept_spans),
            width=header.width,
            height=header.height,
            depth=header.depth,
            key=self.key,
            num_colours=self.num_colours if header.colour == 3 else None,
            orientation=self.orientation,
        )
