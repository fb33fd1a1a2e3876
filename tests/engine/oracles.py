"""The slow twins: SISE, its parts and its metrics written a second time, plainly, from the formulas of its paper.

Nothing here shares code with `engine`: plain loops, masks at full size, one forward per mask, float64
throughout on a copy of the model of their own.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

Capture = Callable[[nn.Module, Tensor], tuple[Tensor, list[Tensor]]]
"""Gives the logits [1, K] of an image and the blocks' maps, shallow to deep, joined to autograd."""

TIE = 1 + 1e-12
"""Two splits whose criteria differ by less are tied, and the first of them wins."""


def minmax(values):
    low, high = values.min(), values.max()
    return (values - low) / (high - low) if high > low else values * 0.0


def upsample(maps: Tensor, size) -> Tensor:
    """[K, h, w] to [K, H, W] by torch's own interpolation."""
    return functional.interpolate(maps[None], size=size, mode="bilinear", align_corners=False)[0]


# ---------------------------------------------------------------- Otsu and fusion


def _criterion(below: np.ndarray, above: np.ndarray) -> float:
    """w0 w1 (u0 - u1)^2."""
    share = len(below) / (len(below) + len(above))
    return share * (1 - share) * (below.mean() - above.mean()) ** 2


def between_class_variance(values: np.ndarray, foreground: np.ndarray) -> float:
    """Otsu's criterion of one split; -1 where one side is empty."""
    if foreground.all() or not foreground.any():
        return -1.0
    return _criterion(values[~foreground], values[foreground])


def otsu_threshold(values: np.ndarray, bins: np.ndarray) -> int | None:
    """The last bin of the background, or None where all values share one bin."""
    best, threshold = -1.0, None
    for split in range(256):
        variance = between_class_variance(values, bins > split)
        if variance >= 0 and variance > best * TIE:
            best, threshold = variance, split
    return threshold


def otsu_foreground(values: np.ndarray) -> np.ndarray:
    bins = np.minimum((values * 256).astype(int), 255)
    threshold = otsu_threshold(values, bins)
    return np.zeros(values.shape, bool) if threshold is None else bins > threshold


def soft_gate(values: np.ndarray) -> np.ndarray:
    grey = np.rint(256 * values)
    threshold = otsu_threshold(grey, np.minimum(grey, 255))
    if threshold is None:
        return np.zeros(values.shape)
    first = threshold + 1
    if (grey >= 1.5 * first).mean() < 0.1:
        first = 1.5 * first
    return 1 / (1 + np.exp(-100 * (values - first / 256)))


def fuse(block_maps: Sequence[np.ndarray], gate: str = "hard") -> np.ndarray:
    fused = block_maps[0]
    for deeper in block_maps[1:]:
        opened = otsu_foreground(deeper).astype(float) if gate == "hard" else soft_gate(deeper)
        fused = (fused + deeper) * opened
    return fused


# ---------------------------------------------------------------- selection and scoring


def keep(alphas: Tensor, mu: float, selection: str) -> list[int]:
    own = alphas.tolist()
    largest = max(own)
    if largest <= 0:
        return []
    if selection == "mu":
        return [k for k, alpha in enumerate(own) if alpha > mu * largest]
    positive = [k for k, alpha in enumerate(own) if alpha > 0]
    above = otsu_foreground(np.array([own[k] / largest for k in positive]))
    return [k for k, is_above in zip(positive, above, strict=True) if is_above or k == own.index(largest)]


def probability(logits: Tensor, target: int) -> Tensor:
    """The softmax probability of one class, as 1 / (1 + sum of the odds against it): exact near 0 and 1."""
    odds = [torch.exp(other - logits[target]) for index, other in enumerate(logits) if index != target]
    return 1 / (1 + sum(odds))


def raw(logits: Tensor, target: int) -> Tensor:
    """The logit itself as confidence: the stand-in of the hand-made case."""
    return logits[target]


def layer_map(masks: Sequence[np.ndarray], scores: Sequence[float], by_mass: bool = True) -> np.ndarray:
    """The mean over masks of score times mask, each mask divided by its sum."""
    terms = [score * mask / (mask.sum() if by_mass else 1) for mask, score in zip(masks, scores, strict=True)]
    return sum(terms) / len(terms)


