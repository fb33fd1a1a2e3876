"""The slow twins of the explainers beside SISE and the CAMs: plain loops from their papers' formulas.

Each takes one image [3, H, W] and one class of a float64 copy of the network, masks at full size and torch's
own interpolation; only the random draws are the engine's, since they define which map is meant.
"""

import itertools
import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.engine.oracles import minmax, probability, upsample

Tail = Callable[[nn.Module, Tensor], Tensor]
"""Logits [1, K] of a network from the maps [1, C, h, w] of its last block."""


def last_maps(net: nn.Module, image: Tensor) -> Tensor:
    return net.written_out(image[None])[1][-1][0].detach()


@torch.no_grad()
def scorecam(net: nn.Module, image: Tensor, target: int, *, weights: str, baseline: Tensor | float) -> Tensor:
    """`relu(sum_k w_k A_k)`, w = softmax of the logits, or the probabilities, of `H_k x + (1 - H_k) b`."""
    kept, scores = [], []
    for one in last_maps(net, image):
        if one.max() > one.min():
            mask = minmax(upsample(one[None], tuple(image.shape[1:]))[0])
            logits = net((mask * image + (1 - mask) * baseline)[None])[0]
            scores.append(float(logits[target] if weights == "softmax" else probability(logits, target)))
            kept.append(one)
    if weights == "softmax":
        odds = [math.exp(score - max(scores)) for score in scores]
        scores = [own / sum(odds) for own in odds]
    native = sum(score * one for score, one in zip(scores, kept, strict=True))
    return upsample(native.relu()[None], tuple(image.shape[1:]))[0]


@torch.no_grad()
def ablationcam(net: nn.Module, tail: Tail, image: Tensor, target: int) -> Tensor:
    """`relu(sum_k (z - z(A_k = 0)) A_k)`."""
    maps = last_maps(net, image)
    whole = tail(net, maps[None])[0, target]
    native = torch.zeros_like(maps[0])
    for k in range(len(maps)):
        without = maps.clone()
        without[k] = 0
        native += (whole - tail(net, without[None])[0, target]) * maps[k]
    return upsample(native.relu()[None], tuple(image.shape[1:]))[0]


WholeTail = Callable[[nn.Module, Tensor, Tensor], Tensor]
"""Logits [1, K] of a network from an image [3, H, W] and the maps [1, C, h, w] of its last block."""


@torch.no_grad()
def afmi_signed(
    net: nn.Module,
    tail: WholeTail,
    maps_of: Callable[[Tensor], Tensor],
    image: Tensor,
    target: int,
    reference: Tensor,
    *,
    removal: str = "reference",
    score: str = "logit",
    keep: str = "relevant",
    threshold: float = 0.0,
    conserve: bool = False,
) -> tuple[list[float], Tensor]:
    """The importance of every map, and `sum_k w_k (A_k - A'_k)` at the block's grid, against one reference."""

    def value(seen: Tensor, maps: Tensor) -> float:
        logits = tail(net, seen, maps[None])[0]
        return float(logits[target] if score == "logit" else probability(logits, target))

    maps, others = maps_of(image), maps_of(reference)
    importance, native = [], torch.zeros_like(maps[0])
    for k in range(len(maps)):
        without, emptied, inserted = maps.clone(), maps.clone(), others.clone()
        without[k], emptied[k], inserted[k] = others[k], 0, maps[k]
        drop = value(image, maps) - value(image, without)
        gain = value(reference, inserted) - value(reference, others)
        zeroed = value(image, maps) - value(image, emptied)
        importance.append({"reference": drop, "zero": zeroed, "insert": gain, "two_sided": (drop + gain) / 2}[removal])
        weight = importance[k] if keep == "all" or importance[k] > threshold else 0.0
        difference = maps[k] - others[k]
        if conserve:
            weight = weight / float(difference.sum()) if difference.any() else 0.0
        native += weight * difference
    return importance, native


def rise_masks(size: tuple[int, int], seed: int, *, num_masks: int, grid: int, keep: float) -> Iterator[Tensor]:
    """The masks [H, W]: random cells, enlarged to one cell more than the image, cropped at a random shift."""
    generator = torch.Generator().manual_seed(seed)
    cells = (torch.rand(num_masks, grid, grid, generator=generator) < keep).double()
    cell = [math.ceil(side / grid) for side in size]
    down, across = (torch.randint(one, (num_masks,), generator=generator).tolist() for one in cell)
    for own, top, left in zip(cells, down, across, strict=True):
        large = upsample(own[None], ((grid + 1) * cell[0], (grid + 1) * cell[1]))[0]
        yield large[top : top + size[0], left : left + size[1]]


