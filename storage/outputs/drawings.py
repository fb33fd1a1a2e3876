"""Draws a path over a picture, scored boxes on it, and sorted bars. Knows no explainer."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from blocksight.storage.outputs.pictures import BACKGROUND, INK, Pixels, colours, one_line

Box = tuple[float, float, float, float]
"""Left, top, right and bottom edge in pixels of the picture."""
Colour = tuple[int, int, int]

LIGHT, DARK, FIRST_COLOUR = (255, 255, 255), (20, 20, 25), (222, 73, 104)
TRUTH_COLOUR = (90, 230, 255)
MIN_FONT, MAX_FONT = 8, 14
DIMMED_BRIGHTNESS = 0.55
"""Factor for the picture's brightness below a path or boxes."""


@dataclass(frozen=True)
class Cell:
    """A box that is filled with the colour of its level."""

    box: Box
    level: float
    """0 to 1."""
    text: str


def with_path(pixels: Pixels, points: Sequence[tuple[float, float]]) -> Pixels:
    """The picture [H, W, 3], dimmed, with a path through points (x, y), numbered from 1. The first is marked."""
    image = _dimmed(pixels)
    draw = ImageDraw.Draw(image)
    radius = max(9.0, min(pixels.shape[:2]) / 36)
    for width, colour in ((5, DARK), (2, LIGHT)):  # seen on light and on dark
        draw.line(list(points), fill=colour, width=width, joint="curve")
    numbered = list(enumerate(points, 1))
    edge = image.width - 1 - 1.35 * radius, image.height - 1 - 1.35 * radius
    for number, point in [*numbered[1:], *numbered[:1]]:  # the first lies on top
        x, y = (min(max(own, 1.35 * radius), most) for own, most in zip(point, edge, strict=True))
        _mark(draw, (x, y), radius, str(number), is_first=number == 1)
    return np.asarray(image)


def _mark(draw: ImageDraw.ImageDraw, point: tuple[float, float], radius: float, text: str, *, is_first: bool) -> None:
    x, y = point
    reach = 1.35 * radius if is_first else radius
    fill, ink = (FIRST_COLOUR, LIGHT) if is_first else (LIGHT, DARK)
    draw.ellipse((x - reach, y - reach, x + reach, y + reach), fill=fill, outline=ink, width=2)
    _write(draw, (x - reach, y - reach, x + reach, y + reach), text, ink)


def with_cells(pixels: Pixels, cells: Sequence[Cell], frame: Box) -> Pixels:
    """The picture [H, W, 3], dimmed, with cells in the map's colours, and their texts if they fit.

    The first cell is marked; the frame is drawn below all cells.
    """
    image = _dimmed(pixels)
    draw = ImageDraw.Draw(image)
    _outline(draw, frame)
    for cell in cells:
        fill = _colour(cell.level)
        draw.rectangle(cell.box, fill=fill, outline=DARK)
        _write(draw, cell.box, cell.text, LIGHT if sum(fill) < 384 else DARK)
    _outline(draw, cells[0].box)
    return np.asarray(image)


def _outline(draw: ImageDraw.ImageDraw, box: Box) -> None:
    """Draws an outline that is visible on light and dark."""
    for width, colour in ((4, DARK), (2, LIGHT)):
        draw.rectangle(box, outline=colour, width=width)


def with_boxes(pixels: Pixels, boxes: Sequence[tuple[str, Box]]) -> Pixels:
    """The picture [H, W, 3] with an outline around each box, and its label where there is room above or in it.

    The outline's colour is in no map.
    """
    if not boxes:
        return pixels
    image = Image.fromarray(pixels)
    draw = ImageDraw.Draw(image)
    for _, (left, top, right, bottom) in boxes:
        edges = (left, top, max(left, right - 1), max(top, bottom - 1))
        for width, colour in ((4, DARK), (2, TRUTH_COLOUR)):
            draw.rectangle(edges, outline=colour, width=width)
    for label, box in boxes:
        _name_box(draw, one_line(label), box, image.width)
    return np.asarray(image)


def _name_box(draw: ImageDraw.ImageDraw, text: str, box: Box, width: int) -> None:
    """Writes a label at the box's top left corner, on a dark ground; nothing if it is wider than the picture."""
    font = _font(MAX_FONT - 2)
    reach, tall = font.getlength(text) + 4, MAX_FONT + 2
    left, top = min(box[0], width - reach), max(0.0, box[1] - tall)
    if text and left >= 0:
        draw.rectangle((left, top, left + reach, top + tall), fill=DARK)
        draw.text((left + 2, top + 1), text, fill=TRUTH_COLOUR, font=font)


def framed(pixels: Pixels) -> Pixels:
    """The picture [H, W, 3] in a frame of the first item's colour."""
    image = Image.fromarray(pixels)
    size = (image.width - 1, image.height - 1)
    ImageDraw.Draw(image).rectangle((0, 0, *size), outline=FIRST_COLOUR, width=max(3, min(size) // 40))
    return np.asarray(image)


def bars(values: NDArray[np.float64], lines: Sequence[str], size: tuple[int, int]) -> Pixels:
    """Bars of values in their order, at most one per column of pixels, above lines of text.

    The axis includes 0. `size`: height and width in pixels.
    """
    height, width = size
    image = Image.new("RGB", (width, height), BACKGROUND)
    draw = ImageDraw.Draw(image)
    text_top = height - (MAX_FONT + 3) * -(-len(lines) // 2) - 4
    low, high = min(0.0, float(values.min())), max(0.0, float(values.max()))
    reach = (high - low) or 1.0
    zero = 8 + (high / reach) * (text_top - 16)
    shown = values[np.linspace(0, len(values) - 1, min(len(values), width)).round().astype(int)]
    edges = np.linspace(0, width, len(shown) + 1)
    for value, left, right in zip(shown, edges[:-1], edges[1:], strict=True):
        top, bottom = sorted((zero, zero - value / reach * (text_top - 16)))
        draw.rectangle((left, top, max(left, right - 1), bottom), fill=_colour(0.55) if value > 0 else (150, 150, 155))
    draw.line((0, zero, width, zero), fill=INK)
    font = _font(MAX_FONT - 1)
    for place, line in enumerate(lines):
        column, row = divmod(place, -(-len(lines) // 2))
        draw.text((4 + column * width / 2, text_top + row * (MAX_FONT + 3)), line, fill=INK, font=font)
    return np.asarray(image)


def _dimmed(pixels: Pixels) -> Image.Image:
    return Image.fromarray(np.rint(DIMMED_BRIGHTNESS * pixels).astype(np.uint8))


def _colour(level: float) -> Colour:
    red, green, blue = colours(np.full((1, 1), level))[0, 0]
    return int(red), int(green), int(blue)


@lru_cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _write(draw: ImageDraw.ImageDraw, box: Box, text: str, ink: Colour) -> None:
    """Writes the text in the middle of the box, as large as it fits; nothing if it would be too small to read."""
    left, top, right, bottom = box
    for size in range(min(MAX_FONT, int(bottom - top)), MIN_FONT - 1, -1):
        font = _font(size)
        if font.getlength(text) <= right - left - 1:
            draw.text(((left + right) / 2, (top + bottom) / 2), text, fill=ink, font=font, anchor="mm")
            return
