"""From block maps to one saliency map: min-max, Otsu's threshold and the SISE cascade, after the paper's figure 5."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from blocksight.engine.saliency import NUM_BINS, Map, between_class_variance, otsu_foreground

SOFT_SLOPE = 100.0
SOFT_RAISE_FACTOR = 1.5
SOFT_MIN_SHARE = 0.1


def hard_gate(values: Map) -> Map:
    """The paper's binary mask: 1 on Otsu's foreground, else 0."""
    return otsu_foreground(values).astype(np.float64)


def soft_gate(values: Map) -> Map:
    """The authors' laboratory's smooth mask: sigmoid(100 (v - t)), t raised by half for small foregrounds.

    t = j / 256 with j the first foreground bin of round(256 v); it becomes 1.5 t where fewer than 10 % of
    the pixels lie at or above 1.5 t. A constant map has no foreground.
    """
    bins = np.rint(NUM_BINS * values).astype(np.int64)
    variance = between_class_variance(np.minimum(bins, NUM_BINS - 1).ravel(), bins.ravel().astype(np.float64))
    if variance.max() < 0:
        return np.zeros(values.shape, dtype=np.float64)
    threshold = float(variance.argmax() + 1)
    if (bins >= SOFT_RAISE_FACTOR * threshold).mean() < SOFT_MIN_SHARE:
        threshold *= SOFT_RAISE_FACTOR
    return 1.0 / (1.0 + np.exp(-SOFT_SLOPE * (values - threshold / NUM_BINS)))


GATES: Mapping[str, Callable[[Map], Map]] = {"hard": hard_gate, "soft": soft_gate}
"""Gates by name. A gate turns the deeper map of a pair into the factor of their sum."""


def cascade(block_maps: Sequence[Map], gate: Callable[[Map], Map] = hard_gate) -> Map:
    """The fused map [H, W]: the last of `stages`, not rescaled. Raises ValueError for no block map."""
    return stages(block_maps, gate)[-1]


def stages(block_maps: Sequence[Map], gate: Callable[[Map], Map] = hard_gate) -> list[Map]:
    """`E_1 = U_1, E_b = (E_{b-1} + U_b) gate(U_b)`, shallow to deep: every E_b [H, W].

    `block_maps` are the min-maxed U_b in [0, 1]; E_b lies in [0, b]. Raises ValueError for none.
    """
    if not block_maps:
        raise ValueError("no block map to fuse: every block was empty")
    fused = [block_maps[0]]
    for deeper in block_maps[1:]:
        fused.append((fused[-1] + deeper) * gate(deeper))
    return fused
