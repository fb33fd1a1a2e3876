"""The result of every explainer: the saliency map of one target, and its blocks."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from blocksight.engine.catalog.side_products import SideProducts
from blocksight.engine.saliency import Map


@dataclass(frozen=True)
class BlockMap:
    """One block's map for one target."""

    name: str
    """The block's place in the network."""
    candidates: int
    """Feature maps of the block."""
    kept: tuple[int, ...]
    """Channels that the map is made of, in order."""
    saliency_hw: Map | None
    """U_b in [0, 1] at the input's size; None where the block has no map of its own."""


@dataclass(frozen=True)
class Quality:
    """How far a map that is partly predicted may be trusted."""

    r2: float
    """Of the mask scores that were run, each predicted from the others (on the scale of their roots); at most 1."""
    map_error: float
    """The largest predicted relative error of a block map, from 0."""


@dataclass(frozen=True)
class Explanation:
    """The saliency map of one target of one image."""

    saliency_hw: Map
    """The map before any display scaling, float64 [H, W], at least 0 (SISE: E_B in [0, B]); zeros where the
    method found nothing, NaN where a gradient, a feature map or a score was not finite."""
    score: float
    """The target's value on the unmasked image."""
    blocks: tuple[BlockMap, ...]
    """Shallow to deep."""
    num_forwards: int
    """Masked forwards made for the image; its targets share them."""
    quality: Quality | None = None
    """None where nothing was predicted from forwards that were made."""
    was_completed: bool = False
    """All masks were scored because the budget's map was too poor."""
    products: SideProducts = field(default_factory=SideProducts)
    """What the method found beside the map."""


def sound_explanation(
    saliency_hw: Map,
    score: float,
    blocks: Sequence[BlockMap] = (),
    *,
    num_forwards: int,
    quality: Quality | None = None,
    was_completed: bool = False,
    products: SideProducts | None = None,
) -> Explanation:
    """The explanation; its map is NaN as a whole where any part of it, or the score, is not finite."""
    sound = np.isfinite(saliency_hw).all() and np.isfinite(score)
    saliency = saliency_hw if sound else np.full_like(saliency_hw, np.nan)
    return Explanation(saliency, score, tuple(blocks), num_forwards, quality, was_completed, products or SideProducts())
