"""Decodes untrusted image bytes to upright RGB pixels, or rejects them with one reason."""

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
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from PIL.ImageFile import ImageFile

from blocksight.storage.images import bmp, gif, jpeg, png, tiff, webp
from blocksight.storage.images.fitting import Fitting
from blocksight.storage.images.formats import DECISIONS
from blocksight.storage.images.headers import Samples
from blocksight.storage.images.libtiff import libtiff_messages
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
    "sixteen_bit": "scaled to 8 bits, rounded; alpha and a transparent colour before that; an image whose greatest "
    "sample fits 8, 10, 12 or 14 bits is stretched from those",
    "kinds": {one.format: one.explained for one in DECISIONS},
    "icc": "ignored",
    "resampling": "bilinear, antialiased",
}
"""How colour and geometry are treated. The plan stores this text."""

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
"""Formats that are recognised and not read: a clearer reason than `not an image`."""

SAMPLES_OF: dict[str, Callable[[bytes, int], Samples]] = {
    "JPEG": jpeg.samples_of,
    "PNG": png.samples_of,
    "WEBP": webp.samples_of,
    "BMP": bmp.samples_of,
    "GIF": gif.samples_of,
    "TIFF": tiff.samples_of,
}
"""Each format's header reader: it rejects what Pillow would read wrongly."""

NEARLY_BLACK = 32
"""An image is nearly black if no sample reaches this level of 255: an eighth of the full range."""

DECODE_BYTES_PER_PIXEL = 16
DECODE_BYTES_PER_ROW = 64
DECODE_BYTES_PER_BYTE = 4
DECODE_BYTES_FIXED = 32 << 20
"""Upper bound of the memory for decoding one image: per pixel, per row and per byte of the file, and a fixed part."""


@dataclass(frozen=True)
class DecodeLimits:
    """Upper limits for one image."""

    num_bytes: int = MAX_IMAGE_BYTES
    num_pixels: int = MAX_IMAGE_PIXELS
    """Width times height, from the header."""
    seconds: float = MAX_DECODE_SECONDS
    """CPU time of the main thread, so a busy machine makes no difference. Tasks and the in-process runner decode
    there; in other threads only the other two limits hold."""


@dataclass(frozen=True)
class DecodedImage:
    """One decoded image, upright."""

    pixels: NDArray[np.uint8]
    """RGB [height, width, 3]."""
    width: int
    height: int
    format: str
    """One of `FORMATS`, by the file's first bytes."""
    depth: int = 8
    """Bits of a sample."""
    used_depth: int = 8
    """Bits of a sample that the image uses; fewer than `depth`: its pixels were stretched to the full range."""

    @property
    def kind(self) -> str:
        """The format, with what is odd about its range: `PNG, 12 of 16 bits` or `PNG, nearly black`."""
        if self.pixels.max() < NEARLY_BLACK:  # also after it was stretched
            return f"{self.format}, nearly black"
        return f"{self.format}, {self.used_depth} of {self.depth} bits" if self.used_depth < self.depth else self.format


DEFAULT_LIMITS = DecodeLimits()


