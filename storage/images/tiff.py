"""Reads a TIFF file's first directory, and rejects the kinds that Pillow reads wrongly or not at all."""

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil

from blocksight.storage.images.headers import Samples, refuse_large
from blocksight.storage.limits import MAX_TIFF_PIECES
from blocksight.storage.rejects import Reject, RejectCode

WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC, FILL_ORDER = 256, 257, 258, 259, 262, 266
STRIP_OFFSETS, ORIENTATION, SAMPLES_PER_PIXEL, ROWS_PER_STRIP, STRIP_BYTES = 273, 274, 277, 278, 279
PLANAR, T4_OPTIONS, T6_OPTIONS, PREDICTOR, COLOUR_MAP = 284, 292, 293, 317, 320
TILE_WIDTH, TILE_HEIGHT, TILE_OFFSETS, TILE_BYTES = 322, 323, 324, 325
INK_SET, EXTRA_SAMPLES, SAMPLE_FORMAT, JPEG_TABLES = 332, 338, 339, 347
YCBCR_WEIGHTS, YCBCR_SUBSAMPLING, YCBCR_POSITION, BLACK_AND_WHITE = 529, 530, 531, 532

KEPT = (
    *(WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC, FILL_ORDER, STRIP_OFFSETS, SAMPLES_PER_PIXEL, ROWS_PER_STRIP),
    *(STRIP_BYTES, PLANAR, T4_OPTIONS, T6_OPTIONS, PREDICTOR, COLOUR_MAP, TILE_WIDTH, TILE_HEIGHT, TILE_OFFSETS),
    *(TILE_BYTES, EXTRA_SAMPLES, SAMPLE_FORMAT, JPEG_TABLES, YCBCR_SUBSAMPLING, YCBCR_POSITION),
)
"""The tags that are passed to Pillow: text, profiles, thumbnails and further frames are left out."""

GREY, RGB, PALETTE, CMYK, YCBCR = "grey", "RGB", "palette", "CMYK", "YCbCr"
COLOURS = {0: GREY, 1: GREY, 2: RGB, 3: PALETTE, 5: CMYK, 6: YCBCR}
NUM_COLOURS = {GREY: 1, RGB: 3, PALETTE: 1, CMYK: 4, YCBCR: 3}

UNSPECIFIED, ASSOCIATED, UNASSOCIATED = 0, 1, 2
DEPTHS = {
    GREY: {(): (1, 2, 4, 8, 12, 16), (UNSPECIFIED,): (8,), (ASSOCIATED,): (8,), (UNASSOCIATED,): (8,)},
    RGB: {
        (): (8, 16),
        **{(first,): (8, 16) for first in (UNSPECIFIED, ASSOCIATED, UNASSOCIATED)},
        **{(first, 0): (8,) for first in (UNSPECIFIED, ASSOCIATED, UNASSOCIATED)},
        **{(first, 0, 0): (8,) for first in (UNSPECIFIED, UNASSOCIATED)},
    },
    PALETTE: {(): (1, 2, 4, 8)},
    CMYK: {(): (8, 16), (UNSPECIFIED,): (8,), (UNSPECIFIED, UNSPECIFIED): (8,)},
    YCBCR: {(): (8,)},
}
"""Bits per sample that are read, by colours and extra samples."""

RAW, FAX2, FAX3, FAX4, LZW, JPEG, DEFLATE, PACKBITS, OLD_DEFLATE = 1, 2, 3, 4, 5, 7, 8, 32773, 32946
LZMA, ZSTD = 34925, 50000
LOSSLESS = (RAW, LZW, DEFLATE, PACKBITS, OLD_DEFLATE, LZMA, ZSTD)
MAX_SPARE_TILE_PIXELS = 1 << 20
"""A tile may be larger than its image by a quarter, or up to this."""

FULL_RANGE = (0, 255, 128, 255, 128, 255)
"""Black and white levels of JPEG's YCbCr."""

