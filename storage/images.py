"""Images from strangers: hostile bytes to upright RGB pixels, or one reason why not."""

import io
import signal
import struct
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from storage.limits import MAX_DECODE_SECONDS, MAX_IMAGE_BYTES, MAX_IMAGE_PIXELS
from storage.rejects import Reject, RejectCode

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")

DECODE_POLICY = {
    "formats": list(FORMATS),
    "frames": "first",
    "orientation": "EXIF transpose",
    "alpha": "composited on white",
    "cmyk": "converted, Adobe inversion undone",
    "sixteen_bit": "scaled to 8 bits",
    "icc": "ignored",
    "resampling": "bilinear, antialiased",
}
"""What is done with colour and geometry; the plan records it."""

MAGIC = {
    b"\xff\xd8\xff": "JPEG",
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"BM": "BMP",
    b"GIF8": "GIF",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
}
REFUSED_MAGIC = {
    b"\0\0\1\0": "ICO",
    b"8BPS": "Photoshop",
    b"%PDF": "PDF",
    b"%!PS": "PostScript",
    b"\0\0\0\x0cjP  ": "JPEG 2000",
    b"\xff\x0a": "JPEG XL",
    b"P5": "PGM",
    b"P6": "PPM",
    b"qoif": "QOI",
    b"v/1\x01": "OpenEXR",
    b"<svg": "SVG",
    b"SIMPLE": "FITS",
}
"""Formats that are known by their first bytes and not on the list: a clearer reason than `not an image`."""

WHITE = 255
DIRECT_MODES = {"1", "L", "RGB", "CMYK", "YCbCr", "P"}
ALPHA_MODES = {"LA", "PA", "RGBA", "La", "RGBa"}
REFUSED_MODES_NEED = "8-bit, 16-bit grey, palette or CMYK"


@dataclass(frozen=True)
class DecodeLimits:
    """What one image may cost at most."""

    num_bytes: int = MAX_IMAGE_BYTES
    num_pixels: int = MAX_IMAGE_PIXELS
    """Width times height, read off the header."""
    seconds: float = MAX_DECODE_SECONDS
    """In the main thread, where tasks and the in-process runner decode; elsewhere the other two bound it."""


@dataclass(frozen=True)
class DecodedImage:
    """Upright pixels."""

    pixels: NDArray[np.uint8]
    """RGB [height, width, 3]."""
    width: int
    height: int
    format: str
    """One of `FORMATS`, by content."""


DEFAULT_LIMITS = DecodeLimits()


def decode(data: bytes, limits: DecodeLimits = DEFAULT_LIMITS) -> DecodedImage:
    """The first frame of an image file, upright, in RGB. Raises Reject with the reason.

    Decoders raise nearly anything on hostile bytes, so every Exception becomes a reason; only MemoryError
    goes on, for the limits make it the machine's trouble and not the image's.
    """
    if not data:
        raise Reject(RejectCode.EMPTY_FILE, "the file is empty")
    if len(data) > limits.num_bytes:
        raise Reject(RejectCode.TOO_MANY_BYTES, f"{len(data)} bytes, at most {limits.num_bytes} are decoded")
    try:
        with _strict_warnings(), _time_limit(limits.seconds):
            return _decode(data, limits)
    except (Reject, MemoryError):
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        reason = f"its header names more than the {limits.num_pixels} pixels that are decoded at most"
        raise Reject(RejectCode.TOO_MANY_PIXELS, reason) from error
    except Exception as error:
        raise _reason(data, error) from error


def fit(pixels: NDArray[np.uint8], size: tuple[int, int], how: Literal["squash", "crop"]) -> NDArray[np.uint8]:
    """Pixels [H, W, 3] at another size (height, width), antialiased bilinear.

    `squash` resizes the whole image; `crop` takes the largest centred box of the new aspect.
    """
    image = Image.fromarray(pixels)
    box = None if how == "squash" else centred_box(image.size, (size[1], size[0]))
    return np.asarray(image.resize((size[1], size[0]), Image.Resampling.BILINEAR, box=box))


def centred_box(have: tuple[int, int], want: tuple[int, int]) -> tuple[float, float, float, float]:
    scale = min(have[0] / want[0], have[1] / want[1])
    width, height = want[0] * scale, want[1] * scale
    left, top = (have[0] - width) / 2, (have[1] - height) / 2
    return left, top, left + width, top + height


