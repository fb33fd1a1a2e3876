"""Makes pictures: a saliency map over its image, both side by side, and contact sheets."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

Pixels = NDArray[np.uint8]

COLOUR_STOPS = np.array(
    [(0, 0, 4), (60, 15, 110), (140, 41, 129), (222, 73, 104), (254, 159, 109), (252, 253, 191)], dtype=np.float64
)
"""A colour ramp from dark to light through purple and orange. Equal steps look equal, also in grey."""
AGAINST_STOPS = np.array(
    [(0, 0, 4), (0, 45, 115), (0, 105, 165), (20, 160, 185), (110, 222, 165), (225, 255, 248)], dtype=np.float64
)
"""The ramp of what speaks against a target: through blue and green, as bright in grey as the other at each step."""

LUMINANCE = np.array([0.299, 0.587, 0.114])
"""Weights of red, green and blue in a grey picture (ITU-R BT.601)."""
PANELS = ("the image", "the map in colour, over the image in grey", "the map alone")
LEGEND = ("matters least", "matters most to the class")
AGAINST = "speaks most against it"
BAR_WIDTH, BAR_HEIGHT = 160, 16
MIN_OPACITY = 0.25
MAX_OPACITY = 0.75
CAPTION_HEIGHT, CAPTION_LINES = 40, 2
FONT_SIZE = 13
CUT = "..."
MARGIN = 8
BACKGROUND = (250, 250, 250)
INK = (30, 30, 30)


@dataclass(frozen=True)
class Tile:
    """One cell of a contact sheet."""

    pixels: Pixels
    """[H, W, 3]."""
    caption: str
    """One or two lines; a line that is wider than the pixels is cut."""


def colours(saliency_hw: NDArray[np.floating], against_hw: NDArray[np.floating] | None = None) -> Pixels:
    """A map [H, W] in [0, 1] as RGB [H, W, 3].

    With a map of what speaks against the target, on the same scale, each pixel has the colour of the stronger of both.
    """
    found = _ramped(saliency_hw, COLOUR_STOPS)
    if against_hw is None:
        return found
    return np.where((against_hw > saliency_hw)[..., None], _ramped(against_hw, AGAINST_STOPS), found)


def _ramped(values_hw: NDArray[np.floating], ramp: NDArray[np.float64]) -> Pixels:
    stops = np.linspace(0, 1, len(ramp))
    channels = [np.interp(values_hw, stops, ramp[:, channel]) for channel in range(3)]
    return np.rint(np.stack(channels, -1)).astype(np.uint8)


def overlay(
    pixels: Pixels, saliency_hw: NDArray[np.floating], against_hw: NDArray[np.floating] | None = None
) -> Pixels:
    """The map [H, W] over the image [H, W, 3] in grey, coloured as by `colours`; higher values are more opaque.

    All colour is the map's: over a colour image a red object could not be told from a salient one.
    """
    strength = saliency_hw if against_hw is None else np.maximum(saliency_hw, against_hw)
    opacity = (MIN_OPACITY + (MAX_OPACITY - MIN_OPACITY) * strength)[..., None]
    grey = (pixels @ LUMINANCE)[..., None]
    return np.rint((1 - opacity) * grey + opacity * colours(saliency_hw, against_hw)).astype(np.uint8)


def side_by_side(pixels: Pixels, saliency_hw: NDArray[np.floating]) -> Image.Image:
    """Image, overlay and map in a row, with their names and the legend of colours below."""
    return in_panels((pixels, overlay(pixels, saliency_hw), colours(saliency_hw)))


def in_panels(pictures: Sequence[Pixels], *, is_signed: bool = False) -> Image.Image:
    """A record's image, overlay and map, each [H, W, 3], as `side_by_side`."""
    tiles = [Tile(own, name) for own, name in zip(pictures, PANELS, strict=True)]
    return contact_sheet(tiles, len(PANELS), is_signed=is_signed)