PREDICTED = (LZW, DEFLATE, OLD_DEFLATE, LZMA, ZSTD)
"""Compressions that may use a predictor."""
END_OF_JPEG = b"\xff\xd9"

MAX_SAMPLES = 8
"""Samples of one pixel; the kinds that are read have at most six."""

_NUMBERS = {1: "B", 3: "H", 4: "I", 5: "II", 16: "Q"}


class TiffError(ValueError):
    """The file breaks a rule of TIFF."""


@dataclass(frozen=True)
class Entry:
    """One tag of a directory."""

    kind: int
    """TIFF type: 1 bytes, 3 shorts, 4 longs, 5 pairs of longs, 16 long longs; others are not read."""
    count: int
    offset: int
    """Of the entry's 12 or 20 bytes in the file."""


@dataclass(frozen=True)
class Directory:
    """The first directory of a TIFF file or of EXIF. Values are read on demand."""

    data: bytes
    order: str
    """`<` or `>`."""
    is_big: bool
    """BigTIFF: offsets of 8 bytes."""
    entries: Mapping[int, Entry]

    def numbers(self, tag: int, most: int = 8) -> tuple[int, ...]:
        """The tag's values; () if it is absent. Raises TiffError for more than `most`, and for no numbers."""
        entry = self.entries.get(tag)
        if entry is None:
            return ()
        letter = _NUMBERS.get(entry.kind)
        if letter is None or not 0 < entry.count <= most:
            raise TiffError(f"tag {tag} has {entry.count} values of type {entry.kind}; wanted 1 to {most} numbers")
        form = struct.Struct(self.order + letter * entry.count)
        field, width = (12, "Q") if self.is_big else (8, "I")
        offset = entry.offset + field
        if form.size > struct.calcsize(width):
            (offset,) = struct.unpack_from(self.order + width, self.data, offset)
        if offset + form.size > len(self.data):
            raise TiffError(f"tag {tag} is truncated: it ends at {offset + form.size}, the file at {len(self.data)}")
        return form.unpack_from(self.data, offset)

    def number(self, tag: int, default: int) -> int:
        """The tag's only value. Raises TiffError."""
        return (self.numbers(tag, 1) or (default,))[0]


def directory_of(data: bytes) -> Directory:
    """The first directory of a TIFF or BigTIFF file. Raises Reject, TiffError; struct.error if the file is cut."""
    order = {b"II": "<", b"MM": ">"}.get(data[:2])
    if order is None:
        raise TiffError(f"it begins with {data[:4]!r}, not as a TIFF")
    (version,) = struct.unpack_from(order + "H", data, 2)
    if version not in (42, 43):
        raise TiffError(f"its version is {version}; wanted 42, or 43 for BigTIFF")
    is_big = version == 43
    if is_big and order == ">":
        raise _mode_reject("big-endian BigTIFF", "another byte order")
    (start,) = struct.unpack_from(order + ("Q" if is_big else "I"), data, 8 if is_big else 4)
    (count,) = struct.unpack_from(order + ("Q" if is_big else "H"), data, start)
    head, size = struct.Struct(order + ("HHQ" if is_big else "HHI")), 20 if is_big else 12
    if count > 0xFFFF:
        raise TiffError(f"its directory has {count} tags; there are no more than 65535")
    entries: dict[int, Entry] = {}
    for offset in range(start + (8 if is_big else 2), start + (8 if is_big else 2) + count * size, size):
        if offset + size > len(data):
            break
        tag, kind, number = head.unpack_from(data, offset)
        entries.setdefault(tag, Entry(kind, number, offset))
    return Directory(data, order, is_big, entries)


def orientation_of(exif: bytes) -> int:
    """EXIF's orientation, 1 to 8; 1 if there is none or EXIF is damaged."""
    body = exif
    for _ in range(2):  # some writers repeat the prefix
        body = body.removeprefix(b"Exif\0\0")
    try:
        orientation = directory_of(body).number(ORIENTATION, 1)
    except (TiffError, struct.error, OverflowError):
        return 1
    return orientation if 1 <= orientation <= 8 else 1