def _decode(data: bytes, limits: DecodeLimits) -> DecodedImage:
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        if image.width * image.height > limits.num_pixels:
            raise Reject(
                RejectCode.TOO_MANY_PIXELS, f"{image.width} x {image.height} pixels, at most {limits.num_pixels}"
            )
        if image.format == "PNG":
            _check_sums(data)
        image.load()
        rgb = _rgb(_upright(image), data)
        return DecodedImage(np.asarray(rgb), rgb.width, rgb.height, _format(image.format))


def _check_sums(data: bytes) -> None:
    """Pillow does not look at a PNG's pixel checksums when it decodes."""
    with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
        image.verify()


def _upright(image: Image.Image) -> Image.Image:
    info = dict(image.info)
    try:
        upright = ImageOps.exif_transpose(image)
    except Exception:  # noqa: BLE001 - broken EXIF costs the orientation, not the picture
        return image
    upright.info.update({name: value for name, value in info.items() if name == "transparency"})
    return upright


def _rgb(image: Image.Image, data: bytes) -> Image.Image:
    """The picture in RGB by `DECODE_POLICY`."""
    key = image.info.get("transparency")
    if image.mode.startswith("I;16"):
        return _from_sixteen_bit(image, key)
    if image.mode in ALPHA_MODES or (image.mode == "P" and key is not None):
        return _on_white(image.convert("RGBA"))
    if image.mode not in DIRECT_MODES:
        raise Reject(RejectCode.MODE_REFUSED, f"pixels are {image.mode}; wanted {REFUSED_MODES_NEED}")
    rgb = image.convert("RGB")
    return rgb if key is None else _keyed(rgb, _scaled_key(key, data))


def _from_sixteen_bit(image: Image.Image, key: int | None) -> Image.Image:
    values = np.asarray(image).astype(np.float64)
    grey = np.rint(values / 257).astype(np.uint8)
    if key is not None:
        grey[values == key] = WHITE
    return Image.fromarray(grey).convert("RGB")


def _on_white(rgba: Image.Image) -> Image.Image:
    backdrop = Image.new("RGBA", rgba.size, (WHITE, WHITE, WHITE, 255))
    return Image.alpha_composite(backdrop, rgba).convert("RGB")


def _keyed(rgb: Image.Image, key: tuple[int, int, int]) -> Image.Image:
    """White where a pixel has the colour that a PNG names as transparent."""
    pixels = np.array(rgb)
    pixels[(pixels == np.array(key, dtype=np.uint8)).all(-1)] = WHITE
    return Image.fromarray(pixels)


def _scaled_key(key: Any, data: bytes) -> tuple[int, int, int]:
    """The transparent colour in 8 bits: a PNG names it in its own depth, and Pillow scales only the pixels."""
    depth = data[24]
    colours = key if isinstance(key, tuple) else (key, key, key)
    red, green, blue = (colour >> 8 if depth == 16 else colour * 255 // (2**depth - 1) for colour in colours)
    return red, green, blue


def _format(name: str | None) -> str:
    return "JPEG" if name == "MPO" else str(name)  # a phone's JPEG with more pictures behind the first


def _reason(data: bytes, error: Exception) -> Reject:
    text = f"{type(error).__name__}: {error}".replace("<_io.BytesIO object", "<bytes")
    if isinstance(error, TimeoutError):
        return Reject(RejectCode.DECODE_TIMEOUT, "decoding took too long")
    if isinstance(error, UnidentifiedImageError):
        return _unidentified(data)
    cut = isinstance(error, EOFError | struct.error) or "truncated" in text.lower()
    return Reject(RejectCode.TRUNCATED if cut else RejectCode.CORRUPT, text)


def _unidentified(data: bytes) -> Reject:
    ours = _named(data, MAGIC) or ("WEBP" if data[:4] == b"RIFF" and data[8:12] == b"WEBP" else None)
    if ours is not None:
        return Reject(RejectCode.CORRUPT, f"it begins like {ours}, and its header is broken")
    other = _named(data, REFUSED_MAGIC) or ("HEIF or AVIF" if data[4:8] == b"ftyp" else None)
    if other is not None:
        return Reject(RejectCode.FORMAT_REFUSED, f"{other} is not read; wanted one of {', '.join(FORMATS)}")
    return Reject(RejectCode.NOT_AN_IMAGE, f"the bytes begin with {data[:8]!r}; wanted one of {', '.join(FORMATS)}")


def _named(data: bytes, magic: dict[bytes, str]) -> str | None:
    return next((name for start, name in magic.items() if data.startswith(start)), None)


@contextmanager
def _strict_warnings() -> Iterator[None]:
    """A warning of a decompression bomb is an error; what else a decoder grumbles about is not ours to print."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raises TimeoutError in the body after so long; does nothing outside the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def expire(_number: int, _frame: FrameType | None) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
