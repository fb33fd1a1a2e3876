"""Images from strangers: hostile bytes to upright RGB pixels, or one reason why not."""

import io
import signal
import struct
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from PIL.ImageFile import ImageFile

from blocksight.storage.images import bmp, gif, jpeg, png, tiff, webp
from blocksight.storage.images.headers import Samples
from blocksight.storage.images.libtiff import caught_words
from blocksight.storage.images.policy import DECISIONS
from blocksight.storage.images.rgb import DEEP_MODES, as_rgb
from blocksight.storage.images.tiff import orientation_of
from blocksight.storage.limits import MAX_DECODE_SECONDS, MAX_IMAGE_BYTES, MAX_IMAGE_PIXELS
from blocksight.storage.rejects import Reject, RejectCode

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")

DECODE_POLICY = {
    "formats": list(FORMATS),
    "frames": "first",
    "orientation": "EXIF transpose; XMP turns nothing",
    "alpha": "composited on white",
    "cmyk": "converted, Adobe inversion undone; without Adobe's marker refused",
    "sixteen_bit": "scaled to 8 bits, rounded; alpha and a transparent colour before that",
    "kinds": {one.format: one.explained for one in DECISIONS},
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
    b"II+\0": "TIFF",
    b"MM\0+": "TIFF",
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

DESCRIBED: dict[str, Callable[[bytes, int], Samples]] = {
    "JPEG": jpeg.described,
    "PNG": png.described,
    "WEBP": webp.described,
    "BMP": bmp.described,
    "GIF": gif.described,
    "TIFF": tiff.described,
}
"""The reader of each format's header: it refuses what Pillow would read wrongly."""

DECODE_BYTES_PER_PIXEL = 16
DECODE_BYTES_PER_ROW = 64
DECODE_BYTES_PER_BYTE = 4
DECODE_BYTES_BESIDE = 32 << 20
"""Memory that decoding one image takes at most: so much for each pixel, row and byte of the file, and so much more."""


@dataclass(frozen=True)
class DecodeLimits:
    """What one image may cost at most."""

    num_bytes: int = MAX_IMAGE_BYTES
    num_pixels: int = MAX_IMAGE_PIXELS
    """Width times height, read off the header."""
    seconds: float = MAX_DECODE_SECONDS
    """Of the main thread's own CPU time: a busy machine makes no image slow. It is there that tasks and the
    in-process runner decode; elsewhere the other two bound it."""


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
        raise _reason(error) from error


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
    samples = _described(data, limits)
    with caught_words() as words:
        try:
            pixels = _pixels(samples)
        except OSError as error:
            if words.count and not isinstance(error, TimeoutError):
                raise OSError(f"{error}; {words}") from error
            raise
    if words.count:
        raise Reject(RejectCode.CORRUPT, str(words))
    return DecodedImage(pixels, pixels.shape[1], pixels.shape[0], samples.format)


def _described(data: bytes, limits: DecodeLimits) -> Samples:
    """What the file's header says. Raises Reject, and what a cut or broken header makes of its reader."""
    name = _named(data, MAGIC) or ("WEBP" if data[:4] == b"RIFF" and data[8:12] == b"WEBP" else None)
    if name is None:
        raise _no_image(data)
    return DESCRIBED[name](data, limits.num_pixels)


def _pixels(samples: Samples) -> NDArray[np.uint8]:
    """Upright RGB [H, W, 3]."""
    picture, is_half = _loaded(samples)
    pictures = [picture, _loaded(samples, low=True)[0]] if is_half else [picture]
    orientation = samples.orientation or orientation_of(picture.info.get("exif", b""))
    return as_rgb(pictures, samples, orientation)


def _loaded(samples: Samples, *, low: bool = False) -> tuple[Image.Image, bool]:
    """The picture as Pillow decodes it, and whether it holds one half of its bits: the high ones, or the low ones."""
    with Image.open(io.BytesIO(samples.data), formats=[samples.format]) as image:
        if image.size != (samples.width, samples.height):
            raise ValueError(f"its header names {samples.width} x {samples.height} pixels, its decoder {image.size}")
        is_half = samples.depth == 16 and _choose_bytes(image, low)
        image.load()
        vars(image).pop("_decoder", None)  # holds WebP's two canvases, which are as large as the picture
        return image, is_half


def _choose_bytes(image: ImageFile, low: bool) -> bool:
    """Has 16-bit colours read as their high or low bytes; False where Pillow keeps both.

    Pillow has a mode for 16-bit grey alone, and of colours takes the high byte. It is the low one where the file
    is read in the other byte order.
    """
    raws = [tile.args if isinstance(tile.args, str) else str((tile.args or ("",))[0]) for tile in image.tile]
    if image.mode in DEEP_MODES:
        return False
    if raws == ["LA;16B"]:
        image.tile = [tile._replace(args="RGBA") for tile in image.tile]  # four bytes: grey, grey, alpha, alpha
        return False
    image.tile = [_with_raw(tile, _half_of(raw, low)) for tile, raw in zip(image.tile, raws, strict=True)]
    return True


def _half_of(raw: str, low: bool) -> str:
    is_big = raw.endswith("B") or (raw.endswith("N") and sys.byteorder == "big")
    return raw[:-1] + ("B" if is_big != low else "L")


def _with_raw(tile: Any, raw: str) -> Any:
    return tile._replace(args=raw if isinstance(tile.args, str) else (raw, *tile.args[1:]))


def _reason(error: Exception) -> Reject:
    if isinstance(error, TimeoutError):
        return Reject(RejectCode.DECODE_TIMEOUT, "decoding took too long")
    if isinstance(error, UnidentifiedImageError):
        return Reject(RejectCode.CORRUPT, "its header is broken: no decoder takes it")
    text = f"{type(error).__name__}: {error}"
    cut = isinstance(error, EOFError | IndexError | struct.error) or "truncated" in text.lower()
    return Reject(RejectCode.TRUNCATED if cut else RejectCode.CORRUPT, text)


def _no_image(data: bytes) -> Reject:
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
    """Raises TimeoutError in the body after so much CPU time of this thread; does nothing outside the main thread.

    The timer counts the whole process; where other threads used the time, it is set again for what is left.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    end = time.thread_time() + seconds

    def expire(_number: int, _frame: FrameType | None) -> None:
        left = end - time.thread_time()
        if left <= 0:
            raise TimeoutError
        signal.setitimer(signal.ITIMER_PROF, left)

    before = signal.signal(signal.SIGPROF, expire)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before or signal.SIG_DFL)