@dataclass(frozen=True)
class _Kind:
    """The tags that say how samples are stored."""

    height: int
    width: int
    colours: str
    white_is_zero: bool
    depth: int
    extra: tuple[int, ...]
    compression: int
    is_planar: bool
    fill_order: int
    tile: tuple[int, int] | None
    """Height and width."""
    num_samples: int


def samples_of(data: bytes, max_pixels: int) -> Samples:
    """Size and kind from the first directory. Raises Reject for kinds that are not read, TiffError and struct.error."""
    directory = directory_of(data)
    refuse_large(directory.number(WIDTH, 0), directory.number(HEIGHT, 0), max_pixels)
    kind = _kind(directory)
    _check_kind(kind, directory)
    _check_pieces(kind, directory)
    is_associated = ASSOCIATED in kind.extra
    return Samples(
        format="TIFF",
        data=_with_kept_tags(directory, kind, is_associated),
        width=kind.width,
        height=kind.height,
        depth=kind.depth if kind.depth > 8 else 8,
        is_white_zero=kind.white_is_zero and kind.depth > 8,
        is_premultiplied=is_associated,
        orientation=_orientation_in(directory),
    )


def _orientation_in(directory: Directory) -> int:
    try:
        orientation = directory.number(ORIENTATION, 1)
    except TiffError:
        return 1
    return orientation if 1 <= orientation <= 8 else 1


def _kind(directory: Directory) -> _Kind:
    width, height = directory.number(WIDTH, 0), directory.number(HEIGHT, 0)
    if not width or not height:
        raise TiffError(f"it is {width} x {height} pixels")
    photometric = directory.numbers(PHOTOMETRIC, 1)
    if not photometric or photometric[0] not in COLOURS:
        raise _mode_reject(
            f"photometric {photometric[0] if photometric else 'not named'}", "grey, RGB, palette, CMYK, YCbCr"
        )
    colours = COLOURS[photometric[0]]
    num_samples = directory.number(SAMPLES_PER_PIXEL, 1)
    if not 0 < num_samples <= MAX_SAMPLES:  # before a list is made that is as long
        raise _mode_reject(f"{num_samples} samples", f"at most {MAX_SAMPLES}")
    bits = directory.numbers(BITS) or (1,)
    depths = bits * num_samples if len(bits) == 1 else bits
    extra = directory.numbers(EXTRA_SAMPLES)
    formats = set(directory.numbers(SAMPLE_FORMAT) or (1,))
    if len(depths) != num_samples or len(set(depths)) != 1:
        raise _mode_reject(f"{num_samples} samples of {', '.join(map(str, bits))} bits", "samples of one depth")
    if formats != {1}:
        raise _mode_reject(f"samples of format {', '.join(map(str, sorted(formats)))}", "1, unsigned integers")
    if num_samples != NUM_COLOURS[colours] + len(extra):
        raise _mode_reject(
            f"{colours} with {num_samples} samples, of which {len(extra)} are named as extra",
            f"{NUM_COLOURS[colours]}, and a name for each other",
        )
    tile = (
        (directory.number(TILE_HEIGHT, 0), directory.number(TILE_WIDTH, 0))
        if TILE_OFFSETS in directory.entries
        else None
    )
    return _Kind(
        height=height,
        width=width,
        colours=colours,
        white_is_zero=photometric[0] == 0,
        depth=depths[0],
        extra=extra,
        compression=directory.number(COMPRESSION, RAW),
        is_planar=directory.number(PLANAR, 1) == 2,
        fill_order=directory.number(FILL_ORDER, 1),
        tile=tile,
        num_samples=num_samples,
    )


