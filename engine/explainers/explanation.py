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
    """Number of feature maps of the block."""
    kept: tuple[int, ...]
    """Channels of the feature maps that were used, ascending."""
    saliency_hw: Map | None
    """U_b in [0, 1] at the input's size; None if the block has no map of its own."""


@dataclass(frozen=True)
class Quality:
    """The quality of a map whose scores are partly predicted."""

    r2: float
    """R^2 of the measured scores, each predicted from the others (on a square-root scale); at most 1."""
    map_error: float
    """The largest predicted relative error of a block map, at least 0."""


@dataclass(frozen=True)
class Explanation:
    """The saliency map of one target of one image."""

    saliency_hw: Map
    """The map before any display scaling, float64 [H, W], at least 0 (SISE: E_B in [0, B]); zeros if the
    method found nothing, NaN if a gradient, a feature map or a score was not finite."""
    score: float
    """The target's value on the unmasked image."""
    blocks: tuple[BlockMap, ...]
    """Shallow to deep."""
    num_forwards: int
    """Masked forwards made for the image; its targets share them."""
    quality: Quality | None = None
    """None if no score was predicted from measured ones."""
    was_completed: bool = False
    """All masks were scored because the predicted error exceeded `complete_above`."""
    products: SideProducts = field(default_factory=SideProducts)
    """The method's other results."""


def checked_explanation(
    saliency_hw: Map,
    score: float,
    blocks: Sequence[BlockMap] = (),
    *,
    num_forwards: int,
    quality: Quality | None = None,
    was_completed: bool = False,
    products: SideProducts | None = None,
) -> Explanation:
    """The explanation. Its whole map is NaN if any of its values, or the score, is not finite."""
    is_finite = np.isfinite(saliency_hw).all() and np.isfinite(score)
    saliency = saliency_hw if is_finite else np.full_like(saliency_hw, np.nan)
    return Explanation(saliency, score, tuple(blocks), num_forwards, quality, was_completed, products or SideProducts())
