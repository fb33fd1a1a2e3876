"""Whether a network computes the same in two ways, within rounding."""

from torch import Tensor

TOLERANCE = 1e-4
"""How far, relative to the largest, outputs may lie apart."""


def are_near(found: Tensor, wanted: Tensor) -> bool:
    """True if two outputs have the same shape, and their numbers are equal within float32's rounding."""
    return found.shape == wanted.shape and bool((found - wanted).abs().max() <= TOLERANCE * wanted.abs().max())