def _check_kind(kind: _Kind, directory: Directory) -> None:
    """Raises Reject for a combination of tags whose pixels were not tested to be right."""
    depths = DEPTHS[kind.colours].get(kind.extra)
    what = f"{kind.colours} with {kind.depth} bits and extra samples {kind.extra}"
    if depths is None or kind.depth not in depths:
        raise _mode_reject(what, f"{depths or 'other extra samples'}")
    if kind.compression not in _compressions(kind):
        raise _mode_reject(f"{what} in compression {kind.compression}", f"one of {_compressions(kind)}")
    if kind.is_planar and (kind.depth != 8 or kind.extra or kind.colours == YCBCR):
        raise _mode_reject(f"{what} in separate planes", "them in one plane, or 8 bits without extra samples")
    if kind.fill_order != 1 and (kind.depth != 1 or kind.compression not in (RAW, FAX2, FAX3, FAX4)):
        raise _mode_reject(f"{what} in fill order {kind.fill_order} and compression {kind.compression}", "order 1")
    if kind.depth == 12 and (kind.compression != RAW or directory.order == ">" or kind.white_is_zero or kind.tile):
        raise _mode_reject(f"{what}, compressed, big-endian, in tiles or white at 0", "plain little-endian strips")
    predictors = (1, 2) if kind.depth in (8, 16) and kind.compression in PREDICTED else (1,)
    if directory.number(PREDICTOR, 1) not in predictors:
        raise _mode_reject(f"{what} with predictor {directory.number(PREDICTOR, 1)}", f"one of {predictors}")
    if directory.number(INK_SET, 1) != 1:
        raise _mode_reject(f"inks of set {directory.number(INK_SET, 1)}", "1, which is CMYK")
    if kind.colours == PALETTE:
        _check_colour_map(kind, directory)
    if kind.colours == YCBCR and (YCBCR_WEIGHTS in directory.entries or not _is_full_range(directory)):
        raise _mode_reject("YCbCr with weights or reference levels of its own", "those of JPEG")


def _is_full_range(directory: Directory) -> bool:
    if BLACK_AND_WHITE not in directory.entries:
        return True
    levels = directory.numbers(BLACK_AND_WHITE)
    return levels[::2] == tuple(level * scale for level, scale in zip(FULL_RANGE, levels[1::2], strict=False))


def _compressions(kind: _Kind) -> tuple[int, ...]:
    if kind.colours == YCBCR:
        return (JPEG,)
    if kind.depth == 1 and kind.colours == GREY:
        return (*LOSSLESS, FAX2, FAX3, FAX4)
    if kind.depth == 8 and not kind.extra and kind.colours in (GREY, RGB):
        return (*LOSSLESS, JPEG)
    return LOSSLESS


def _check_colour_map(kind: _Kind, directory: Directory) -> None:
    colours = directory.numbers(COLOUR_MAP, 3 * 2**kind.depth)
    if len(colours) != 3 * 2**kind.depth:
        raise TiffError(f"its colour map has {len(colours)} values; wanted {3 * 2**kind.depth}")
    if 0 < max(colours) < 256:
        raise _mode_reject("a colour map of values below 256, which readers take for 8 or for 16 bits", "16 bits")


