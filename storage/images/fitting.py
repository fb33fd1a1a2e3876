"""How a picture is brought to a model's size: which part of it is seen, at which scale, and how it is resampled."""

import re
from dataclasses import dataclass
from math import prod
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from blocksight.storage.limits import MAX_MAP_SIDE

INTERPOLATIONS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "nearest": Image.Resampling.NEAREST,
    "lanczos": Image.Resampling.LANCZOS,
    "box": Image.Resampling.BOX,
    "hamming": Image.Resampling.HAMMING,
}
"""All of them are antialiased but the nearest pixel; the first is what a fitting without a word means."""
DEFAULT_INTERPOLATION = "bilinear"

MAX_RESIZED_PIXELS = 1 << 24
"""Of a longer picture only the part that is seen is resized, which may differ in its last bits."""

Box = tuple[float, float, float, float]

_NUMBER = r"[1-9]\d{0,4}"
_FORM = re.compile(
    rf"(?P<plain>squash|crop)|(?P<kind>short side|whole) (?P<height>{_NUMBER})(?:x(?P<width>{_NUMBER}))?, "
    rf"centre (?P<rows>{_NUMBER})x(?P<columns>{_NUMBER})(?P<down> rounded down)?"
)


@dataclass(frozen=True)
class Fitting:
    """How pictures are fitted; its text stands in a plan.

    `squash` resizes the whole picture, `crop` takes the largest centred box of the model's proportions. The other two
    are the ways of the libraries: the picture is resized, by its short side or as a whole, and its centre is cut out.
    """

    kind: Literal["squash", "crop", "short side", "whole"]
    interpolation: str = DEFAULT_INTERPOLATION
    resized: tuple[int, int] = (0, 0)
    """Height and width before the centre is cut out; of `short side` both are that side."""
    centre: tuple[int, int] = (0, 0)
    """Height and width that are cut out: the model's input."""
    rounds_down: bool = False
    """Where the centre begins: rounded down, or at a half to the nearest even number."""

    @classmethod
    def parse(cls, text: str) -> "Fitting":
        """The fitting of a plan's text. Raises ValueError."""
        form, _, last = text.rpartition(", ") if text.rpartition(", ")[2] in INTERPOLATIONS else (text, "", "")
        found = _FORM.fullmatch(form)
        if found is None or last == DEFAULT_INTERPOLATION:
            raise ValueError(f"no way to fit a picture is called {text!r}; known: squash, crop, or own")
        named = last or DEFAULT_INTERPOLATION
        if found["plain"]:
            return cls("squash" if found["plain"] == "squash" else "crop", named)
        height, width = int(found["height"]), int(found["width"] or found["height"])
        centre = int(found["rows"]), int(found["columns"])
        if max(height, width, *centre) > MAX_MAP_SIDE:
            raise ValueError(f"a picture is fitted to {text!r}; wanted sides up to {MAX_MAP_SIDE}")
        kind = "whole" if found["kind"] == "whole" else "short side"
        return cls(kind, named, (height, width), centre, bool(found["down"]))

    def __str__(self) -> str:
        """`squash`, or `short side 256, centre 224x224, bicubic`."""
        last = "" if self.interpolation == DEFAULT_INTERPOLATION else f", {self.interpolation}"
        if self.kind in ("squash", "crop"):
            return f"{self.kind}{last}"
        before = f"{self.resized[0]}" if self.kind == "short side" else "{}x{}".format(*self.resized)
        down = " rounded down" if self.rounds_down else ""
        return f"{self.kind} {before}, centre {self.centre[0]}x{self.centre[1]}{down}{last}"

    @property
    def is_whole(self) -> bool:
        """True if all of the picture is seen, in its own proportions or not."""
        return self.kind == "squash" or (self.kind == "whole" and self.resized == self.centre)

    def box(self, have: tuple[int, int], want: tuple[int, int]) -> Box:
        """The part that is seen (left, top, right, bottom), in pixels of the picture; it may be larger than that.

        `have` and `want` are (width, height) of the picture and of what is made of it.
        """
        if self.kind == "squash":
            return 0.0, 0.0, float(have[0]), float(have[1])
        if self.kind == "crop":
            return centred_box(have, want)
        (width, height), (left, top) = self._resized_size(have), self._corner(have)
        x, y = have[0] / width, have[1] / height
        return left * x, top * y, (left + self.centre[1]) * x, (top + self.centre[0]) * y

    def apply(self, pixels: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
        """Pixels [H, W, 3] at another size (height, width); what lies outside the picture is black."""
        image, (height, width) = Image.fromarray(pixels), size
        if size == self.centre and prod(self._resized_size(image.size)) <= MAX_RESIZED_PIXELS:
            return self._cut(image)
        left, top, right, bottom = self.box(image.size, (width, height))
        box = (max(left, 0.0), max(top, 0.0), min(right, float(image.width)), min(bottom, float(image.height)))
        x, y = width / (right - left), height / (bottom - top)
        start = round((box[0] - left) * x), round((box[1] - top) * y)
        part = max(1, round((box[2] - box[0]) * x)), max(1, round((box[3] - box[1]) * y))
        whole = None if box == (0, 0, *image.size) else box
        seen = np.asarray(image.resize(part, INTERPOLATIONS[self.interpolation], box=whole))
        if part == (width, height):
            return seen
        found = np.zeros((height, width, 3), np.uint8)
        rows, columns = slice(start[1], start[1] + part[1]), slice(start[0], start[0] + part[0])
        found[rows, columns] = seen[: height - start[1], : width - start[0]]
        return found

    def _cut(self, image: Image.Image) -> NDArray[np.uint8]:
        """The centre of the whole picture, resized: bit by bit what libraries compute with Pillow."""
        resized = image.resize(self._resized_size(image.size), INTERPOLATIONS[self.interpolation])
        left, top = self._corner(image.size)
        return np.asarray(resized.crop((left, top, left + self.centre[1], top + self.centre[0])))

    def _resized_size(self, have: tuple[int, int]) -> tuple[int, int]:
        """Width and height of the resized picture."""
        if self.kind == "whole":
            return self.resized[1], self.resized[0]
        short, long = min(have), max(have)
        longer = max(1, int(self.resized[0] * long / short))
        return (self.resized[0], longer) if have[0] <= have[1] else (longer, self.resized[0])

    def _corner(self, have: tuple[int, int]) -> tuple[int, int]:
        """The first column and row of the centre in the resized picture; negative: outside it."""
        width, height = self._resized_size(have)
        return self._start(width, self.centre[1]), self._start(height, self.centre[0])

    def _start(self, have: int, want: int) -> int:
        if have < want:
            return -((want - have) // 2)
        return (have - want) // 2 if self.rounds_down else round((have - want) / 2)


def centred_box(have: tuple[int, int], want: tuple[int, int]) -> Box:
    """The largest centred box (left, top, right, bottom) in `have` with the aspect of `want`; both (width, height)."""
    scale = min(have[0] / want[0], have[1] / want[1])
    width, height = want[0] * scale, want[1] * scale
    left, top = (have[0] - width) / 2, (have[1] - height) / 2
    return left, top, left + width, top + height
