"""The map codec: stores saliency maps as 8-bit PNG in a binary column. Any PNG reader can decode them."""

import zlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from zlib_ng import zlib_ng

from blocksight.storage.images.png import PngError, chunks, grey_png, header_of
from blocksight.storage.limits import MAX_MAP_SIDE

CODEC = "png-u8"
"""The codec's name, stored beside every map."""

MAX_ERROR = 0.5 / 255
"""Greatest absolute error of a decoded map in [0, 1]: half a grey level."""

LEVEL = 4
"""Compression level of zlib-ng. On 200 Grad-CAM maps of 224 x 224 a PNG takes 0.6 ms of a core and 8.7 kB; Pillow's
took 3.3 ms and 9.5 kB at its level 6."""
SUB = 1
"""PNG's filter type of every row: each pixel less its left neighbour."""

CODED_BYTES_PER_PIXEL = 2
CODED_BYTES_FIXED = 4096
"""Upper bound of a stored map's bytes: per pixel, and a fixed part."""

DECODING_BYTES_PER_PIXEL = 8
"""Upper bound of the memory for decoding one map, besides the stored bytes."""


class MapError(Exception):
    """The bytes are not a map that this codec wrote."""


@dataclass(frozen=True)
class EncodedMap:
    """One stored saliency map."""

    data: bytes
    """PNG, 8-bit grey: grey = round(255 (value - low) / (high - low)); 0 everywhere where high = low."""
    height: int
    width: int
    low: float
    """Least value before scaling."""
    high: float
    """Greatest value before scaling."""


def quantised(saliency_hw: NDArray[np.floating]) -> NDArray[np.uint8]:
    """The finite map [H, W] in grey levels: 0 for its least value, 255 for its greatest; zeros if it is constant."""
    low, high = float(saliency_hw.min()), float(saliency_hw.max())
    scaled = (saliency_hw - low) / (high - low) if high > low else np.zeros_like(saliency_hw)
    return np.rint(255 * scaled).astype(np.uint8)


def encode_map(saliency_hw: NDArray[np.floating]) -> EncodedMap:
    """A finite map [H, W] of any range, encoded. Raises ValueError if a value is not finite."""
    if not np.isfinite(saliency_hw).all():
        raise ValueError("a map with NaN or infinity cannot be stored; reject the record instead")
    height, width = saliency_hw.shape
    data = encode_levels(quantised(saliency_hw))
    return EncodedMap(data, height, width, float(saliency_hw.min()), float(saliency_hw.max()))


def encode_levels(levels: NDArray[np.uint8]) -> bytes:
    """A map in grey levels [H, W], as PNG. Its bytes may differ between processors, its pixels do not."""
    height, width = levels.shape
    rows = np.empty((height, 1 + width), np.uint8)
    rows[:, 0], rows[:, 1] = SUB, levels[:, 0]
    np.subtract(levels[:, 1:], levels[:, :-1], out=rows[:, 2:])
    return grey_png(height, width, zlib_ng.compress(rows.tobytes(), LEVEL))


def decode_map(data: bytes, size: tuple[int, int]) -> NDArray[np.float32]:
    """The map [H, W] in [0, 1], within `MAX_ERROR` of the scaled map before encoding.

    Arguments, errors and memory are those of `decode_levels`.
    """
    return np.divide(decode_levels(data, size), np.float32(255), dtype=np.float32)


def decode_levels(data: bytes, size: tuple[int, int]) -> NDArray[np.uint8]:
    """The stored map [H, W] in grey levels, 0 to 255; read-only.

    `size`: the row's (height, width). It is compared with the PNG's header before memory is allocated, so decoding
    needs at most `DECODING_BYTES_PER_PIXEL` per pixel of `size` for any bytes. Raises MapError for bytes that
    `encode_map` does not write.
    """
    height, width = _checked_size(size)
    max_bytes = CODED_BYTES_PER_PIXEL * height * width + CODED_BYTES_FIXED
    if len(data) > max_bytes:
        raise MapError(f"a stored map of {height} x {width} pixels has at most {max_bytes} bytes; got {len(data)}")
    try:
        stream = _pixel_stream(data, height, width)
        _check_length(stream, height * (width + 1))
        return np.asarray(Image.frombytes("L", (width, height), stream, "zip", "L", 0))
    except (PngError, zlib.error, ValueError, OSError) as error:
        raise MapError(f"the stored map is damaged: {error}") from error


def level_counts(levels: NDArray[np.uint8]) -> list[int]:
    """Number of pixels of a map [H, W] for each of the 256 grey levels."""
    return Image.fromarray(levels).histogram()


def _checked_size(size: tuple[int, int]) -> tuple[int, int]:
    if not all(isinstance(side, int) and 0 < side <= MAX_MAP_SIDE for side in size):
        raise MapError(f"a stored map has sides of 1 to {MAX_MAP_SIDE} pixels; its row says {size[0]} x {size[1]}")
    return size


def _pixel_stream(data: bytes, height: int, width: int) -> bytearray:
    """The compressed pixels of an 8-bit grey PNG of this size without other chunks. Raises MapError, PngError."""
    stream = bytearray()
    for kind, body in chunks(data):
        if kind == b"IHDR":
            _check_header(body, height, width)
        elif kind == b"IDAT":
            stream += body
        elif kind != b"IEND":
            raise MapError(f"a stored map has the chunks IHDR, IDAT and IEND; this one has {kind!r}")
    return stream


def _check_header(body: memoryview, height: int, width: int) -> None:
    header = header_of(body)
    if (header.depth, header.colour, header.compression, header.filtering, header.interlace) != (8, 0, 0, 0, 0):
        raise MapError(f"a stored map is an 8-bit grey PNG, not interlaced; this one is {header}")
    if (header.height, header.width) != (height, width):
        raise MapError(f"the map has {header.height} x {header.width} pixels, and its row says {height} x {width}")


def _check_length(stream: bytearray, wanted: int) -> None:
    """Raises MapError unless the stream decompresses to exactly `wanted` bytes; decompresses at most one more."""
    decompressor = zlib.decompressobj()
    length = len(decompressor.decompress(stream, wanted + 1))
    if length != wanted or not decompressor.eof or decompressor.unused_data:
        found = f"more than {wanted}" if length > wanted else str(length)
        raise MapError(f"the map's pixels decompress to {found} bytes, or do not end there; wanted {wanted}")
