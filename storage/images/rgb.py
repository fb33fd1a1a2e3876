"""Converts a decoded picture to upright 8-bit RGB, tile by tile, without a second picture of full size."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from blocksight.storage.images.headers import Samples
from blocksight.storage.rejects import Reject, RejectCode

Pixels = NDArray[np.uint8]
Box = tuple[int, int, int, int]

WHITE = 255
TILE_PIXELS = 1 << 16
"""Pixels that are converted at once."""

DIRECT_MODES = {"1", "L", "RGB", "CMYK", "YCbCr"}
ALPHA_MODES = {"LA", "RGBA"}
DEEP_MODES = {"I;16", "I;16B", "I;16L", "I;16N"}
NARROW_DEPTHS = (8, 10, 12, 14)
"""Bits that cameras and scanners store in wider samples."""
MODES_NEED = "8-bit, 16-bit grey, palette or CMYK"


def used_depth(brightest: int, depth: int) -> int:
    """The bits that samples of `depth` bits use, if the greatest is `brightest`: one of `NARROW_DEPTHS`, or all.

    Cameras write 12 bits into samples of 16. Scaled by the full range such an image is nearly black.
    """
    return next((bits for bits in NARROW_DEPTHS if bits < depth and 0 < brightest < 1 << bits), depth)


def as_rgb(pictures: Sequence[Image.Image], samples: Samples, orientation: int) -> tuple[Pixels, int]:
    """Upright RGB [H, W, 3], composited on white, and the bits of a sample that the image uses.

    `pictures`: the loaded picture, or its high and its low bytes if Pillow has no 16-bit mode for it. Raises Reject
    if a pixel has no colour or the mode is not read.
    """
    first = pictures[0]
    upright = np.empty((*_upright_size(first.size, orientation), 3), np.uint8)
    stored = _as_stored(upright, orientation)
    reader = _reader_of(pictures, samples)
    for box in _boxes(first.size):
        left, top, right, bottom = box
        stored[top:bottom, left:right] = reader.rgb([picture.crop(box) for picture in pictures])
    return upright, reader.used_depth


def _reader_of(pictures: Sequence[Image.Image], samples: Samples) -> "_Reader | _DeepReader | _PaletteReader":
    if pictures[0].mode == "P":
        return _PaletteReader(pictures[0], samples)
    return _DeepReader(pictures, samples) if samples.depth > 8 else _Reader(samples)


def _boxes(size: tuple[int, int]) -> Iterator[Box]:
    width, height = size
    wide = min(width, TILE_PIXELS)
    high = max(1, TILE_PIXELS // wide)
    for top in range(0, height, high):
        for left in range(0, width, wide):
            yield left, top, min(left + wide, width), min(top + high, height)


def _upright_size(size: tuple[int, int], orientation: int) -> tuple[int, int]:
    """Height and width."""
    width, height = size
    return (width, height) if orientation >= 5 else (height, width)


def _as_stored(upright: Pixels, orientation: int) -> Pixels:
    """A view of the upright picture, indexed in the order of the file."""
    if orientation in (2, 3, 6, 7):
        upright = upright[:, ::-1]
    if orientation in (3, 4, 7, 8):
        upright = upright[::-1]
    return upright.swapaxes(0, 1) if orientation >= 5 else upright


class _Reader:
    """Converts tiles of a picture of at most 8 bits that has no palette."""

    def __init__(self, samples: Samples) -> None:
        self.samples, self.used_depth = samples, samples.depth

    def rgb(self, tiles: Sequence[Image.Image]) -> Pixels:
        mode = tiles[0].mode
        if mode in ALPHA_MODES:
            return on_white(tiles[0], self.samples.is_premultiplied)
        if mode not in DIRECT_MODES:
            raise Reject(RejectCode.MODE_REFUSED, f"pixels are {mode}; wanted {MODES_NEED}")
        self._check_greys(tiles[0])
        pixels = np.array(tiles[0].convert("RGB"))
        if self.samples.key is not None:
            pixels[self._is_key(np.asarray(tiles[0]))] = WHITE
        return pixels

    def _check_greys(self, tile: Image.Image) -> None:
        """Checks grey that was a palette: Pillow drops a palette that is a ramp of greys."""
        if tile.mode == "L" and self.samples.num_colours is not None:
            check_indices(np.asarray(tile), self.samples)

    def _is_key(self, values: NDArray[Any]) -> NDArray[np.bool_]:
        """[H, W]: True for the transparent colour. `values`: [H, W] or [H, W, C], scaled by Pillow to 8 bits."""
        max_value = 2 ** min(self.samples.depth, 8) - 1
        key = np.array(self.samples.key) * (255 // max_value)
        if values.dtype == np.bool_:
            values = values * np.uint8(255)
        return values == key[0] if values.ndim == 2 else (values == key).all(-1)


class _DeepReader:
    """Converts tiles of a picture of more than 8 bits. Samples that use fewer bits than they have are stretched."""

    def __init__(self, pictures: Sequence[Image.Image], samples: Samples) -> None:
        self.samples = samples
        self.mode = pictures[0].mode
        self.has_alpha = self.mode == "RGBA"
        colours, alpha = self._brightest(pictures)
        self.used_depth = samples.depth if self.mode == "CMYK" else used_depth(colours, samples.depth)
        self.max_value = 2**self.used_depth - 1
        """Of the colours; that of alpha is greater where alpha uses the full range."""
        self.max_alpha = self.max_value if alpha <= self.max_value else 2**samples.depth - 1
        self.levels = np.rint(np.arange(self.max_value + 1) * (255 / self.max_value)).astype(np.uint8)

    def _brightest(self, pictures: Sequence[Image.Image]) -> tuple[int, int]:
        """The greatest sample of the colours, and of alpha (0: there is none)."""
        colours = alpha = 0
        for box in _boxes(pictures[0].size):
            values = self._values([picture.crop(box) for picture in pictures])
            colours = max(colours, int((values[..., :-1] if self.has_alpha else values).max()))
            alpha = max(alpha, int(values[..., -1].max())) if self.has_alpha else 0
        return colours, alpha

    def rgb(self, tiles: Sequence[Image.Image]) -> Pixels:
        values = self._values(tiles)
        if self.samples.is_white_zero:
            values = self.max_value - values
        if self.has_alpha:
            return self._on_white(values.astype(np.float64))
        eight = self.levels[values]
        if self.samples.key is not None:
            key = np.array(self.samples.key)
            eight[values == key[0] if values.ndim == 2 else (values == key).all(-1)] = WHITE
        if values.ndim == 2:
            return np.repeat(eight[..., None], 3, axis=-1)
        if self.mode == "CMYK":
            return np.asarray(Image.frombytes("CMYK", eight.shape[1::-1], eight.tobytes()).convert("RGB"))
        return eight

    def _values(self, tiles: Sequence[Image.Image]) -> NDArray[np.uint16]:
        """Grey [H, W] or colours [H, W, C] in the file's own depth."""
        if self.mode in DEEP_MODES:
            return np.asarray(tiles[0]).astype(np.uint16)
        first = np.asarray(tiles[0])
        if len(tiles) == 2:
            return _as_sixteen_bit(first, np.asarray(tiles[1]))
        return _as_sixteen_bit(first[..., ::2], first[..., 1::2])  # grey and alpha, each in two bytes

    def _on_white(self, values: NDArray[np.float64]) -> Pixels:
        """RGB of grey or RGB with alpha, in the file's own depth."""
        colours, alpha = values[..., :-1] / self.max_value, values[..., -1:] / self.max_alpha
        if not self.samples.is_premultiplied:
            colours = colours * alpha
        on_background = np.minimum(colours + 1 - alpha, 1)
        return np.broadcast_to(np.rint(on_background * 255).astype(np.uint8), (*on_background.shape[:2], 3))


