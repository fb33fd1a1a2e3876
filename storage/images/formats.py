"""Which kinds of images are explained, and which are rejected because their pixels would be wrong or disputed."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Decision:
    """The explained and the rejected kinds of one format."""

    format: str
    explained: str
    rejected: str
    """Kinds that are rejected as `mode_refused`."""


DECISIONS = (
    Decision(
        "JPEG",
        "grey, YCbCr, RGB, and CMYK or YCCK with Adobe's marker, of 8 bits; baseline, extended, progressive",
        "CMYK without the marker; 12 bits; lossless, hierarchical, arithmetic coding",
    ),
    Decision(
        "PNG",
        "all: 1 to 16 bits, grey, RGB, palette, alpha, a transparent colour, interlaced; of an animation the picture "
        "that every reader shows",
        "none (a pixel without an entry in the palette is `corrupt`)",
    ),
    Decision("WebP", "lossy, lossless, alpha, the first frame of an animation", "none"),
    Decision(
        "BMP",
        "1, 4, 8 bits with palette, also in runs; 16, 24, 32 bits, also with masks; alpha of 32 bits",
        "2 bits; 16 bits with alpha; 8 bits with the palette black and white, 4 bits with a ramp of 16 greys; OS/2 2; "
        "JPEG or PNG inside",
    ),
    Decision(
        "GIF",
        "the first frame, with its transparent colour",
        "a first frame that covers a part of the canvas and names no transparent colour",
    ),
    Decision(
        "TIFF",
        "the first frame, in strips or tiles; grey of 1, 2, 4, 8 or 16 bits, also white at 0; RGB and CMYK of 8 or 16 "
        "bits; palette; alpha, also premultiplied; planes of 8 bits; plain, LZW, Deflate, PackBits, LZMA, Zstandard, "
        "fax; JPEG of 8 bits; plain grey of 12 bits",
        "signed, float, 32 bits; planes of 16 bits or with alpha; 16-bit grey with alpha; Lab, LogLuv, CFA, inks; "
        "YCbCr but JPEG's; samples that no tag names; old JPEG; fill order 2 above 1 bit; big-endian BigTIFF",
    ),
)


def as_markdown() -> str:
    """The table of `storage/README.md`."""
    rows = [f"| {one.format} | {one.explained} | {one.rejected} |" for one in DECISIONS]
    return "\n".join(["| format | is explained | is rejected as `mode_refused` |", "| --- | --- | --- |", *rows])