def contact_sheet(tiles: Sequence[Tile], columns: int, *, is_signed: bool = False) -> Image.Image:
    """All tiles in rows, with captions below, and the legend of the map's colours at the foot.

    `is_signed`: the legend also has the colours of what speaks against the target. Raises ValueError if there are no
    tiles.
    """
    if not tiles:
        raise ValueError("a contact sheet needs at least one tile")
    rows = [tiles[start : start + columns] for start in range(0, len(tiles), columns)]
    heights = [max(len(tile.pixels) for tile in row) + CAPTION_HEIGHT + MARGIN for row in rows]
    width = max(tile.pixels.shape[1] for tile in tiles) + MARGIN
    foot = _legend(is_signed)
    wide = max(min(columns, len(tiles)) * width, foot.width + MARGIN) + MARGIN
    sheet = Image.new("RGB", (wide, sum(heights) + foot.height + 2 * MARGIN), BACKGROUND)
    top = MARGIN
    for row, height in zip(rows, heights, strict=True):
        for column, tile in enumerate(row):
            _paste(sheet, tile, (MARGIN + column * width, top))
        top += height
    sheet.paste(foot, (MARGIN, top))
    return sheet


def _legend(is_signed: bool) -> Image.Image:
    """A bar of the map's colours between what its ends mean; before it, signed, the bar of the other colours."""
    bar = np.broadcast_to(np.linspace(0, 1, BAR_WIDTH), (BAR_HEIGHT, BAR_WIDTH))
    against = (AGAINST, _ramped(bar[:, ::-1], AGAINST_STOPS)) if is_signed else ()
    parts = [*against, LEGEND[0], _ramped(bar, COLOUR_STOPS), LEGEND[1]]
    font = ImageFont.load_default(FONT_SIZE)
    widths = [round(font.getlength(part)) if isinstance(part, str) else BAR_WIDTH for part in parts]
    image = Image.new("RGB", (sum(widths) + MARGIN * (len(parts) - 1), BAR_HEIGHT), BACKGROUND)
    draw, left = ImageDraw.Draw(image), 0
    for part, width in zip(parts, widths, strict=True):
        if isinstance(part, str):
            draw.text((left, BAR_HEIGHT / 2), part, fill=INK, font=font, anchor="lm")
        else:
            image.paste(Image.fromarray(part), (left, 0))
        left += width + MARGIN
    return image


def _paste(sheet: Image.Image, tile: Tile, corner: tuple[int, int]) -> None:
    sheet.paste(Image.fromarray(tile.pixels), corner)
    below = (corner[0], corner[1] + len(tile.pixels) + 2)
    lines = [_cut(line, tile.pixels.shape[1]) for line in tile.caption.split("\n")[:CAPTION_LINES]]
    ImageDraw.Draw(sheet).multiline_text(below, "\n".join(lines), fill=INK, font=ImageFont.load_default(FONT_SIZE))


def one_line(text: object) -> str:
    """Untrusted text as one line of a caption: characters that do not print become question marks."""
    return "".join(char if char.isprintable() else "?" for char in str(text))


def _cut(line: str, width: int) -> str:
    """The part of a line that fits into `width` pixels."""
    font = ImageFont.load_default(FONT_SIZE)
    plain = one_line(line[:width])  # a character is at least one pixel wide
    if font.getlength(plain) <= width:
        return plain
    fits = bisect_right(range(len(plain)), width, key=lambda count: font.getlength(f"{plain[:count]}{CUT}"))
    return f"{plain[: max(0, fits - 1)]}{CUT}"


def resized(saliency_hw: NDArray[np.floating], size: tuple[int, int]) -> NDArray[np.float32]:
    """A map in [0, 1] at another size (height, width), bilinear."""
    image = Image.fromarray(saliency_hw.astype(np.float32), mode="F")
    return np.asarray(image.resize((size[1], size[0]), Image.Resampling.BILINEAR)).clip(0, 1)