def _as_sixteen_bit(high: Pixels, low: Pixels) -> NDArray[np.uint16]:
    return high.astype(np.uint16) * np.uint16(256) + low


class _PaletteReader:
    """Converts tiles of palette indices with one table of colours, composited on white."""

    def __init__(self, picture: Image.Image, samples: Samples) -> None:
        self.samples, self.used_depth = samples, samples.depth
        every = picture.crop((0, 0, 256, 1))
        every.putdata(range(256))
        self.table = (
            on_white(every, False)[0] if "transparency" in picture.info else np.asarray(every.convert("RGB"))[0]
        )

    def rgb(self, tiles: Sequence[Image.Image]) -> Pixels:
        indices = np.asarray(tiles[0])
        check_indices(indices, self.samples)
        return self.table[indices]


def check_indices(indices: Pixels, samples: Samples) -> None:
    """Raises Reject if a pixel's index is beyond the palette."""
    if samples.num_colours is None or samples.num_colours > int(indices.max()):
        return
    beyond = indices >= samples.num_colours
    if samples.transparent_index is not None:
        beyond &= indices != samples.transparent_index
    if beyond.any():
        found = int(indices[beyond][0])
        raise Reject(RejectCode.CORRUPT, f"a pixel has colour {found}, the palette {samples.num_colours} colours")


def on_white(picture: Image.Image, is_premultiplied: bool) -> Pixels:
    """RGB [H, W, 3] of a picture with alpha, composited on white."""
    rgba = picture.convert("RGBA")
    if is_premultiplied:
        values = np.asarray(rgba).astype(np.uint16)
        return np.minimum(values[..., :3] + WHITE - values[..., 3:], WHITE).astype(np.uint8)
    backdrop = Image.new("RGBA", rgba.size, (WHITE, WHITE, WHITE, 255))
    return np.asarray(Image.alpha_composite(backdrop, rgba).convert("RGB"))
