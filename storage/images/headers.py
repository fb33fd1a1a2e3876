"""What a file's own header says about its samples, where Pillow does not say it or does not heed it."""

from dataclasses import dataclass

from blocksight.storage.rejects import Reject, RejectCode


@dataclass(frozen=True)
class Samples:
    """How the samples of one file are to be read."""

    format: str
    """One of `blocksight.storage.images.decode.FORMATS`."""
    data: bytes
    """The file as Pillow is given it: without text, profiles and further frames where those can be left out."""
    width: int
    height: int
    """Of the picture as it is stored."""
    depth: int = 8
    """Bits per sample as Pillow hands them over; 12 or 16 are scaled here."""
    is_white_zero: bool = False
    """Grey of 12 or 16 bits is to be inverted."""
    is_premultiplied: bool = False
    """Colours are multiplied by alpha already."""
    key: tuple[int, ...] | None = None
    """The transparent grey or RGB in `depth` bits."""
    num_colours: int | None = None
    """Entries of the palette; a pixel that names another has no colour. None: there is none, or it is complete."""
    transparent_index: int | None = None
    """That of a palette, which needs no entry."""
    orientation: int | None = None
    """1 to 8; None: Pillow knows the EXIF."""


def refuse_large(width: int, height: int, most: int) -> None:
    """Raises Reject for more than so many pixels. Each reader of headers asks before it does anything else."""
    if width * height > most:
        raise Reject(RejectCode.TOO_MANY_PIXELS, f"{width} x {height} pixels, at most {most}")
