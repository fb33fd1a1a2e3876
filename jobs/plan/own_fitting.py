"""Fits pictures as a model's own library does: its configuration is read, and what was read is proved on pictures."""

import numpy as np
from numpy.typing import NDArray

from blocksight.engine.model.preprocessing import Resizing, scaled_to
from blocksight.engine.model.resample import Grid
from blocksight.engine.model.sources.own import OwnFeeding, own_feeding
from blocksight.jobs.plan.config import ConfigError, JobConfig
from blocksight.jobs.plan.context import settings_bytes
from blocksight.storage.images.fitting import Fitting

PROBES = ((131, 97), (801, 1010))
"""Height and width of the proof's pictures: one is enlarged, one is shrunk, both ways up, with odd differences."""
CELLS = 9
"""A probe is random at this many pixels to a cell, so that a shift by one pixel shows and a rounding does not."""
MAX_LEVELS, MEAN_LEVELS = 3.0, 0.4
"""How far, of 255, a pixel and all pixels may be from the library's: two libraries round between two passes."""
ODD_SHARE = 0.0025
"""Of values that may be further away: where a cubic overshoots, some libraries cut it off after each pass."""


def own_fitting(config: JobConfig) -> Fitting:
    """How the model's own library fits a picture to its input.

    Raises ConfigError if the model has no such library, or if none of the ways that its configuration can be read
    gives the library's pixels, and ModelError.
    """
    own = own_feeding(config.model, config.weights, settings_bytes(config), config.input_size)
    if own is None:
        raise ConfigError(
            f"resize own, and nobody says how model {config.model} prepares a picture: take squash or crop"
        )
    for resizing in own.resizings:
        if all(_is_same(own, resizing, probe) for probe in _probes()):
            size = config.input_size or own.size
            scaled = scaled_to(resizing, own.size, size)
            if scaled is not None:
                return fitting_of(scaled, size)
    raise ConfigError(
        f"the way in which model {config.model} prepares a picture{_at(config.input_size)} is none that is known here: "
        "take resize squash or crop, with interpolation if it is not bilinear"
    )


def _at(size: Grid | None) -> str:
    return "" if size is None else f" for {size[0]} x {size[1]} pixels"


def fitting_of(resizing: Resizing, size: Grid) -> Fitting:
    """The fitting that gives a model of this input size what the resizing gives."""
    before = (resizing.height, resizing.width)
    if resizing.kind == "whole" and before == size:
        return Fitting("squash", resizing.interpolation)
    kind = "whole" if resizing.kind == "whole" else "short side"
    return Fitting(kind, resizing.interpolation, before, size, resizing.rounds_down)


def _is_same(own: OwnFeeding, resizing: Resizing, probe: NDArray[np.uint8]) -> bool:
    theirs = own.levels(probe)
    if theirs.shape[:2] != own.size:
        return False
    ours = fitting_of(resizing, own.size).apply(probe, own.size).astype(np.float64)
    apart = np.abs(ours - theirs)
    return bool((apart > MAX_LEVELS).mean() <= ODD_SHARE and apart.mean() <= MEAN_LEVELS)


def _probes() -> list[NDArray[np.uint8]]:
    drawn = np.random.default_rng(0)
    coarse = [drawn.integers(0, 256, (-(-height // CELLS), -(-width // CELLS), 3)) for height, width in PROBES]
    grown = [np.kron(one, np.ones((CELLS, CELLS, 1))) for one in coarse]
    return [one[:height, :width].astype(np.uint8) for one, (height, width) in zip(grown, PROBES, strict=True)]