@torch.no_grad()
def rise(net: nn.Module, image: Tensor, target: int, seed: int, **options) -> Tensor:
    """`1 / (N p) sum_i s(M_i x) M_i`."""
    total = torch.zeros(image.shape[1:], dtype=torch.float64)
    for mask in rise_masks(tuple(image.shape[1:]), seed, **options):
        total += float(probability(net((mask * image)[None])[0], target)) * mask
    return total / (options["num_masks"] * options["keep"])


@torch.no_grad()
def occlusion(net: nn.Module, image: Tensor, target: int, *, window: int, stride: int, baseline: Tensor) -> Tensor:
    """Per pixel the mean of `s - s(hidden)` over the windows that cover it, where it is positive."""
    height, width = image.shape[1:]
    whole = float(probability(net(image[None])[0], target))
    losses: list[list[list[float]]] = [[[] for _ in range(width)] for _ in range(height)]
    top = 0
    while top == 0 or top - stride + window < height:
        left = 0
        while left == 0 or left - stride + window < width:
            inside = [(i, j) for i in range(top, top + window) for j in range(left, left + window)]
            inside = [(i, j) for i, j in inside if i < height and j < width]
            hidden = image.clone()
            for i, j in inside:
                hidden[:, i, j] = baseline.flatten()
            loss = whole - float(probability(net(hidden[None])[0], target))
            for i, j in inside:
                losses[i][j].append(loss)
            left += stride
        top += stride
    return torch.tensor([[max(0.0, sum(own) / len(own)) for own in row] for row in losses])


def slope(net: nn.Module, image: Tensor, target: int) -> Tensor:
    """The gradient of the logit by the image."""
    own = image.clone().requires_grad_(True)
    return torch.autograd.grad(net(own[None])[0, target], own)[0]


def integrated(net: nn.Module, image: Tensor, target: int, steps: int, baseline: Tensor | float) -> Tensor:
    """The signed integral by Gauss and Legendre's rule, [3, H, W]."""
    total = torch.zeros_like(image)
    for node, weight in zip(*np.polynomial.legendre.leggauss(steps), strict=True):
        share = (float(node) + 1) / 2
        total += float(weight) / 2 * slope(net, (1 - share) * baseline + share * image, target)
    return (image - baseline) * total


def gradcam(net: nn.Module, image: Tensor, target: int) -> Tensor:
    """The signed map at the block's grid."""
    logits, blocks = net.written_out(image[None].clone().requires_grad_(True))
    (slopes,) = torch.autograd.grad(logits[0, target], [blocks[-1]])
    return sum(slopes[0, k].mean() * blocks[-1][0, k].detach() for k in range(slopes.shape[1]))


def smoothgrad(net: nn.Module, image: Tensor, target: int, seed: int, *, base: str, samples: int, noise: float):
    """The mean of the base's signed attributions over noisy copies, made a map as the base makes one."""
    generator = torch.Generator().manual_seed(seed)
    deviation = noise * float(image.max() - image.min())
    attribute = {
        "gradient": slope,
        "integrated_gradients": lambda *of: integrated(*of, steps=50, baseline=0.0),
        "gradcam": gradcam,
    }[base]
    found = []
    for _ in range(samples):
        copy = image + deviation * torch.randn(image.shape, generator=generator).double()
        found.append(attribute(net, copy, target))
    mean = sum(found) / samples
    if base == "gradient":
        return mean.abs().max(0).values
    if base == "integrated_gradients":
        return mean.sum(0).clamp(min=0)
    return upsample(mean.clamp(min=0)[None], tuple(image.shape[1:]))[0]


