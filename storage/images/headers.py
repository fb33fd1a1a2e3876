"""What an image file's header says about its samples, for facts that Pillow drops or ignores."""

from dataclasses import dataclass

from blocksight.storage.rejects import Reject, RejectCode


@dataclass(frozen=True)
class Samples:
    """How to read the samples of one image file."""

    format: str
    """One of `blocksight.storage.images.decode.FORMATS`."""
    data: bytes
    """The file for Pillow: without text, profiles and further frames if those can be left out."""
    width: int
    height: int
    """Height of the stored picture, before it is turned upright."""
    depth: int = 8
    """Bits per sample as Pillow returns them; 12 or 16 are scaled to 8 later."""
    is_white_zero: bool = False
    """Grey of 12 or 16 bits must be inverted."""
    is_premultiplied: bool = False
    """Colours are already multiplied by alpha."""
    key: tuple[int, ...] | None = None
    """The transparent grey or RGB value in `depth` bits."""
    num_colours: int | None = None
    """Entries of the palette; a pixel with a greater index is an error. None: no palette, or a complete one."""
    transparent_index: int | None = None
    """Transparent palette index; it needs no palette entry."""
    orientation: int | None = None
    """EXIF orientation, 1 to 8. None: take it from the EXIF that Pillow finds."""


def refuse_large(width: int, height: int, max_pixels: int) -> None:
    """Raises Reject for more than `max_pixels`. Each header reader calls this first."""
    if width * height > max_pixels:
        raise Reject(RejectCode.TOO_MANY_PIXELS, f"{width} x {height} pixels, at most {max_pixels}")