def decode(data: bytes, limits: DecodeLimits = DEFAULT_LIMITS) -> DecodedImage:
    """The first frame of an image file, upright, in RGB. Raises Reject with the reason.

    Decoders raise nearly any exception on hostile bytes, so each one becomes a Reject. MemoryError is raised
    unchanged: the limits bound every image, so the machine is at fault.
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
        reason = f"its header states too many pixels; at most {limits.num_pixels} are decoded"
        raise Reject(RejectCode.TOO_MANY_PIXELS, reason) from error
    except Exception as error:
        raise _as_reject(error) from error


def fit(pixels: NDArray[np.uint8], size: tuple[int, int], how: str) -> NDArray[np.uint8]:
    """Pixels [H, W, 3] at another size (height, width), as the text of a `Fitting` says.

    `squash` resizes the whole image; `crop` takes the largest centred box of the new aspect. Both are antialiased
    bilinear where nothing else is said. Raises ValueError for another text.
    """
    return Fitting.parse(how).apply(pixels, size)


def _decode(data: bytes, limits: DecodeLimits) -> DecodedImage:
    samples = _samples(data, limits)
    with libtiff_messages() as messages:
        try:
            pixels, used_depth = _pixels(samples)
        except OSError as error:
            if messages.count and not isinstance(error, TimeoutError):
                raise OSError(f"{error}; {messages}") from error
            raise
    if messages.count:
        raise Reject(RejectCode.CORRUPT, str(messages))
    return DecodedImage(pixels, pixels.shape[1], pixels.shape[0], samples.format, samples.depth, used_depth)


def _samples(data: bytes, limits: DecodeLimits) -> Samples:
    """The facts in the file's header. Raises Reject, and any error that the header reader raises."""
    name = _format_by_magic(data, MAGIC) or ("WEBP" if data[:4] == b"RIFF" and data[8:12] == b"WEBP" else None)
    if name is None:
        raise _unknown_format(data)
    return SAMPLES_OF[name](data, limits.num_pixels)


def _pixels(samples: Samples) -> tuple[NDArray[np.uint8], int]:
    """Upright RGB [H, W, 3], and the bits of a sample that the image uses."""
    picture, is_half = _load(samples)
    pictures = [picture, _load(samples, low=True)[0]] if is_half else [picture]
    orientation = samples.orientation or orientation_of(picture.info.get("exif", b""))
    return as_rgb(pictures, samples, orientation)


def _load(samples: Samples, *, low: bool = False) -> tuple[Image.Image, bool]:
    """The picture as Pillow decodes it, and True if it holds the high bytes alone (with `low`: the low bytes)."""
    with Image.open(io.BytesIO(samples.data), formats=[samples.format]) as image:
        if image.size != (samples.width, samples.height):
            raise ValueError(f"its header says {samples.width} x {samples.height} pixels, its decoder {image.size}")
        is_half = samples.depth == 16 and _choose_bytes(image, low)
        image.load()
        vars(image).pop("_decoder", None)  # frees WebP's two canvases, each as large as the picture
        return image, is_half


def _choose_bytes(image: ImageFile, low: bool) -> bool:
    """Makes Pillow read the high or the low bytes of 16-bit colours. Returns False if Pillow keeps both.

    Pillow has a 16-bit mode for grey alone; of colours it takes the high byte. With the other byte order it takes
    the low byte.
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


def _as_reject(error: Exception) -> Reject:
    if isinstance(error, TimeoutError):
        return Reject(RejectCode.DECODE_TIMEOUT, "decoding took too long")
    if isinstance(error, UnidentifiedImageError):
        return Reject(RejectCode.CORRUPT, "its header is broken: no decoder takes it")
    text = f"{type(error).__name__}: {error}"
    cut = isinstance(error, EOFError | IndexError | struct.error) or "truncated" in text.lower()
    return Reject(RejectCode.TRUNCATED if cut else RejectCode.CORRUPT, text)


def _unknown_format(data: bytes) -> Reject:
    other = _format_by_magic(data, REFUSED_MAGIC) or ("HEIF or AVIF" if data[4:8] == b"ftyp" else None)
    if other is not None:
        return Reject(RejectCode.FORMAT_REFUSED, f"{other} is not read; wanted one of {', '.join(FORMATS)}")
    return Reject(RejectCode.NOT_AN_IMAGE, f"the bytes begin with {data[:8]!r}; wanted one of {', '.join(FORMATS)}")


def _format_by_magic(data: bytes, magic: dict[bytes, str]) -> str | None:
    return next((name for start, name in magic.items() if data.startswith(start)), None)


@contextmanager
def _strict_warnings() -> Iterator[None]:
    """Turns the warning of a decompression bomb into an error, and hides all other warnings of decoders."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raises TimeoutError in the body after so much CPU time of this thread; does nothing outside the main thread.

    The timer counts the CPU time of all threads, so it is set again until this thread's time is used up.
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
