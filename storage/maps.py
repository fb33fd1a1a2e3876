"""The map codec: saliency maps as 8-bit PNG in a binary column, decodable by anything that reads PNG."""

import io
import struct
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from storage.limits import MAX_MAP_SIDE

CODEC = "png-u8"
"""The name that stands beside every stored map."""

MAX_ERROR = 0.5 / 255
"""Greatest absolute error of a decoded map in [0, 1]: half a grey level."""

_PNG_START = struct.Struct(">8s4x4sII")


class MapError(Exception):
    """The bytes are no map that this codec wrote."""


@dataclass(frozen=True)
class EncodedMap:
    """A saliency map as it is stored."""

    data: bytes
    """PNG, 8-bit grey: grey = round(255 (value - low) / (high - low)); 0 everywhere where high = low."""
    height: int
    width: int
    low: float
    """Least value before scaling."""
    high: float
    """Greatest value before scaling."""


def quantised(saliency_hw: NDArray[np.floating]) -> NDArray[np.uint8]:
    """The finite map [H, W] in 255 steps from its least to its greatest value; zeros where it is constant."""
    low, high = float(saliency_hw.min()), float(saliency_hw.max())
    scaled = (saliency_hw - low) / (high - low) if high > low else np.zeros_like(saliency_hw)
    return np.rint(255 * scaled).astype(np.uint8)


def encode_map(saliency_hw: NDArray[np.floating]) -> EncodedMap:
    """Stores a finite map [H, W] of any range; raises ValueError where a value is not finite."""
    if not np.isfinite(saliency_hw).all():
        raise ValueError("a map with NaN or infinity cannot be stored; reject the record instead")
    buffer = io.BytesIO()
    Image.fromarray(quantised(saliency_hw)).save(buffer, "PNG", compress_level=6)
    height, width = saliency_hw.shape
    return EncodedMap(buffer.getvalue(), height, width, float(saliency_hw.min()), float(saliency_hw.max()))


def decode_map(data: bytes) -> NDArray[np.float32]:
    """The map [H, W] in [0, 1], within `MAX_ERROR` of what was stored after scaling.

    Sizes are checked on the header before anything is allocated. Raises MapError for other bytes.
    """
    return decode_levels(data).astype(np.float32) / np.float32(255)


def decode_levels(data: bytes) -> NDArray[np.uint8]:
    """The map [H, W] in grey levels of 0 to 255, as it is stored; read-only. Raises MapError, as `decode_map`."""
    _check_header(data)
    try:
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            return np.asarray(image)
    except (OSError, SyntaxError, ValueError) as error:
        raise MapError(f"the stored map is damaged: {error}") from error


def level_counts(levels: NDArray[np.uint8]) -> list[int]:
    """How many pixels of a map [H, W] have each of the 256 grey levels."""
    return Image.fromarray(levels).histogram()


def _check_header(data: bytes) -> None:
    if len(data) < _PNG_START.size + 2:
        raise MapError(f"a stored map begins with a PNG header; got {len(data)} bytes")
    magic, kind, width, height = _PNG_START.unpack_from(data)
    depth_and_colour = data[_PNG_START.size : _PNG_START.size + 2]
    if magic != b"\x89PNG\r\n\x1a\n" or kind != b"IHDR" or depth_and_colour != b"\x08\x00":
        raise MapError("a stored map is an 8-bit grey PNG; these bytes are not")
    if not (0 < width <= MAX_MAP_SIDE and 0 < height <= MAX_MAP_SIDE):
        raise MapError(f"a stored map has sides of 1 to {MAX_MAP_SIDE} pixels; this one says {height} x {width}")