def bias_terms(net: nn.Module, image: Tensor, target: int, kinds: tuple[type, ...]) -> tuple[Tensor, list[Tensor]]:
    """`dz/dx x`, and per layer of these kinds, in order of execution, `dz/d(output) b`; also the logit's own value.

    Zeros are added to what each layer computes, to take gradients by; b is what the layer makes of zeros, and of an
    activation f(x) - f'(x) x, f' by central differences.
    """
    added, biases = [], []

    def add(layer, given, out):
        added.append(torch.zeros_like(out).requires_grad_(True))
        with torch.no_grad():
            slope = (layer.forward(given[0] + 1e-6) - layer.forward(given[0] - 1e-6)) / 2e-6
            has_weights = any(True for _ in layer.buffers()) or any(True for _ in layer.parameters())
            biases.append(layer.forward(torch.zeros_like(given[0])) if has_weights else out - slope * given[0])
        return out + added[-1]

    handles = [layer.register_forward_hook(add) for layer in net.modules() if isinstance(layer, kinds)]
    own = image.clone().requires_grad_(True)
    logit = net(own[None])[0, target]
    for handle in handles:
        handle.remove()
    slopes = torch.autograd.grad(logit, [own, *added])
    terms = [one * bias for one, bias in zip(slopes[1:], biases, strict=True)]
    return logit.detach(), [(slopes[0] * image)[None], *terms]


def fullgrad(net: nn.Module, image: Tensor, target: int) -> Tensor:
    """`sum psi`, psi = absolute value, min-max over the layer, enlarged, and summed over channels."""
    _, terms = bias_terms(net, image, target, (nn.Conv2d, nn.BatchNorm2d, nn.ReLU6, nn.SiLU))
    return sum(one for term in terms for one in upsample(minmax(term[0].abs()), tuple(image.shape[1:])))


def max_convolution(heights: np.ndarray, smoothness: float, sharpness: float, reach: int) -> np.ndarray:
    """`smax_v k(u - v) m(v)`, smax the softmax-weighted mean, k flat to half its deviation; beyond the rim m is 0."""
    side_i, side_j = heights.shape
    found = np.zeros_like(heights)
    for i in range(side_i):
        for j in range(side_j):
            bells = []
            for di in range(-reach, reach + 1):
                for dj in range(-reach, reach + 1):
                    far = max(0.0, math.hypot(di, dj) / smoothness - 0.5)
                    inside = 0 <= i + di < side_i and 0 <= j + dj < side_j
                    near = heights[i + di, j + dj] if inside else 0.0
                    bells.append(math.exp(-2 * far**2) * near)
            odds = [math.exp(sharpness * bell) for bell in bells]
            found[i, j] = sum(bell * own for bell, own in zip(bells, odds, strict=True)) / sum(odds)
    return found


def blurred(image: np.ndarray, sigma: float) -> np.ndarray:
    """A Gaussian cut off after three deviations, place by place; the rim goes on. [H, W]."""
    reach = max(1, round(3 * sigma))
    height, width = image.shape
    found = np.zeros_like(image)
    offsets = range(-reach, reach + 1)
    total = sum(math.exp(-(di**2 + dj**2) / (2 * sigma**2)) for di in offsets for dj in offsets)
    for i in range(height):
        for j in range(width):
            for di in offsets:
                for dj in offsets:
                    near = image[min(max(i + di, 0), height - 1), min(max(j + dj, 0), width - 1)]
                    found[i, j] += math.exp(-(di**2 + dj**2) / (2 * sigma**2)) / total * near
    return found