def _check_pieces(kind: _Kind, directory: Directory) -> None:
    """Checks number, size and offsets of the strips or tiles. Raises TiffError and Reject."""
    height, width = kind.tile or (min(directory.number(ROWS_PER_STRIP, kind.height), kind.height), kind.width)
    if not height or not width:
        raise TiffError(f"its strips or tiles are {width} x {height} pixels")
    if height * width > max(1.25 * kind.height * kind.width, MAX_SPARE_TILE_PIXELS):
        raise TiffError(f"its tiles are {width} x {height} pixels, the image {kind.width} x {kind.height}")
    planes = kind.num_samples if kind.is_planar else 1
    wanted = planes * ceil(kind.height / height) * ceil(kind.width / width)
    if wanted > MAX_TIFF_PIECES:
        raise _mode_reject(f"{wanted} strips or tiles", f"at most {MAX_TIFF_PIECES}")
    offsets = directory.numbers(TILE_OFFSETS if kind.tile else STRIP_OFFSETS, wanted)
    sizes = directory.numbers(TILE_BYTES if kind.tile else STRIP_BYTES, wanted)
    if len(offsets) != wanted or len(sizes) != wanted:
        raise TiffError(f"it has {len(offsets)} strips or tiles with {len(sizes)} lengths; its size needs {wanted}")
    end = max(offset + size for offset, size in zip(offsets, sizes, strict=True))
    if end > len(directory.data):
        raise TiffError(f"its pixels are truncated: they end at {end}, the file at {len(directory.data)}")
    if kind.compression == RAW:
        _check_raw_sizes(kind, height, width, sizes, planes)
    if kind.compression == JPEG:
        _check_jpeg_ends(directory.data, offsets, sizes)


def _check_raw_sizes(kind: _Kind, height: int, width: int, sizes: tuple[int, ...], planes: int) -> None:
    """Raises TiffError if an uncompressed strip or tile is shorter than its pixels."""
    row_bytes = (width * kind.depth * kind.num_samples // planes + 7) // 8
    per_plane = len(sizes) // planes
    for number, size in enumerate(sizes):
        last = not kind.tile and number % per_plane == per_plane - 1
        rows = kind.height - height * (per_plane - 1) if last else height
        if size < rows * row_bytes:
            raise TiffError(f"strip or tile {number} is truncated: {size} bytes, its pixels need {rows * row_bytes}")


def _check_jpeg_ends(data: bytes, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> None:
    """Raises TiffError if a strip or tile has no end marker: libtiff would fill missing pixels with grey."""
    for number, (offset, size) in enumerate(zip(offsets, sizes, strict=True)):
        if not data[max(offset, offset + size - 64) : offset + size].rstrip(b"\0").endswith(END_OF_JPEG):
            raise TiffError(f"strip or tile {number} is truncated: its JPEG has no end")


def _with_kept_tags(directory: Directory, kind: _Kind, is_associated: bool) -> bytes:
    """The file with one directory of the kept tags. Patches two, so Pillow neither divides by alpha nor inverts."""
    patches = {}
    if kind.white_is_zero and kind.depth > 8:
        patches[PHOTOMETRIC] = (1,)
    if is_associated:
        patches[EXTRA_SAMPLES] = (UNASSOCIATED, *kind.extra[1:])
    size, count, offset = (20, "Q", "Q") if directory.is_big else (12, "H", "I")
    tags = sorted(tag for tag in KEPT if tag in directory.entries)
    rows = [
        _entry(directory, tag, size) if tag not in patches else _patched_entry(directory, tag, patches[tag])
        for tag in tags
    ]
    data = memoryview(directory.data)
    start = len(data) + len(data) % 2
    head = bytes(data[: 8 if directory.is_big else 4]) + struct.pack(directory.order + offset, start)
    tail = struct.pack(directory.order + count, len(rows)) + b"".join(rows) + bytes(struct.calcsize(offset))
    return b"".join([head, data[len(head) :], bytes(len(data) % 2), tail])


def _entry(directory: Directory, tag: int, size: int) -> bytes:
    offset = directory.entries[tag].offset
    return directory.data[offset : offset + size]


def _patched_entry(directory: Directory, tag: int, values: tuple[int, ...]) -> bytes:
    """A directory entry with these shorts, stored inside the entry."""
    head, field = ("HHQ", 8) if directory.is_big else ("HHI", 4)
    body = struct.pack(f"{directory.order}{len(values)}H", *values)
    return struct.pack(directory.order + head, tag, 3, len(values)) + body.ljust(field, b"\0")


def _mode_reject(what: str, wanted: str) -> Reject:
    return Reject(RejectCode.MODE_REFUSED, f"a TIFF of {what} is not read; wanted {wanted}")
