"""The slow twins: SISE and its parts written a second time, plainly, from the formulas of the paper.

Nothing here shares code with `engine`: plain loops, full-size masks, one forward per mask.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional


def minmax(values):
    low, high = values.min(), values.max()
    return (values - low) / (high - low) if high > low else values * 0.0


def upsample(maps: Tensor, size) -> Tensor:
    return functional.interpolate(maps[None], size=size, mode="bilinear", align_corners=False)[0]


def otsu_foreground(values: np.ndarray) -> np.ndarray:
    """For every split of 256 bins the between-class variance by its definition; the first best wins."""
    bins = np.minimum((values * 256).astype(int), 255)
    best, threshold = -1.0, None
    for split in range(256):
        below, above = values[bins <= split], values[bins > split]
        if len(below) == 0 or len(above) == 0:
            continue
        share = len(below) / values.size
        variance = share * (1 - share) * (below.mean() - above.mean()) ** 2
        if variance > best * (1 + 1e-12):
            best, threshold = variance, split
    return np.zeros(values.shape, bool) if threshold is None else bins > threshold


def soft_gate(values: np.ndarray) -> np.ndarray:
    grey = np.rint(256 * values)
    best, first = -1.0, None
    for split in range(1, 257):
        below, above = grey[grey < split], grey[grey >= split]
        if len(below) == 0 or len(above) == 0:
            continue
        share = len(below) / values.size
        variance = share * (1 - share) * (below.mean() - above.mean()) ** 2
        if variance > best * (1 + 1e-12):
            best, first = variance, split
    if first is None:
        return np.zeros(values.shape)
    threshold = 1.5 * first if (grey >= 1.5 * first).mean() < 0.1 else first
    return 1 / (1 + np.exp(-100 * (values - threshold / 256)))


def fuse(block_maps: Sequence[np.ndarray], gate: str = "hard") -> np.ndarray:
    fused = block_maps[0]
    for deeper in block_maps[1:]:
        opened = otsu_foreground(deeper).astype(float) if gate == "hard" else soft_gate(deeper)
        fused = (fused + deeper) * opened
    return fused


def keep(alphas: Tensor, mu: float, selection: str) -> list[int]:
    largest = max(alphas.tolist())
    if largest <= 0:
        return []
    if selection == "mu":
        return [k for k, alpha in enumerate(alphas.tolist()) if alpha > mu * largest]
    positive = [k for k, alpha in enumerate(alphas.tolist()) if alpha > 0]
    above = otsu_foreground(np.array([alphas[k].item() / largest for k in positive]))
    return [k for k, is_above in zip(positive, above, strict=True) if is_above or alphas[k].item() == largest]


@dataclass
class Slow:
    """What the slow twin finds for one image and class."""

    kept: list[list[int]]
    block_maps: list[np.ndarray | None]
    fused: np.ndarray
    score: float


def sise(
    model: nn.Module,
    capture: Callable[[nn.Module, Tensor], tuple[Tensor, list[Tensor]]],
    image: Tensor,
    target: int,
    *,
    mu: float = 0.0,
    selection: str = "mu",
    gate: str = "hard",
    baseline: Tensor | float = 0.0,
) -> Slow:
    """SISE of one image [1, 3, H, W]; `capture` gives the logits and the blocks' maps, joined to autograd."""
    logits, maps = capture(model, image.clone().requires_grad_(True))
    probabilities = logits[0].double().softmax(0)
    others = sum(probabilities[j] for j in range(len(probabilities)) if j != target)
    seed = torch.stack([-probabilities[target] * probability for probability in probabilities])
    seed[target] = probabilities[target] * others
    seed = seed / seed.abs().max()
    gradients = torch.autograd.grad(logits, maps, seed[None].to(logits.dtype).detach())
    size = tuple(image.shape[2:])
    kept, block_maps = [], []
    for own, gradient in zip(maps, gradients, strict=True):
        channels = keep(gradient[0].double().sum((1, 2)), mu, selection)
        kept.append(channels)
        block_maps.append(_block_map(model, own[0].detach(), channels, image, target, size, baseline))
    present = [one for one in block_maps if one is not None]
    fused = fuse(present, gate) if present else np.zeros(size)
    return Slow(kept, block_maps, fused, float(probabilities[target].detach()))


@torch.no_grad()
def _block_map(model, maps, channels, image, target, size, baseline):
    total, used = torch.zeros(size, dtype=torch.float64), 0
    for k in channels:
        mask = upsample(maps[k][None], size)[0]
        if mask.max() == mask.min():
            continue
        mask = (mask - mask.min()) / (mask.max() - mask.min())
        score = model(mask * image + (1 - mask) * baseline)[0].double().softmax(0)[target]
        total += score * mask.double() / mask.double().sum()
        used += 1
    return minmax(total.numpy() / used) if used else None


def top_pixels(values: np.ndarray, count: int) -> np.ndarray:
    order = sorted(range(values.size), key=lambda place: (-values.ravel()[place], place))
    kept = np.zeros(values.size, bool)
    kept[order[:count]] = True
    return kept.reshape(values.shape)