def looked_up(levels: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Pixels of a pyramid [L, 3, H, W] at the heights of a mask [H, W], linear between two levels."""
    last = len(levels) - 1
    found = np.zeros(levels.shape[1:])
    for i in range(mask.shape[0]):
        for j in range(mask.shape[1]):
            height = mask[i, j] * last
            below = min(int(height), last - 1)
            share = height - below
            found[:, i, j] = (1 - share) * levels[below, :, i, j] + share * levels[below + 1, :, i, j]
    return found


def gradient_magnitude(image: np.ndarray, beside: float, middle: float) -> np.ndarray:
    """The length of the gradient of the mean over channels, its three lines weighted; the rim goes on."""
    grey = image.mean(0)
    height, width = grey.shape
    found = np.zeros_like(grey)
    lines = ((-1, beside), (0, middle), (1, beside))

    def at(i, j):
        return grey[min(max(i, 0), height - 1), min(max(j, 0), width - 1)]

    for i in range(height):
        for j in range(width):
            across = sum(w * (at(i + d, j + 1) - at(i + d, j - 1)) for d, w in lines)
            down = sum(w * (at(i + 1, j + d) - at(i - 1, j + d)) for d, w in lines)
            found[i, j] = math.hypot(across, down)
    return found


def mirrored(place: int, side: int) -> int:
    """Where a place beyond the rim lies in a mirror on the outermost pixel."""
    place = abs(place)
    return place if place < side else 2 * (side - 1) - place


def mirror_blurred(image: np.ndarray, sigma: float, reach: int) -> np.ndarray:
    """A Gaussian over (2 reach + 1)^2 pixels, place by place; a mirror stands at the rim. [3, H, W]."""
    offsets = np.arange(-reach, reach + 1)
    kernel = np.exp(-(offsets[:, None] ** 2 + offsets[None] ** 2) / (2 * sigma**2))
    kernel /= kernel.sum()
    height, width = image.shape[1:]
    found = np.zeros_like(image)
    for i in range(height):
        for j in range(width):
            rows = [mirrored(i + d, height) for d in offsets]
            columns = [mirrored(j + d, width) for d in offsets]
            found[:, i, j] = (image[:, rows][:, :, columns] * kernel).sum((1, 2))
    return found


def bell(place: Tensor, squared_reach: float, size: tuple[int, int]) -> Tensor:
    """`exp(-|z - p|^2 / s)` at the pixels of [-1, 1] x [-1, 1], the outermost ones on its rim."""
    rows = torch.tensor([2 * i / (size[0] - 1) - 1 for i in range(size[0])], dtype=torch.float64)
    columns = torch.tensor([2 * j / (size[1] - 1) - 1 for j in range(size[1])], dtype=torch.float64)
    far = (rows[:, None] - place[0]) ** 2 + (columns[None] - place[1]) ** 2
    return torch.exp(-far / squared_reach)


def fovex(
    net: nn.Module,
    image: Tensor,
    target: int,
    seed: int,
    *,
    fixations: int,
    steps: int,
    restarts: bool = True,
    best: str = "evaluated",
    memory: float = 0.1,
    decay: float = 1.0,
) -> tuple[list[tuple[float, float, float]], Tensor]:
    """The scan path and the map; the authors' other constants."""
    size = tuple(image.shape[1:])
    draws = 2 * torch.rand(fixations, steps, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) - 1
    dim = torch.from_numpy(mirror_blurred(image.numpy(), 10.0, min(20, size[0] - 1, size[1] - 1)))
    seen_before, total, path = torch.zeros(size).double(), torch.zeros(size).double(), []
    for t in range(fixations):
        place, least, chosen = torch.zeros(2).double(), math.inf, torch.zeros(2).double()
        for k in range(steps):
            own = place.clone().requires_grad_(True)
            view = image + (dim - image) * (1 - seen_before - bell(own, 0.15, size)).clamp(0, 1)
            loss = functional.cross_entropy(net(view[None]), torch.tensor([target]))
            (slope_,) = torch.autograd.grad(loss, own)
            after, reached = (place - 0.1 * slope_.sign()).clamp(-1, 1), float(loss.detach())
            if reached < least:
                least, chosen = reached, after if best == "official" else place
                place = after
            elif restarts:
                place = draws[t, k]
            else:
                place = (after + 0.05 * draws[t, k]).clamp(-1, 1)
        seen_before = memory * seen_before + bell(chosen, 0.15, size)
        total = decay * total + bell(chosen, 0.15, size)
        path.append((float(chosen[0]), float(chosen[1]), least))
    return path, total


def ucag(net: nn.Module, image: Tensor, target: int, attribute, *, crops, side, enlarge, divider, weighted, blur):
    """Crops laid over one another, pixel by pixel; `attribute(net, crop, target)` is a signed map [h, w]."""
    height, width = image.shape[1:]
    high, wide = math.floor(side * height / 224), math.floor(side * width / 224)
    seen = (height, width) if enlarge == "native" else (math.floor(enlarge * high), math.floor(enlarge * wide))
    found = []
    for i in range(crops):
        for j in range(crops):
            top, left = round(i * (height - high) / (crops - 1)), round(j * (width - wide) / (crops - 1))
            crop = image[None, :, top : top + high, left : left + wide]
            crop = functional.interpolate(crop, size=seen, mode="bicubic", align_corners=False)[0]
            score = float(probability(net(crop[None]).detach()[0], target))
            found.append((top, left, score, upsample(attribute(net, crop, target)[None], (high, wide))[0].numpy()))
    greatest = max(math.exp(score) for _, _, score, _ in found)
    saliency = np.zeros((height, width))
    for i in range(height):
        for j in range(width):
            count = 1 if divider == "official" else 0
            for top, left, score, own in found:
                if top <= i < top + high and left <= j < left + wide:
                    weight = math.exp(score) / greatest if weighted else 1
                    saliency[i, j] += weight * own[i - top, j - left]
                    count += 1
            saliency[i, j] = max(0, saliency[i, j] / count)
    return mirror_blurred(minmax(saliency)[None], 3, 2)[0] if blur else minmax(saliency)


def scharr(pixels: np.ndarray) -> np.ndarray:
    return minmax(gradient_magnitude(pixels, 3, 10))


def feature_cam(net, image, target, mean, std, *, interior, threshold, recompute, variant):
    """Over Grad-CAM and Scharr's edges, pixel by pixel; `mean` and `std` [3, 1, 1] are the normalisation's."""
    pixels = (image * std + mean).clamp(0, 1)
    edges = torch.from_numpy(scharr(pixels.numpy()))
    seen = [image]
    if recompute:
        second = pixels * edges if variant == "product" else torch.minimum(pixels + edges, torch.ones(()))
        seen += [(one - mean) / std for one in (second, edges.expand(3, -1, -1))]
    size = tuple(image.shape[1:])
    own = [minmax(upsample(gradcam(net, one, target).clamp(min=0)[None], size)[0]) for one in seen]
    saliency = minmax(sum(own) / len(own))
    found = np.zeros(size)
    for i in range(size[0]):
        for j in range(size[1]):
            if saliency[i, j] >= threshold:
                found[i, j] = saliency[i, j] * (interior + (1 - interior) * edges[i, j])
    return found


def hed(pixels: np.ndarray, layers: dict[str, tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Edges [H, W] of RGB pixels [H, W, 3] in [0, 1], from the file's kernels [height, width, in, out] and biases."""
    full = pixels.shape[:2]
    maps = pixels[..., ::-1] * 255 - np.array([104.00699, 116.66877, 122.67892])
    sides = []
    for block, depth in enumerate((2, 2, 3, 3, 3), 1):
        if block > 1:
            high, wide = (math.ceil(side / 2) for side in maps.shape[:2])
            maps = np.array(
                [[maps[2 * i : 2 * i + 2, 2 * j : 2 * j + 2].max((0, 1)) for j in range(wide)] for i in range(high)]
            )
        for layer in range(depth):
            kernel, bias = layers[f"block{block}/layers/conv2d" + (f"_{layer}" if layer else "")]
            around = np.pad(maps, ((1, 1), (1, 1), (0, 0)))
            places = [(i, j) for i in range(3) for j in range(3)]
            shifted = (around[i : i + maps.shape[0], j : j + maps.shape[1]] @ kernel[i, j] for i, j in places)
            maps = np.maximum(sum(shifted) + bias, 0)
        kernel, bias = layers[f"dsn{block}"]
        sides.append(upsample(torch.from_numpy(maps @ kernel[0, 0] + bias)[None, ..., 0], full)[0].numpy())
    kernel, bias = layers["fuse"]
    return 1 / (1 + np.exp(-(np.stack(sides, -1) @ kernel[0, 0] + bias)))[..., 0]


def bee_map(net: nn.Module, tail: Tail, own: Tensor, baseline: Tensor, target: int, *, steps: int, integrand: str):
    """The signed map [h, w] of one baseline: the mean over n + 1 points; `integrand` is path, plain or rectified."""
    total = torch.zeros(own.shape[1:], dtype=torch.float64)
    for step in range(steps + 1):
        point = (baseline + step / steps * (own - baseline)).requires_grad_(True)
        (slopes,) = torch.autograd.grad(tail(net, point[None])[0, target], point)
        for k in range(len(own)):
            if integrand == "path":
                total += slopes[k] * (own - baseline)[k]
            elif integrand == "plain":
                total += slopes[k] * point[k].detach()
            else:
                total += slopes[k].clamp(min=0) * point[k].detach().clamp(min=0)
    return total / (steps + 1)


def bicubic(native: Tensor, size: tuple[int, int]) -> Tensor:
    """Where the enlarged map is positive, [H, W]."""
    return functional.interpolate(native[None, None], size, mode="bicubic", align_corners=False)[0, 0].clamp(min=0)


@torch.no_grad()
def average_drop(net: nn.Module, image: Tensor, target: int, saliency: Tensor) -> float:
    """`100 max(0, o - q) / o`, q the probability under the map as the mask."""
    whole, kept = (float(probability(net(one[None])[0], target)) for one in (image, minmax(saliency) * image))
    return 100 * max(0.0, whole - kept) / whole


def daam(net: nn.Module, image: Tensor, target: int, *, rectify: bool, every_query: bool = False) -> list[Tensor]:
    """D of each block of a `nets.Transformer`, [h, w]: patch by patch, head by head, one number at a time."""
    tokens, blocks = net.tokens(image[None].clone().requires_grad_(True))[0], []
    for block in net.blocks:
        own = block.attention
        three = own.qkv(block.norm(tokens)).unflatten(1, (3, own.num_heads, -1))
        query, key, value = (three[:, part] for part in range(3))  # each [T, heads, d]
        shares = [_shares(query[:, head], key[:, head]) for head in range(own.num_heads)]
        rows = [
            [sum(a * v for a, v in zip(line, value[:, head], strict=True)) for line in share]
            for head, share in enumerate(shares)
        ]
        taken = torch.stack([torch.stack(row) for row in rows], 1)  # T_b, [T, heads, d]
        blocks.append((shares, value, taken))
        tokens = tokens + own.proj(taken.flatten(1))
        tokens = tokens + block.narrow(nn.functional.gelu(block.wide(block.second_norm(tokens))))
    prefix, last = net.num_prefix, net.norm(tokens)
    logit = net.head(last[0] if prefix else last.mean(0))[target]
    slopes = torch.autograd.grad(logit, [taken for _, _, taken in blocks])
    total, found = 0.0, []
    for (shares, value, _), slope in zip(blocks, slopes, strict=True):
        own = []
        for patch in range(prefix, len(value)):
            wanted = 0.0
            for query in range(len(value) if every_query else 1):
                for head in range(value.shape[1]):
                    for d in range(value.shape[2]):
                        c = float(slope[query, head, d])
                        share = float(shares[head][query][patch].detach())
                        wanted += (max(c, 0.0) if rectify else c) * share * float(value[patch, head, d].detach())
            own.append(max(wanted, 0.0))
        total = total + torch.tensor(own, dtype=torch.float64).view(image.shape[1] // 4, image.shape[2] // 4)
        found.append(total)
    return found


def _shares(query: Tensor, key: Tensor) -> list[list[Tensor]]:
    """The softmax over tokens of each query's products with the keys, over the root of their length."""
    lines = []
    for q in query:
        odds = [torch.exp(sum(q * k) / math.sqrt(len(q))) for k in key]
        lines.append([own / sum(odds) for own in odds])
    return lines


# ---------------------------------------------------------------- attention as a variable

Weights = Callable[[int, Tensor], Tensor]
"""From a layer's number and its attention [heads, T, T] to that which the network goes on with."""


def layer_with(net: nn.Module, number: int, tokens: Tensor, change: Weights) -> Tensor:
    """The tokens [T, D] behind a layer of a `nets.Transformer`, whose attention `change` may replace."""
    block = net.blocks[number]
    three = block.attention.qkv(block.norm(tokens)).unflatten(1, (3, block.attention.num_heads, -1))
    query, key, value = (three[:, part].transpose(0, 1) for part in range(3))
    attention = change(number, (query @ key.transpose(1, 2) / query.shape[-1] ** 0.5).softmax(-1))
    tokens = tokens + block.attention.proj((attention @ value).transpose(0, 1).flatten(1))
    return tokens + block.narrow(nn.functional.gelu(block.wide(block.second_norm(tokens))))


def _slopes_by_attention(score: Callable[[Tensor], Tensor], attention: Tensor, step: float = 1e-6) -> Tensor:
    """Central differences of the score by each entry of A [heads, T, T], one at a time."""
    slopes = torch.zeros_like(attention)
    for place in itertools.product(*map(range, attention.shape)):
        up, down = attention.clone(), attention.clone()
        up[place] += step
        down[place] -= step
        slopes[place] = (score(up) - score(down)) / (2 * step)
    return slopes


@torch.no_grad()
def legrad(net: nn.Module, image: Tensor, target: int, *, pool: str) -> Tensor:
    """LeGrad's map [h, w] of a `nets.Transformer`: one block and one entry of its attention at a time."""
    tokens, maps = net.tokens(image[None])[0], []

    def read(behind: Tensor) -> Tensor:
        if pool == "mean":
            return net.head(net.norm(behind.mean(0)))[target]
        last = net.norm(behind)
        return net.head(last[0] if net.num_prefix else last.mean(0))[target]

    for number in range(len(net.blocks)):
        kept: dict[int, Tensor] = {}
        before = tokens
        tokens = layer_with(net, number, before, lambda own, a, kept=kept: kept.setdefault(own, a))
        slopes = _slopes_by_attention(
            lambda a, before=before, number=number: read(layer_with(net, number, before, lambda *_: a)), kept[number]
        )
        num_heads, num_tokens = slopes.shape[:2]
        maps.append(
            [
                sum(max(float(slopes[head, q, j]), 0.0) for head in range(num_heads) for q in range(num_tokens))
                / (num_heads * num_tokens)
                for j in range(net.num_prefix, num_tokens)
            ]
        )
    mean = torch.tensor(maps, dtype=torch.float64).mean(0)
    return mean.view(image.shape[1] // 4, image.shape[2] // 4)


@torch.no_grad()
def chefer(net: nn.Module, image: Tensor, target: int) -> Tensor:
    """The gradient-weighted rollout's map [h, w] of a `nets.Transformer`: differences, and R as a whole matrix."""

    def logit(change: Weights) -> Tensor:
        tokens = net.tokens(image[None])[0]
        for number in range(len(net.blocks)):
            tokens = layer_with(net, number, tokens, change)
        last = net.norm(tokens)
        return net.head(last[0] if net.num_prefix else last.mean(0))[target]

    kept: dict[int, Tensor] = {}
    logit(lambda own, a: kept.setdefault(own, a))
    num_tokens = kept[0].shape[1]
    total = [[float(i == j) for j in range(num_tokens)] for i in range(num_tokens)]
    for number, attention in kept.items():
        slopes = _slopes_by_attention(
            lambda a, number=number: logit(lambda own, old: a if own == number else old), attention
        )
        heads = range(len(attention))
        share = [
            [
                sum(max(float(attention[h, i, j] * slopes[h, i, j]), 0.0) for h in heads) / len(heads)
                for j in range(num_tokens)
            ]
            for i in range(num_tokens)
        ]
        total = [
            [total[i][j] + sum(share[i][k] * total[k][j] for k in range(num_tokens)) for j in range(num_tokens)]
            for i in range(num_tokens)
        ]
    patches = range(net.num_prefix, num_tokens)
    if net.num_prefix:
        row = [total[0][j] for j in patches]
    else:
        row = [sum(total[i][j] - float(i == j) for i in patches) / num_tokens for j in patches]
    return torch.tensor(row, dtype=torch.float64).view(image.shape[1] // 4, image.shape[2] // 4)


@torch.no_grad()
def libra_logit(net: nn.Module, fixed: Tensor, image: Tensor, target: int) -> Tensor:
    """The logit of a `nets.Transformer` whose attention, deviations and gates are those of the image `fixed`."""
    held, tokens = net.tokens(fixed[None])[0], net.tokens(image[None])[0]

    def norm(layer: nn.LayerNorm, own: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
        sd = (own.var(1, unbiased=False, keepdim=True) + layer.eps).sqrt()
        first, second = ((one - one.mean(1, keepdim=True)) / sd * layer.weight + layer.bias for one in (own, other))
        return first, second

    for block in net.blocks:
        own, other = norm(block.norm, held, tokens)
        num_heads = block.attention.num_heads
        query, key, value = (
            block.attention.qkv(own).unflatten(1, (3, num_heads, -1))[:, part].transpose(0, 1) for part in range(3)
        )
        moved = block.attention.qkv(other).unflatten(1, (3, num_heads, -1))[:, 2].transpose(0, 1)
        attention = (query @ key.transpose(1, 2) / query.shape[-1] ** 0.5).softmax(-1)
        held = held + block.attention.proj((attention @ value).transpose(0, 1).flatten(1))
        tokens = tokens + block.attention.proj((attention @ moved).transpose(0, 1).flatten(1))
        own, other = (block.wide(one) for one in norm(block.second_norm, held, tokens))
        gate = (1 + torch.erf(own / 2**0.5)) / 2
        held, tokens = held + block.narrow(own * gate), tokens + block.narrow(other * gate)
    last = norm(net.norm, held, tokens)[1]
    return net.head(last[0] if net.num_prefix else last.mean(0))[target]


# ---------------------------------------------------------------- tokens left out


@torch.no_grad()
def without_tokens(net: nn.Module, image: Tensor, kept: Tensor) -> Tensor:
    """Logits [K] of a `nets.Transformer` that is run on the kept patches [h, w], with their own positions."""
    tokens = list(net.tokens(image[None])[0])
    row = tokens[: net.num_prefix]
    row += [own for own, is_kept in zip(tokens[net.num_prefix :], kept.flatten().tolist(), strict=True) if is_kept]
    behind = torch.stack(row)[None]
    for block in net.blocks:
        behind = block(behind)
    last = net.norm(behind)[0]
    return net.head(last[0] if net.num_prefix else last.mean(0))


def patch_means(mask: Tensor, side: int) -> list[float]:
    """The mean of a mask [H, W] over each patch of `side` pixels, row by row."""
    return [
        round(float(mask[top : top + side, left : left + side].double().mean()) * 2**16) / 2**16
        for top in range(0, mask.shape[0], side)
        for left in range(0, mask.shape[1], side)
    ]


def _highest(means: list[float], count: int, shape: tuple[int, int]) -> Tensor:
    order = sorted(range(len(means)), key=lambda place: (-means[place], place))
    return torch.tensor([float(place in order[:count]) for place in range(len(means))]).double().view(shape)


def kept_eighths(mask: Tensor, side: int) -> Tensor:
    """The patches [h, w] that a soft mask keeps: an eighth of all, or two, or three, ..."""
    means = patch_means(mask, side)
    above = sum(mean > 0.5 for mean in means)
    steps = [max(1, round(part * len(means) / 8)) for part in range(9)]
    return _highest(means, min(steps, key=lambda step: (abs(step - above), step)), _grid(mask, side))


def kept_of_area(mask: Tensor, side: int) -> Tensor:
    """The patches [h, w] that a binary mask keeps: as many as its area."""
    means = patch_means(mask, side)
    return _highest(means, max(1, round(sum(means))), _grid(mask, side))


def _grid(mask: Tensor, side: int) -> tuple[int, int]:
    return mask.shape[0] // side, mask.shape[1] // side


def _enlarged(patches: Tensor, side: int) -> Tensor:
    return patches.repeat_interleave(side, 0).repeat_interleave(side, 1)


@torch.no_grad()
def rise_of_tokens(net: nn.Module, image: Tensor, target: int, seed: int, **options) -> Tensor:
    """`1 / (N p) sum_i s(b_i) b_i`, b the patches of 4 pixels that are kept."""
    total = torch.zeros(image.shape[1:], dtype=torch.float64)
    for mask in rise_masks(tuple(image.shape[1:]), seed, **options):
        kept = kept_eighths(mask, 4)
        total += float(probability(without_tokens(net, image, kept), target)) * _enlarged(kept, 4)
    return total / (options["num_masks"] * options["keep"])


@torch.no_grad()
def occlusion_of_tokens(net: nn.Module, image: Tensor, target: int, *, window: int) -> Tensor:
    """Per patch the mean of `s - s(left out)` over squares of so many patches around it, where it is positive."""
    rows, columns = _grid(image[0], 4)
    whole = float(probability(without_tokens(net, image, torch.ones(rows, columns)), target))
    total, number = torch.zeros(rows, columns, dtype=torch.float64), torch.zeros(rows, columns)
    for top in range(rows - window + 1):
        for left in range(columns - window + 1):
            kept = torch.ones(rows, columns)
            kept[top : top + window, left : left + window] = 0
            total += (whole - float(probability(without_tokens(net, image, kept), target))) * (1 - kept)
            number += 1 - kept
    return _enlarged((total / number).clamp(min=0), 4)
