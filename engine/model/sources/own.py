"""What a model's own library does to a picture, by the model's name, without the model."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from blocksight.engine.catalog.sources import source_of
from blocksight.engine.model.preprocessing import Preprocessing, Resizing
from blocksight.engine.model.resample import Grid
from blocksight.engine.model.sources.feeding import Measured, measured
from blocksight.engine.model.sources.hugging_face import hugging_face_preprocessing
from blocksight.engine.model.sources.open_clip_models import open_clip_preprocessing
from blocksight.engine.model.sources.timm_models import timm_preprocessing
from blocksight.engine.model.torchvision_models import torchvision_preprocessing


@dataclass(frozen=True)
class OwnFeeding:
    """A library's preprocessing, with what was measured of it."""

    own: Preprocessing
    colours: Measured

    @property
    def resizings(self) -> tuple[Resizing, ...]:
        """How its configuration can be read, the likeliest first."""
        return self.own.resizings

    @property
    def size(self) -> Grid:
        """Height and width of what it gives."""
        return self.colours.size

    def levels(self, pixels: NDArray[np.uint8]) -> NDArray[np.float64]:
        """The resized picture as the library has it, [H, W, 3] in 0..255, without its mean and std."""
        found = self.own.apply(pixels).double().numpy()
        found = found[::-1] if self.colours.is_bgr else found
        mean, std = (np.array(values)[:, None, None] for values in (self.colours.mean, self.colours.std))
        return (255 * (found * std + mean)).transpose(1, 2, 0)


def own_feeding(name: str, weights: str | None, files: bytes | None, size: Grid | None = None) -> OwnFeeding | None:
    """How the library of a model of this name prepares a picture; None: the model is of no library. Raises ModelError.

    `files` are those of a model that is named by its folder, packed; `size` is what the model is fed at, where its
    library prepares pictures for any size.
    """
    prefix, rest = source_of(name) or ("", "")
    readers: Mapping[str, Callable[[], Preprocessing]] = {
        "torchvision": lambda: torchvision_preprocessing(rest, weights),
        "timm": lambda: timm_preprocessing(rest, size),
        "hf": lambda: hugging_face_preprocessing(files),
        "open_clip": lambda: open_clip_preprocessing(rest, files),
    }
    if prefix not in readers:
        return None
    own = readers[prefix]()
    return OwnFeeding(own, measured(own))