@dataclass
class Slow:
    """What the slow twin finds for one image and class."""

    alphas: list[Tensor]
    kept: list[list[int]]
    num_masks: list[int]
    block_maps: list[np.ndarray | None]
    fused: np.ndarray
    score: float


def double_copy(model: nn.Module) -> nn.Module:
    """A float64 copy that computes nothing in place."""
    twin = copy.deepcopy(model).double().eval()
    for child in twin.modules():
        if hasattr(child, "inplace"):
            child.inplace = False
    return twin.requires_grad_(False)


def sise(
    model: nn.Module,
    capture: Capture,
    image: Tensor,
    target: int,
    *,
    mu: float = 0.0,
    selection: str = "mu",
    gate: str = "hard",
    baseline: Tensor | float = 0.0,
    psi: Callable[[Tensor, int], Tensor] = probability,
) -> Slow:
    """SISE of one image [1, 3, H, W] and one class."""
    twin, image = double_copy(model), image.detach().double()
    logits, maps = capture(twin, image.clone().requires_grad_(True))
    score = psi(logits[0], target)
    gradients = torch.autograd.grad(score, maps)
    alphas = [gradient[0].sum((1, 2)) for gradient in gradients]
    kept = [keep(alpha, mu, selection) for alpha in alphas]
    sampled = [
        _masks_and_scores(twin, own[0].detach(), channels, image, target, baseline, psi)
        for own, channels in zip(maps, kept, strict=True)
    ]
    block_maps = [minmax(layer_map(masks, scores)) if masks else None for masks, scores in sampled]
    present = [one for one in block_maps if one is not None]
    fused = fuse(present, gate) if present else np.zeros(tuple(image.shape[2:]))
    return Slow(alphas, kept, [len(masks) for masks, _ in sampled], block_maps, fused, float(score.detach()))


@torch.no_grad()
def _masks_and_scores(twin, maps, channels, image, target, baseline, psi):
    masks, scores = [], []
    for k in channels:
        if maps[k].max() == maps[k].min():
            continue  # a constant map becomes all zeros and contributes nothing
        mask = minmax(upsample(maps[k][None], tuple(image.shape[2:]))[0])
        masks.append(mask.numpy())
        scores.append(float(psi(twin(mask * image + (1 - mask) * baseline)[0], target)))
    return masks, scores


# ---------------------------------------------------------------- metrics


def splitmix64(word: int) -> int:
    """The finaliser of splitmix64, in Python's own integers."""
    word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    word = (word ^ word >> 27) * 0x94D049BB133111EB % 2**64
    return word ^ word >> 31


def top_pixels(values: np.ndarray, count: int) -> np.ndarray:
    """The `count` greatest: value descending, then the place with the lower hash."""
    order = sorted(range(values.size), key=lambda place: (-values.ravel()[place], splitmix64(17 + place)))
    kept = np.zeros(values.size, bool)
    kept[order[:count]] = True
    return kept.reshape(values.shape)


def drop_and_increase(scores: Sequence[float], kept_scores: Sequence[float]) -> tuple[float, float]:
    """Both in percent over the records."""
    pairs = list(zip(scores, kept_scores, strict=True))
    drop = sum(max(0.0, own - kept) / own for own, kept in pairs)
    increase = sum(kept > own for own, kept in pairs)
    return 100 * drop / len(pairs), 100 * increase / len(pairs)


def energy(saliency: np.ndarray, truth: np.ndarray) -> float:
    """EBPG: the share of the map that lies inside the ground truth."""
    return float((saliency * truth).sum() / saliency.sum())


def overlap(saliency: np.ndarray, truth: np.ndarray) -> float:
    """IoU of the top 20 % with the ground truth."""
    top = top_pixels(saliency, int(0.2 * saliency.size))
    return float((top & (truth > 0)).sum() / (top | (truth > 0)).sum())


def box(saliency: np.ndarray, truth: np.ndarray) -> float:
    """Bbox: as many top pixels as the ground truth has; the share of them inside it."""
    top = top_pixels(saliency, int(truth.sum()))
    return float(truth[top].mean())
