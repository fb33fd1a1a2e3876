"""FullGrad: the gradient terms of the input and of every bias, each made positive and upsampled."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from blocksight.engine.errors import ModelError
from blocksight.engine.explainers.explainer import Explainer, pad
from blocksight.engine.explainers.explanation import Explanation, checked_explanation
from blocksight.engine.model.resample import grid_of, upsampling
from blocksight.engine.model.taps import Recorder, gradients, hook_outputs
from blocksight.engine.model.targets import Target

UNSUPPORTED = (nn.LayerNorm, nn.GroupNorm, nn.InstanceNorm2d, nn.MultiheadAttention)
"""Layers whose biases `bias_of` cannot read."""


def bias_of(layer: nn.Module) -> Tensor | None:
    """The bias of an image-shaped layer for each channel [C]: a convolution's, or that of a frozen batch norm.

    None for a layer without one. Batch norm computes `g (x - m) / s + b`, so it adds `b - g m / s`.
    """
    if isinstance(layer, nn.Conv2d):
        return layer.bias
    if not isinstance(layer, nn.BatchNorm2d) or layer.running_mean is None or layer.running_var is None:
        return None
    scale = (layer.running_var + layer.eps).rsqrt()
    if layer.weight is None or layer.bias is None:
        return -layer.running_mean * scale
    return layer.bias - layer.weight * layer.running_mean * scale


class FullGrad(Explainer):
    """`psi(dz/dx x) + sum over layers and channels of psi(dz/db b)`, psi = absolute value, min-max per layer, resize.

    Srinivas and Fleuret, NeurIPS 2019 (arXiv 1905.00780), equations 6 and 7.
    """

    def _prepare(self, blocks: Sequence[str]) -> None:
        layers = {name: bias_of(layer) for name, layer in self.adapter.module.named_modules()}
        self.biases = {name: bias.detach() for name, bias in layers.items() if bias is not None}
        norms = [name for name, layer in self.adapter.module.named_modules() if isinstance(layer, UNSUPPORTED)]
        if norms or not self.biases:
            found = f"has others, in {norms[0]}" if norms else "has none"
            raise ModelError(
                f"fullgrad reads the biases of convolutions and batch norms alone, and {self.adapter.name} {found}: "
                "take smoothgrad or integrated_gradients"
            )

    def _explain_pass(self, inputs_nchw: Tensor, target: Target, seeds: Sequence[int]) -> list[list[Explanation]]:
        padded = pad(inputs_nchw, self.images_per_pass)
        recorder = Recorder()
        with torch.enable_grad(), hook_outputs(self.adapter.module, self.biases, recorder):
            inputs = padded.detach().requires_grad_(True)
            logits = self.adapter.logits(inputs)
        terms = {name: output for name, output in recorder.recorded.items() if output.dim() == 4}
        filled = target.of(torch.arange(self.images_per_pass).clamp(max=len(inputs_nchw) - 1))  # padded as by `pad`
        found = []
        for index in range(target.num_targets):
            slopes = gradients(logits, filled.raw.direction(logits.detach(), index), [inputs, *terms.values()])
            products = [slopes[0] * padded] + [
                slope * self.biases[name].view(1, -1, 1, 1) for name, slope in zip(terms, slopes[1:], strict=True)
            ]
            found.append(torch.stack([self._positive(product) for product in products]).sum(0).cpu().numpy())
        return [
            [checked_explanation(found[index][image], score, num_forwards=0) for index, score in enumerate(row)]
            for image, row in enumerate(self._scores(inputs_nchw, target))
        ]

    def _positive(self, product: Tensor) -> Tensor:
        """psi of a product [N, C, h, w], summed over channels and upsampled: float64 [N, H, W]."""
        sizes = product.double().abs()
        low, high = sizes.amin((1, 2, 3), keepdim=True), sizes.amax((1, 2, 3), keepdim=True)
        scaled = torch.where(high > low, (sizes - low) / torch.where(high > low, high - low, 1.0), 0.0)
        return upsampling(grid_of(scaled), self.adapter.input_size, scaled.device)(scaled.sum(1))
