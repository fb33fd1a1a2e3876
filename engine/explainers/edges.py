"""Edge detectors: from RGB pixels in [0, 1], [N, 3, H, W], to edges in [0, 1], [N, H, W]."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from blocksight.engine.catalog.edge_detectors import HED_INSTALLATION, Detector, hed_weights
from blocksight.engine.errors import ModelError
from blocksight.engine.model.resample import grid_of, scaled
from blocksight.engine.model.state_dicts import load_state

EdgeDetector = Callable[[Tensor], Tensor]

SOBEL, SCHARR = (1.0, 2.0, 1.0), (3.0, 10.0, 3.0)
"""Weights of the three lines that a gradient sums."""


def gradient_magnitude(images_nchw: Tensor, lines: Sequence[float]) -> Tensor:
    """The gradient magnitude of the mean over channels, by SOBEL or SCHARR, [N, H, W]; the border is replicated."""
    grey = functional.pad(images_nchw.mean(1, keepdim=True), (1, 1, 1, 1), mode="replicate")
    weights = torch.tensor(lines, dtype=grey.dtype, device=grey.device)
    across = weights[:, None] * weights.new_tensor([-1.0, 0.0, 1.0])
    kernels = torch.stack([across, across.T])[:, None]
    return functional.conv2d(grey, kernels).square().sum(1).sqrt()


def scharr(pixels_nchw: Tensor) -> Tensor:
    """Scharr's gradient magnitude, scaled to [0, 1] per picture; zeros for a constant picture."""
    return scaled(gradient_magnitude(pixels_nchw, SCHARR))


HED_WIDTHS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
"""Channels of the convolutions of each block: VGG16's."""
HED_MEAN = (104.00699, 116.66877, 122.67892)
"""Means of blue, green and red, in [0, 255]."""


class Hed(nn.Module):
    """Holistically-nested edge detection (Xie and Tu, ICCV 2015, arXiv 1504.06375): five scales, and their fusion."""

    mean: Tensor

    def __init__(self) -> None:
        """With random weights; `hed` loads those of the package."""
        super().__init__()
        before = [3, *(widths[-1] for widths in HED_WIDTHS)]
        self.blocks = nn.ModuleList(map(_block, before, HED_WIDTHS))
        self.sides = nn.ModuleList(nn.Conv2d(widths[-1], 1, 1) for widths in HED_WIDTHS)
        self.fuse = nn.Conv2d(len(HED_WIDTHS), 1, 1)
        self.register_buffer("mean", torch.tensor(HED_MEAN).view(1, 3, 1, 1), persistent=False)

    def forward(self, pixels_nchw: Tensor) -> Tensor:
        """Edges [N, H, W] of RGB pixels in [0, 1]."""
        maps, found = 255 * pixels_nchw.to(self.mean).flip(1) - self.mean, []
        for number, (block, side) in enumerate(zip(self.blocks, self.sides, strict=True)):
            maps = block(functional.max_pool2d(maps, 2, ceil_mode=True) if number else maps)
            found.append(
                functional.interpolate(side(maps), size=grid_of(pixels_nchw), mode="bilinear", align_corners=False)
            )
        return self.fuse(torch.cat(found, 1))[:, 0].sigmoid()


def _block(before: int, widths: Sequence[int]) -> nn.Sequential:
    """3 x 3 convolutions, each with a ReLU."""
    channels = [before, *widths]
    pairs = zip(channels, widths, strict=False)
    return nn.Sequential(*(layer for pair in pairs for layer in (nn.Conv2d(*pair, 3, padding=1), nn.ReLU())))


def hed() -> Hed:
    """HED with the weights of its package, frozen. Raises ModelError where they are missing or do not fit."""
    net = Hed()
    load_state(net, _hed_state())
    return net.eval().requires_grad_(False).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


def _hed_state() -> dict[str, Tensor]:
    """The state dict in the package's file."""
    file = hed_weights()
    if file is None:
        raise ModelError(f"edges by HED need its weights: {HED_INSTALLATION}; edges=scharr needs none")
    try:
        import h5py
    except ImportError as error:
        raise ModelError(f"HED's weights are read by h5py: {HED_INSTALLATION}; edges=scharr needs none") from error
    try:
        with h5py.File(file) as stored:
            return {
                name: _as_torch(np.asarray(stored[place])) for name, place in _hed_places().items() if place in stored
            }
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        raise ModelError(f"HED's weights in {file} cannot be read: {error}; {HED_INSTALLATION}") from error


def _hed_places() -> dict[str, str]:
    """For each of the module's tensors, its path in the file."""
    layers = {"fuse": "fuse"}
    for block, widths in enumerate(HED_WIDTHS):
        layers[f"sides.{block}"] = f"dsn{block + 1}"
        for layer in range(len(widths)):
            layers[f"blocks.{block}.{2 * layer}"] = f"block{block + 1}/layers/conv2d" + (f"_{layer}" if layer else "")
    parts = {"weight": "0", "bias": "1"}
    return {
        f"{own}.{part}": f"{theirs}/vars/{number}" for own, theirs in layers.items() for part, number in parts.items()
    }


def _as_torch(values: NDArray[Any]) -> Tensor:
    """Kernels [height, width, in, out] in torch's order; biases unchanged."""
    tensor = torch.as_tensor(values, dtype=torch.float32)
    return tensor.permute(3, 2, 0, 1) if tensor.dim() == 4 else tensor


DETECTORS: Mapping[Detector, Callable[[torch.device], EdgeDetector]] = {
    "hed": lambda device: hed().to(device),
    "scharr": lambda _: scharr,
}
"""Detectors by name; each is made for a device."""


@torch.no_grad()
def edges_of(pixels_chw: Tensor, detector: EdgeDetector, scale: float = 1.0) -> Tensor:
    """The edges [H, W] of one picture [3, H, W] in [0, 1], detected at `scale` times its size and resized back.

    One picture per pass, so that its edges depend on no other picture.
    """
    full = grid_of(pixels_chw)
    size = [max(1, round(scale * side)) for side in full]
    pixels = pixels_chw[None]
    if scale < 1:
        pixels = functional.interpolate(pixels, size=size, mode="bilinear", align_corners=False, antialias=True)
    edges = detector(pixels)[:, None]
    return functional.interpolate(edges, size=full, mode="bilinear", align_corners=False)[0, 0]
